// The four kinds of plots: lines (stacked or not), heat maps, single figures and bars.
"use strict";

const PALETTE = [
  "#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#70dbed",
  "#fade2a", "#56a64b", "#c8f2c2", "#ff9830", "#a352cc", "#3274d9", "#e02f44", "#ffb357",
];
const NAMED = {
  green: "#73bf69", red: "#f2495c", orange: "#ff9830", blue: "#5794f2", purple: "#b877d9", yellow: "#fade2a",
  "light-purple": "#ca95e5", "light-blue": "#8ab8ff", "semi-dark-blue": "#3274d9",
};
const SCHEMES = {
  Turbo: ["#23171b", "#4a58dd", "#2f9df5", "#27d7c4", "#4df884", "#95fb51", "#dedd32", "#ffa423", "#f65f18", "#ba2208", "#900c00"],
  Viridis: ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"],
};
const GRID = { stroke: "rgba(204,204,220,0.08)", width: 1 };
const AXIS = { stroke: "rgba(204,204,220,0.7)", font: "11.5px Inter, DejaVu Sans", grid: GRID, ticks: GRID };

function colorOf(thresholds, value) {
  let color = "#73bf69";
  for (const step of thresholds?.steps ?? [])
    if (step.value == null || value >= step.value) color = NAMED[step.color] ?? step.color;
  return color;
}

const clock = (seconds) => new Date(seconds * 1000).toISOString().slice(11, 19);
const times = (u, splits) => splits.map(clock);
const axisSize = (u, labels) => 22 + 6.8 * Math.max(4, ...(labels ?? []).map((text) => String(text ?? "").length));
const powers = (low, high, base) => {
  const count = Math.round(Math.log(high / low) / Math.log(base)), every = Math.ceil((count + 1) / 7);
  return Array.from({ length: Math.floor(count / every) + 1 }, (_, i) => low * base ** (i * every));
};
const timeAxis = { ...AXIS, values: times, space: 62, size: 26 };

// Series on one common row of times: [times, values, values, ...], gaps are null.
function aligned(board, series) {
  const count = Math.round((board.to - board.from) / board.step) + 1;
  const all = Array.from({ length: count }, (_, i) => board.from + i * board.step);
  const columns = series.map((one) => {
    const column = new Array(count).fill(null);
    for (const [t, v] of one.values) column[Math.round((t - board.from) / board.step)] = v;
    return column;
  });
  return [all, ...columns];
}

// Grafana's thinning: in a column of time, from the highest on, those two deviations apart.
function thinned(exemplars, board) {
  const mean = exemplars.reduce((sum, [, v]) => sum + v, 0) / exemplars.length;
  const deviation = Math.sqrt(exemplars.reduce((sum, [, v]) => sum + (v - mean) ** 2, 0) / exemplars.length);
  const width = (board.to - board.from) / 90, kept = new Map();
  for (const [t, v] of [...exemplars].sort((a, b) => b[1] - a[1])) {
    const column = Math.floor((t - board.from) / width), before = kept.get(column);
    if (!before) kept.set(column, [[t, v]]);
    else if (before.at(-1)[1] - v > 2 * deviation) before.push([t, v]);
  }
  return [...kept.values()].flat();
}

function exemplarHook(exemplars) {
  return (u) => {
    u.ctx.save();
    u.ctx.beginPath();
    u.ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
    u.ctx.clip();
    u.ctx.fillStyle = "rgba(255, 120, 220, 0.85)";
    for (const [t, v] of exemplars) {
      const x = u.valToPos(t, "x", true), y = u.valToPos(v, "y", true), r = 3.2;
      u.ctx.beginPath();
      u.ctx.moveTo(x, y - r); u.ctx.lineTo(x + r, y); u.ctx.lineTo(x, y + r); u.ctx.lineTo(x - r, y);
      u.ctx.fill();
    }
    u.ctx.restore();
  };
}

function limitHook(steps) {
  return (u) => {
    u.ctx.save();
    u.ctx.setLineDash([8, 6]);
    for (const step of steps) {
      const y = u.valToPos(step.value, "y", true);
      if (!(y >= u.bbox.top && y <= u.bbox.top + u.bbox.height)) continue;
      u.ctx.strokeStyle = NAMED[step.color] ?? step.color;
      u.ctx.beginPath();
      u.ctx.moveTo(u.bbox.left, y);
      u.ctx.lineTo(u.bbox.left + u.bbox.width, y);
      u.ctx.stroke();
    }
    u.ctx.restore();
  };
}

function drawLines(into, board, panel, series, exemplars) {
  const { defaults } = panel.fieldConfig, custom = defaults.custom;
  const stacked = custom.stacking?.mode === "normal";
  const logarithmic = custom.scaleDistribution?.type === "log";
  const data = aligned(board, series);
  const bands = [];
  if (stacked) {
    const there = data[0].map((_, i) => data.slice(1).some((column) => column[i] != null));
    for (let s = 1; s < data.length; s++) {
      data[s] = data[s].map((v, i) => (there[i] ? (v ?? 0) + (s > 1 ? data[s - 1][i] : 0) : null));
      if (s > 1) bands.push({ series: [s, s - 1] });
    }
  }
  const alpha = Math.round(((custom.fillOpacity ?? 0) / 100) * 255).toString(16).padStart(2, "0");
  const hooks = [], colors = colorsOf(panel, series);
  if (exemplars.length) hooks.push(exemplarHook(exemplars));
  if (custom.thresholdsStyle) hooks.push(limitHook(defaults.thresholds.steps.filter((s) => s.value != null)));
  const finite = data.slice(1).flat().filter((v) => v != null && (!logarithmic || v > 0));
  const top = Math.max(...finite), bottom = Math.min(...finite);
  const points = exemplars.map(([, v]) => v).filter((v) => v > 0);
  const base = custom.scaleDistribution?.log, power = (round, v) => base ** round(Math.log(v) / Math.log(base));
  const range = logarithmic
    ? [power(Math.floor, Math.min(bottom, ...points)), power(Math.ceil, Math.max(top, ...points))]
    : [defaults.min ?? bottom, defaults.max ?? (top === 0 ? 1 : top * 1.08)];
  new uPlot(
    {
      width: into.clientWidth, height: into.clientHeight, legend: { show: false }, cursor: { show: false },
      padding: [8, 10, 0, 0], bands, hooks: { draw: hooks },
      scales: { x: { time: true }, y: logarithmic ? { distr: 3, log: base, range } : { range } },
      axes: [
        timeAxis,
        { ...AXIS, size: axisSize, space: 34, values: (u, splits) => splits.map((v) => written(v, defaults.unit)),
          ...(logarithmic ? { splits: (u, axis, low, high) => powers(low, high, base), filter: (u, splits) => splits } : {}) },
      ],
      series: [{}, ...series.map((_, i) => ({
        stroke: colors[i], width: 1.4, points: { show: false }, spanGaps: false,
        fill: alpha !== "00" ? colors[i] + alpha : undefined,
      }))],
    },
    data,
    into,
  );
}

// The palette in turns, but for names whose colour the panel fixes.
function colorsOf(panel, series) {
  const fixed = new Map(panel.fieldConfig.overrides.map((one) => [one.matcher.options, one.properties[0].value.fixedColor]));
  return series.map((one, i) => NAMED[fixed.get(one.name)] ?? PALETTE[i % PALETTE.length]);
}

// Rows of a cumulative histogram, the smallest bound first, as counts of each bucket.
function bucketRows(board, series) {
  const bound = (one) => (one.le === "+Inf" ? Infinity : Number(one.le));
  const sorted = [...series].sort((a, b) => bound(a) - bound(b));
  const [, ...cumulative] = aligned(board, sorted);
  const rows = sorted.map((one, r) => ({
    bound: bound(one),
    counts: cumulative[r].map((v, i) => (v == null ? 0 : Math.max(0, v - (r ? (cumulative[r - 1][i] ?? 0) : 0)))),
  }));
  const used = rows.map((row) => row.counts.some((v) => v > 1e-9));
  return rows.slice(Math.max(0, used.indexOf(true) - 1), used.lastIndexOf(true) + 2);
}

function schemeColor(scheme, share) {
  const stops = SCHEMES[scheme], at = Math.min(share, 0.9999) * (stops.length - 1), low = Math.floor(at);
  const channel = (text, i) => parseInt(text.slice(1 + 2 * i, 3 + 2 * i), 16);
  const mixed = [0, 1, 2].map((i) =>
    Math.round(channel(stops[low], i) + (at - low) * (channel(stops[low + 1], i) - channel(stops[low], i))));
  return `rgb(${mixed.join(",")})`;
}

function drawHeat(into, board, panel, series, exemplars) {
  const rows = bucketRows(board, series), unit = panel.options.yAxis.unit;
  const { scheme, exponent } = panel.options.color;
  const most = Math.max(...rows.flatMap((row) => row.counts));
  const all = aligned(board, [])[0];
  const cells = (u) => {
    const ratio = uPlot.pxRatio;
    rows.forEach((row, r) => {
      const top = u.valToPos(r + 1, "y", true), bottom = u.valToPos(r, "y", true);
      row.counts.forEach((count, i) => {
        if (count <= 1e-9) return;
        const left = u.valToPos(all[i] - board.step, "x", true), right = u.valToPos(all[i], "x", true);
        u.ctx.fillStyle = schemeColor(scheme, (count / most) ** exponent);
        u.ctx.fillRect(left, top, Math.max(1, right - left - 0.4 * ratio), bottom - top - ratio);
      });
    });
  };
  const place = (value) => {
    const r = rows.findIndex((row) => value <= row.bound);
    const low = r > 0 ? rows[r - 1].bound : 0, high = rows[r].bound;
    return r + (Number.isFinite(high) ? (value - low) / (high - low) : 0.5);
  };
  const points = exemplars.filter(([, v]) => rows.some((row) => v <= row.bound)).map(([t, v]) => [t, place(v)]);
  const every = Math.ceil(rows.length / 9);
  new uPlot(
    {
      width: into.clientWidth, height: into.clientHeight, legend: { show: false }, cursor: { show: false },
      padding: [8, 10, 0, 0], hooks: { drawAxes: [cells], draw: [exemplarHook(points)] },
      scales: { x: { time: true }, y: { range: [0, rows.length] } },
      axes: [timeAxis, {
        ...AXIS, size: axisSize, grid: { show: false }, splits: () => rows.map((_, r) => r + 1).filter((r) => r % every === 0),
        values: (u, splits) => splits.map((r) => (Number.isFinite(rows[r - 1].bound) ? written(rows[r - 1].bound, unit) : "inf")),
      }],
      series: [{}, { stroke: "transparent" }],
    },
    [all, all.map(() => null)],
    into,
  );
}

function drawFigure(into, board, panel, series) {
  const { defaults } = panel.fieldConfig;
  const values = (series[0]?.values ?? []).filter(([, v]) => v != null);
  const last = values.at(-1)?.[1] ?? null;
  const color = colorOf(defaults.thresholds, last);
  const [number, unit] = parts(last, defaults.unit, defaults.decimals);
  into.innerHTML = `<strong style="color:${color}">${number}<small>${unit}</small></strong>`;
  if (panel.options.graphMode !== "area" || values.length < 2) return;
  const most = Math.max(...values.map(([, v]) => v)) || 1;
  const span = board.to - board.from;
  const line = values.map(([t, v]) => `${((t - board.from) / span) * 100},${40 - (v / most) * 36}`);
  const first = line[0].split(",")[0], end = line.at(-1).split(",")[0];
  into.innerHTML += `<svg viewBox="0 0 100 40" preserveAspectRatio="none">
    <polygon points="${first},40 ${line.join(" ")} ${end},40" fill="${color}" opacity="0.16"/>
    <polyline points="${line.join(" ")}" fill="none" stroke="${color}" stroke-width="1.2" vector-effect="non-scaling-stroke"/></svg>`;
}

function drawBars(into, panel, series) {
  const { defaults } = panel.fieldConfig;
  const rows = series.map((one) => [one.name, one.values.at(-1)?.[1] ?? null]).filter(([, v]) => v != null);
  const most = defaults.max ?? Math.max(...rows.map(([, v]) => v));
  for (const [name, value] of rows) {
    const color = colorOf(defaults.thresholds, value), line = document.createElement("div");
    line.innerHTML = `<label></label><span class="track"><span class="fill" style="width:${(value / most) * 100}%;
      background:linear-gradient(90deg, ${color}44, ${color})"></span></span><output style="color:${color}">${written(value, defaults.unit)}</output>`;
    line.querySelector("label").textContent = name;
    into.append(line);
  }
}
