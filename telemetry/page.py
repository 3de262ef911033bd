"""The page of the live view: one answer that needs no other.

Owns how the files of `web/` become one document with its style and script inside, as the policy it
is served under demands (`default-src 'none'`, inline style and script, `connect-src 'self'`). Knows
nothing of what the page shows; it asks for `live.json` by itself.
"""

from pathlib import Path

_WEB = Path(__file__).parent / "web"
# In the order in which they build on each other.
_SCRIPTS = ("text.js", "steps.js", "timeline.js", "hands.js", "tables.js", "main.js")


def build_page() -> bytes:
    """The document, UTF-8."""
    script = "\n".join(_read(name) for name in _SCRIPTS)
    style = _read("page.css")
    assert "</script" not in script and "</style" not in style, "it would end its own element"
    page = _read("page.html").replace("/*style*/", style)
    return page.replace("/*script*/", f'"use strict";\n{script}').encode()


def _read(name: str) -> str:
    return (_WEB / name).read_text(encoding="utf-8")


PAGE: bytes = build_page()
