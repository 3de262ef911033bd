// Words and elements. Whatever a program named goes through `name()` or textContent: never markup.

const $ = (id) => document.getElementById(id);

function el(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// A name that a program gave: it may be long, hold markup or run from right to left.
const name = (text) => el("bdi", { title: text }, ...visible(text).split(/(?<=[._/:])/).flatMap((part, i) => (i ? [el("wbr"), part] : [part])));

// Control and formatting characters shown as what they are.
const visible = (text) => text.replace(/[\u0000-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
  (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));

const isolated = (text) => "\u2068" + visible(text) + "\u2069"; // the same for the canvas and for titles

const shorten = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

function significant(value) {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

function duration(ns) {
  if (ns === null || ns === undefined || ns < 0) return "–";
  if (ns < 1000) return `${Math.round(ns)} ns`;
  if (ns < 999.5e3) return `${significant(ns / 1e3)} µs`;
  if (ns < 999.5e6) return `${significant(ns / 1e6)} ms`;
  if (ns < 120e9) return `${significant(ns / 1e9)} s`;
  return ns < 7200e9 ? `${(ns / 60e9).toFixed(1)} min` : `${(ns / 3600e9).toFixed(1)} h`;
}

const seconds = (s) => (s === null || s === undefined ? "–" : duration(s * 1e9));

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < 4; unit += 1) count /= 1024;
  return `${Number.isInteger(count) || unit === 0 ? count : significant(count)} ${units[unit]}`;
}

function rate(bytesPerSecond) {
  const [unit, word] = bytesPerSecond >= 1e9 ? [1e9, "GB/s"] : bytesPerSecond >= 1e6 ? [1e6, "MB/s"] : [1e3, "kB/s"];
  return `${significant(bytesPerSecond / unit)} ${word}`;
}

const whole = (count) => Math.round(count).toLocaleString("en-US");
const sizeClass = (label) => label.replace(/(\d)([KM]iB)/, "$1 $2").replace("inf", "more");

function percent(part) {
  if (!Number.isFinite(part)) return "–";
  return part >= 0.0995 ? `${(part * 100).toFixed(0)}%` : `${(part * 100).toFixed(1)}%`;
}

const plural = (count, one, many) => `${whole(count)} ${count === 1 ? one : many || one + "s"}`;

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Rows that keep their elements between updates, so that a selection of text survives.
// cells(item) gives one entry a column: a string, a Node, or {text | node, class}.
function fillRows(body, items, keyOf, cells) {
  const known = new Map([...body.children].map((row) => [row.dataset.key, row]));
  items.forEach((item, place) => {
    const key = keyOf(item);
    const row = known.get(key) || el("tr", { "data-key": key });
    known.delete(key);
    const values = cells(item);
    values.forEach((value, column) => fillCell(row, column, value));
    if (body.children[place] !== row) body.insertBefore(row, body.children[place] || null);
  });
  for (const row of known.values()) row.remove();
  const scroll = body.closest(".scroll");
  const overflows = scroll.scrollWidth > scroll.clientWidth + 1 || scroll.scrollHeight > scroll.clientHeight + 1;
  if (overflows) {
    scroll.setAttribute("tabindex", "0");
    scroll.setAttribute("role", "group");
    scroll.setAttribute("aria-label", "More of the table: scrolls");
  } else for (const attribute of ["tabindex", "role", "aria-label"]) scroll.removeAttribute(attribute);
}

function fillCell(row, column, value) {
  const cell = typeof value === "string" || value instanceof Node ? { value } : value;
  let element = row.children[column];
  if (!element) {
    element = el(cell.head ? "th" : "td", cell.head ? { scope: "row" } : {});
    row.append(element);
  }
  if (element.className !== (cell.class || "")) element.className = cell.class || "";
  if (typeof cell.value === "string") setText(element, cell.value);
  else if (element.firstChild === null || element.innerHTML !== cell.value.outerHTML) element.replaceChildren(cell.value);
}

const number = (text, more) => ({ value: text, class: "n" + (more ? " " + more : "") });
