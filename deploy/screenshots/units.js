// Numbers as Grafana writes them: three digits, and the unit that fits.
"use strict";

const SECONDS = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]];

function digits(value, decimals) {
  if (value === 0) return "0";
  const wanted = decimals ?? Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  const text = value.toFixed(Math.min(wanted, 6));
  return decimals == null && text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function scaled(value, base, names) {
  let power = 0;
  while (Math.abs(value) >= base && power < names.length - 1) {
    value /= base;
    power += 1;
  }
  return [value, names[power]];
}

// [number, unit] of a value in one of Grafana's units.
function parts(value, unit, decimals = null) {
  if (value == null) return ["-", ""];
  if (unit === "s") {
    if (value === 0) return ["0", "s"];
    if (Math.abs(value) >= 120) return [digits(value / 60, decimals), "min"];
    const found = SECONDS.find(([least]) => Math.abs(value) >= least * 0.9995) ?? SECONDS[3];
    return [digits(value / found[0], decimals), found[1]];
  }
  if (unit === "percentunit") return [digits(value * 100, decimals), "%"];
  if (unit === "bytes") {
    const [number, name] = scaled(value, 1024, ["B", "KiB", "MiB", "GiB"]);
    return [digits(number, decimals), name];
  }
  if (unit === "Bps") {
    const [number, name] = scaled(value, 1000, ["B/s", "kB/s", "MB/s", "GB/s"]);
    return [digits(number, decimals), name];
  }
  const [number, thousands] = scaled(value, 1000, ["", "K", "Mil"]);
  const named = { reqps: "req/s", ops: "ops/s" }[unit];
  const suffix = unit.startsWith("suffix:") ? unit.slice(7).trim() : named;
  return [digits(number, thousands ? null : decimals), `${thousands} ${suffix ?? ""}`.trim()];
}

function written(value, unit, decimals = null) {
  const [number, name] = parts(value, unit, decimals);
  return name === "%" ? number + name : `${number} ${name}`.trim();
}
