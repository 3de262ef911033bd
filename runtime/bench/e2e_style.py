"""The style sheet of the report page: light and dark, telephone and desk, paper.

Owns colours and measures. Colours stand out from what they lie on, 3 to 1 where they are marks,
4.5 to 1 where they are text.
"""

STYLE = (
    """
:root {
  color-scheme: light dark;
  --back: #f6f7f8; --card: #ffffff; --line: #d9dde2; --text: #1b1f24; --dim: #59626d;
  --accent: #1f5fae; --bad: #b3261e; --ok: #1a7f4b; --band: #e4e8ed;
  --s0: #2a68ad; --s1: #b4530c; --s2: #217a50; --s3: #7543b8;
  --s4: #a8345f; --s5: #0f7283; --s6: #6e6505; --s7: #7b838d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #101317; --card: #171b20; --line: #313841; --text: #e4e7eb; --dim: #9da7b3;
    --accent: #82b4f0; --bad: #ff8a80; --ok: #62c995; --band: #2a313a;
    --s0: #7cb2ee; --s1: #eda15f; --s2: #6bc798; --s3: #b89bf3;
    --s4: #ee8bae; --s5: #5fc2d4; --s6: #cdc25e; --s7: #8b95a1;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
header, main { max-width: 1240px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 20px; }
h1 { font-size: 24px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 18px; margin: 0 0 6px; }
h3 { font-size: 14px; margin: 14px 0 4px; }
p { margin: 0 0 8px; max-width: 76ch; overflow-wrap: anywhere; }
a { color: var(--accent); }
nav ul {
  display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; padding: 0; margin: 8px 0;
}
nav a { display: inline-block; padding: 3px 0; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 14px 16px; margin: 14px 0; min-width: 0;
}
code, pre { font: 13px/1.5 ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", monospace; }
pre, code { overflow-wrap: anywhere; white-space: pre-wrap; margin: 0; }
.note { color: var(--dim); font-size: 13px; }
.skip { position: absolute; left: 8px; top: -60px; background: var(--card); padding: 8px 12px; }
.skip:focus { top: 8px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.plots {
  display: grid; gap: 14px 24px; align-items: start; margin: 10px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
}
figure { margin: 0; min-width: 0; max-width: 560px; }
figcaption { font-size: 13px; margin-bottom: 4px; }
figcaption b { display: block; font-size: 14px; }
figcaption span { color: var(--dim); }
summary {
  cursor: pointer; color: var(--accent); width: max-content; max-width: 100%; padding: 3px 0;
}
dl {
  display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 18px;
  margin: 0 0 10px; font-size: 13px;
}
dt { color: var(--dim); max-width: 34ch; overflow-wrap: anywhere; }
dd { margin: 0; max-width: 90ch; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 4px 0 10px; border-radius: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
.caption { color: var(--dim); font-size: 13px; margin: 8px 0 0; }
th, td {
  text-align: left; vertical-align: top; padding: 3px 14px 3px 0;
  border-bottom: 1px solid var(--line);
}
thead th { color: var(--dim); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 400; min-width: 9em; }
td.n { text-align: right; white-space: nowrap; }
td.bad { color: var(--bad); font-weight: 650; }
.verdict { font-weight: 600; }

svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--text); }
svg .label { fill: var(--dim); }
svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; }
svg .grid { stroke: var(--line); }
svg .axis, svg .ends { stroke: var(--text); }
svg .ends { stroke-width: 1.5; }
svg .compare { stroke: var(--dim); stroke-dasharray: 4 3; }
svg .band { fill: var(--band); }
svg .line { fill: none; stroke-width: 1.2; stroke-opacity: .6; }
svg .whisker { stroke-width: 1.5; }
svg .mark:hover { stroke: var(--text); stroke-width: 1.5; }
"""
    + "\n".join(
        f"svg .s{n} {{ fill: var(--s{n}); stroke: none; }} "
        f"svg .line.s{n}, svg .whisker.s{n} {{ fill: none; stroke: var(--s{n}); }}"
        for n in range(8)
    )
    + """
@media (max-width: 620px) {
  header, main { padding-left: 8px; padding-right: 8px; }
  section { padding: 10px; }
  h1 { font-size: 20px; }
  dl { display: block; }
  dd { margin-bottom: 5px; }
}
body.picture { background: #ffffff; color-scheme: light; }
.picture main { padding: 12px; margin: 0; }
@media print {
  section { break-inside: avoid; border: 0; }
  details > * { display: block; }
}
@media (forced-colors: active) { svg .mark { forced-color-adjust: none; } }
"""
)
