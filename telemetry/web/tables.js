// The tables under the timeline, and the numbers of the last 30 seconds that most of them show.

const WINDOW_MS = 30_000;
const REASONS = {
  all: "as every step is", one_in_n: "as a sample", slow: "slower than 99% of those before", skew: "a rank came late",
  error: "it failed", hang: "it hung",
};

// Snapshots of what only ever grows. What happened in between is their difference.
class History {
  constructor() { this.kept = []; }

  add(view, now) {
    const latest = this.kept[this.kept.length - 1];
    const ended = view.steps.count + view.latency.reduce((sum, row) => sum + row.count, 0);
    if (latest && (latest.engine !== view.engine_id || latest.ended > ended)) this.kept = []; // another sidecar counts
    this.kept.push({
      now, engine: view.engine_id, steps: view.steps, ended,
      latency: new Map(view.latency.map((row) => [latencyKey(row), row])),
      stragglers: new Map(view.stragglers.map((row) => [row.rank, row])),
    });
    while (this.kept.length > 1 && now - this.kept[0].now > WINDOW_MS + 1500) this.kept.shift();
  }

  // What to subtract for the numbers of the last 30 s; null before there are two snapshots.
  get base() { return this.kept.length > 1 ? this.kept[0] : null; }
  // Whether anything ended since the base.
  get busy() {
    return this.kept[this.kept.length - 1].ended > this.kept[0].ended;
  }

  get spanSeconds() {
    return this.kept.length > 1 ? (this.kept[this.kept.length - 1].now - this.kept[0].now) / 1000 : 0;
  }
}

const latencyKey = (row) => JSON.stringify([row.op, row.group, row.size, row.clock]);

// [first bucket, counts...] minus the same of earlier.
function bucketsSince(now, before) {
  const counts = now.slice(1);
  if (before) before.slice(1).forEach((count, i) => { counts[i + before[0] - now[0]] -= count; });
  return [now[0], ...counts];
}

const edge = (bucket) => Math.floor(125 * 2 ** (bucket / 16)); // histograms.DURATIONS, in ns
const total = (hist) => hist.slice(1).reduce((sum, count) => sum + count, 0);

// As histograms.merged_quantile: the middle of the bucket in which it lies, in ns.
function quantile(hist, fraction) {
  let left = Math.max(1, Math.ceil(fraction * total(hist)));
  for (let i = 1; i < hist.length; i += 1) {
    left -= hist[i];
    const bucket = hist[0] + i - 1;
    if (left <= 0) return Math.sqrt(edge(Math.max(0, bucket - 1)) * edge(bucket));
  }
  return null;
}

function distribution(hist, p50, p99) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const add = (tag, attributes) => {
    const shape = document.createElementNS(svg.namespaceURI, tag);
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
    svg.append(shape);
  };
  for (const [key, value] of [["class", "hist"], ["viewBox", "0 0 150 18"], ["preserveAspectRatio", "none"], ["aria-hidden", "true"]]) svg.setAttribute(key, value);
  const scale = (ns) => Math.min(150, Math.max(0, (Math.log2(ns / 1000) / 18) * 150)); // 1 µs to 262 ms
  const most = Math.max(1, ...hist.slice(1));
  const path = hist.slice(1).map((count, i) => {
    if (count <= 0) return "";
    const [from, to] = [scale(edge(Math.max(0, hist[0] + i - 1))), scale(edge(hist[0] + i))];
    const tall = 1 + 16 * Math.sqrt(count / most);
    return `M${from.toFixed(1)} 18V${(18 - tall).toFixed(1)}H${Math.max(to, from + 0.6).toFixed(1)}V18z`;
  });
  add("path", { d: path.join("") });
  for (const at of [p50, p99]) if (at) add("line", { x1: scale(at).toFixed(1), x2: scale(at).toFixed(1), y1: 0, y2: 18 });
  return svg;
}

function note(section, text) {
  const element = section.querySelector(".note");
  element.hidden = !text;
  setText(element, text || "");
}

function showLatency(view, base) {
  const section = $("latency");
  fillRows(section.querySelector("tbody"), view.latency, latencyKey, (row) => {
    const before = base && base.latency.get(latencyKey(row));
    let [count, p50, p99] = [row.count, row.p50_s && row.p50_s * 1e9, row.p99_s && row.p99_s * 1e9];
    let [bus, transfer] = [row.bus_bytes, row.transfer_s];
    let hist = row.hist;
    if (base && hist) {
      hist = bucketsSince(hist, before && before.hist);
      count -= before ? before.count : 0;
      bus -= before ? before.bus_bytes : 0;
      transfer -= before ? before.transfer_s : 0;
      [p50, p99] = [quantile(hist, 0.5), quantile(hist, 0.99)];
    }
    const faint = count ? "" : "faint";
    const op = el("span", {}, name(row.op), row.clock === "device" ? " (device)" : "");
    return [
      { value: op, head: true, class: faint }, { value: name(row.group), class: faint }, number(sizeClass(row.size), faint),
      number(whole(count), faint), number(duration(p50), faint), number(duration(p99), faint),
      number(transfer > 0 && bus > 0 ? rate(bus / transfer) : "–", "extra " + faint),
      { value: hist ? distribution(hist, p50, p99) : "", class: "extra" },
    ];
  });
  note(section, !view.latency.length ? "No collective has ended yet."
    : view.latency_left_out ? `${plural(view.latency_left_out, "row")} that took less time left out.` : "");
}

function showStragglers(view, base, steps) {
  const section = $("stragglers");
  const rows = view.stragglers.map((row) => {
    const before = (base && base.stragglers.get(row.rank)) || { joined: 0, last: 0, waited_s: 0 };
    return { rank: row.rank, joined: row.joined - before.joined, last: row.last - before.last, waited: row.waited_s - before.waited_s };
  });
  const all = rows.reduce((sum, row) => sum + row.last, 0);
  const worst = rows.reduce((best, row) => (best && best.last >= row.last ? best : row), null);
  fillRows(section.querySelector("tbody"), rows, (row) => row.rank, (row) => {
    const part = row.last / all;
    const late = row === worst && all >= 20 && part > 1.5 / rows.length;
    let [times, lost] = [0, 0];
    for (const step of steps) {
      for (const lane of step.detail.lanes) if (lane.rank === row.rank) [times, lost] = [times + lane.caused[0], lost + lane.caused[1]];
    }
    return [
      { value: String(row.rank), head: true, class: "n" },
      { value: el("span", { class: "meter" }, bar(part || 0)), class: late ? "worst" : "" },
      number(`${late ? "▲ " : ""}${whole(row.last)} (${percent(part)})`, late ? "late" : ""),
      number(times ? duration(lost / times) : "–"),
      number(row.joined ? seconds(row.waited / row.joined) : "–"),
    ];
  });
  const apart = view.health.unjoined.reduce((sum, one) => sum + one.count, 0);
  note(section, rows.length ? "Times are means for one collective; how long the first one waited for this rank is of the kept steps shown." + (apart ? ` ${plural(apart, "collective")} could not be joined.` : "")
    : "Nothing joined yet: it takes a collective of two ranks of this host.");
}

function bar(part, more) {
  const element = el("i", more || {});
  element.style.width = `${(part * 100).toFixed(2)}%`;
  return element;
}

// Returns the mean share of the broadcast, for the figures at the top.
function showShare(steps) {
  const section = $("share");
  const sums = new Map();
  for (const step of steps) {
    for (const lane of step.detail.lanes) {
      const sum = sums.get(lane.rank) || [0, 0, 0, 0, 0];
      sums.set(lane.rank, sum.map((ns, i) => ns + lane.share[i]));
    }
  }
  const rows = [...sums].sort((a, b) => a[0] - b[0]).map(([rank, sum]) => {
    const all = sum.reduce((a, b) => a + b, 0);
    return { rank, parts: sum.map((ns) => (all ? ns / all : 0)) };
  });
  fillRows(section.querySelector("tbody"), rows, (row) => row.rank, (row) => [
    { value: String(row.rank), head: true, class: "n" },
    { value: el("span", { class: "stack", "aria-hidden": "true" }, ...row.parts.map((part, i) => bar(part, { class: `s${i}` }))), class: "part" },
    ...row.parts.map((part) => number(percent(part))),
  ]);
  note(section, rows.length ? `Means of ${plural(steps.length, "kept step")}.` : "No step with its detail yet.");
  return rows.length ? rows.reduce((sum, row) => sum + row.parts[0], 0) / rows.length : NaN;
}

function showInFlight(view) {
  const section = $("in-flight");
  const rows = view.ranks.flatMap((rank) => {
    const mine = view.in_flight.filter((one) => one.rank === rank.rank);
    return (mine.length ? mine : [null]).map((collective, place) => ({ ...rank, collective, place }));
  });
  fillRows(section.querySelector("tbody"), rows, (row) => `${row.rank} ${row.place}`, ({ rank, up, step, phase, collective }) => {
    const what = collective && el("span", {}, name(collective.op), ` #${collective.sequence} (`, name(collective.group), ")");
    return [
      { value: String(rank), head: true, class: "n" }, number(step < 0 ? "–" : String(step)),
      up ? { value: phase === null ? "–" : name(phase) } : { value: "has ended", class: "dead" },
      what ? { value: what } : { value: "–", class: "faint" },
      number(collective ? bytes(collective.bytes) : ""),
      number(collective ? seconds(collective.age_s) : "", collective && collective.age_s > 1 ? "late" : ""),
    ];
  });
  note(section, view.ranks.length ? "" : "No rank has appeared yet.");
}

function showHealth(view) {
  const { dropped, restarts, unrecorded, errors } = view.health;
  const lines = [];
  for (const one of dropped) lines.push(["bad", `${whole(one.count)} ${one.signal} dropped: ${one.reason}`]);
  if (!dropped.length) lines.push(["good", "No record, step or span was dropped."]);
  for (const one of unrecorded) lines.push(["bad", `rank ${one.rank}, group ${isolated(one.group)}: ${plural(one.count, "collective")} not recorded`]);
  if (!unrecorded.length) lines.push(["good", "Every collective that the groups counted was recorded."]);
  for (const one of errors) lines.push(["bad", `rank ${one.rank}: ${isolated(one.op)} in ${isolated(one.group)} raised ${isolated(one.type)}, ${plural(one.count, "time")}`]);
  if (!errors.length) lines.push(["good", "No collective failed."]);
  lines.push(restarts ? ["bad", `The sidecar was started again ${plural(restarts, "time")}.`] : ["good", "The sidecar has run since the start."]);
  const list = $("health-list");
  const wanted = JSON.stringify(lines);
  if (list.dataset.shown === wanted) return;
  list.dataset.shown = wanted;
  list.replaceChildren(...lines.map(([kind, text]) => el("li", { class: kind }, text)));
}

function showFigures(view, history, base, broadcast) {
  const { steps } = view;
  const hist = base ? bucketsSince(steps.hist, base.steps.hist) : steps.hist;
  const inSteps = steps.seconds - (base ? base.steps.seconds : 0);
  const exposed = steps.exposed_s - (base ? base.steps.exposed_s : 0);
  const up = view.ranks.filter((rank) => rank.up).length;
  const lost = view.health.dropped.reduce((sum, one) => sum + one.count, 0);
  const rate = history.base ? (steps.count - history.base.steps.count) / history.spanSeconds : null;
  const figures = [
    ["steps", whole(steps.count), rate === null ? "" : `${significant(rate)}/s`],
    ["step p50", duration(quantile(hist, 0.5)), ""],
    ["step p99", duration(quantile(hist, 0.99)), ""],
    ["exposed communication", percent(exposed / inSteps), "of the step"],
    ["broadcast", percent(broadcast), "of the step"],
    ["ranks up", `${up}`, `of ${view.local_world_size}` + (view.world_size > view.local_world_size ? ` here, ${view.world_size} in all` : ""),
      up < view.local_world_size],
    ["dropped", whole(lost), "", lost > 0],
  ];
  const list = $("figures");
  figures.forEach(([term, value, small, bad], i) => {
    if (!list.children[i]) list.append(el("div", {}, el("dt", {}, term), el("dd", {}, el("span"), " ", el("small"))));
    const [text, , more] = list.children[i].children[1].childNodes;
    setText(text, value);
    setText(more, small);
    list.children[i].children[1].className = bad ? "bad" : "";
  });
}
