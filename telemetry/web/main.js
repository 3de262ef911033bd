// Asks for /live.json about once a second and shows it; what is chosen stays until it is let go.

const POLL_MS = 1000, SLOWEST_MS = 4000, GONE_MS = 2500;
const history_ = new History();
const details = new Map(); // step -> as it came, with its detail: the page remembers what it has seen
let view = null, chosenStep = null, following = true, paused = false, failures = 0, timer = 0, asking = false, answered = Date.now();
const unpackedSteps = new WeakMap();
const timeline = new Timeline(onChoice);

async function poll() {
  clearTimeout(timer);
  if (paused || document.hidden || asking) return;
  asking = true;
  try {
    const answer = await fetch("live.json", { cache: "no-store", signal: AbortSignal.timeout(4000) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    take(await answer.json());
    failures = 0;
    answered = Date.now();
  } catch (error) {
    failures += 1;
    console.info(`live.json: ${error}`);
  } finally {
    asking = false;
    tell();
    timer = setTimeout(poll, Math.min(SLOWEST_MS, POLL_MS * 1.5 ** Math.max(0, failures - 2)));
  }
}

const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");

function tell() {
  const state = paused ? "paused" : failures && (!view || Date.now() - answered > GONE_MS) ? "gone" : view ? "live" : "connecting";
  document.body.dataset.state = state;
  setText($("status"), {
    paused: "Paused", live: "Live", connecting: "Connecting",
    gone: view ? "The sidecar does not answer: its run may have ended" : "The sidecar does not answer",
  }[state]);
  const shown = view ? clock(view.now_ms) : "";
  setText($("since"), !view ? "" : state === "live" ? `at ${shown}` : `shown: ${shown}`);
}

function take(fresh) {
  view = fresh;
  history_.add(view, performance.now());
  const listed = new Set();
  for (const step of view.kept) {
    listed.add(step.step);
    const known = details.get(step.step);
    if (step.detail && !(known && known.trace_id === step.trace_id)) details.set(step.step, step);
  }
  for (const step of details.keys()) if (!listed.has(step) && step !== chosenStep) details.delete(step);
  if (following && view.kept.length) chosenStep = view.kept[view.kept.length - 1].step;
  showAll();
}

function showAll() {
  const recent = document.querySelector("input[name=span]:checked").value === "recent";
  const idle = history_.base && !history_.busy;
  const base = recent && !idle ? history_.base : null;
  const steps = view.kept.map((step) => details.get(step.step)).filter(Boolean);
  setText($("engine"), `${isolated(shorten(view.engine_id, 80))} · ${plural(view.world_size, "rank")}`);
  setText($("span-note"), !recent ? "" : idle ? "(nothing happened in them: since the start)"
    : !base ? "(since the start, so far)" : history_.spanSeconds < 29 ? `(${Math.round(history_.spanSeconds)} s so far)` : "");
  showHangs();
  showSteps();
  showLatency(view, base);
  showStragglers(view, base, steps);
  showFigures(view, history_, base, showShare(steps));
  showInFlight(view);
  showHealth(view);
}

function showHangs() {
  const { hangs } = view;
  const title = hangs.some((hang) => hang.kind === "desync") ? "The ranks disagree" : "A collective hangs";
  $("hanging").hidden = !hangs.length;
  document.title = hangs.length ? "▲ hang: onecast live" : "onecast live";
  setText($("hanging-title"), title);
  hangs.forEach((hang, place) => {
    if (!$("hangs").children[place]) $("hangs").append(el("li"));
    setText($("hangs").children[place], visible(hang.text));
  });
  while ($("hangs").children.length > hangs.length) $("hangs").lastChild.remove();
  // Said aloud when there is another one, not whenever its age has changed.
  const which = JSON.stringify(hangs.map((hang) => [hang.kind, hang.op, hang.group, hang.sequence]).sort());
  if ($("alarm").dataset.which === which) return;
  $("alarm").dataset.which = which;
  setText($("alarm"), hangs.length ? `${title}: ${hangs.map((hang) => visible(hang.text)).join("; ")}` : "");
}

function showSteps() {
  const strip = $("strip");
  const longest = Math.max(1, ...view.kept.map((step) => step.duration_ns));
  const known = new Map([...strip.children].map((option) => [option.id, option]));
  view.kept.forEach((step, place) => {
    const id = `step-${step.step}`;
    const option = known.get(id) || el("div", { id, role: "option" }, el("i"));
    known.delete(id);
    const label = `Step ${step.step}, ${duration(step.duration_ns)}, kept ${REASONS[step.reason] || visible(step.reason)}`;
    if (option.getAttribute("aria-label") !== label) {
      option.setAttribute("aria-label", label);
      option.title = label;
      option.className = step.reason;
    }
    option.setAttribute("aria-selected", String(step.step === chosenStep));
    option.firstChild.style.height = `${(100 * step.duration_ns) / longest}%`;
    if (strip.children[place] !== option) strip.insertBefore(option, strip.children[place] || null);
  });
  for (const option of known.values()) option.remove();
  if (view.kept.some((step) => step.step === chosenStep)) strip.setAttribute("aria-activedescendant", `step-${chosenStep}`);
  else strip.removeAttribute("aria-activedescendant");
  $("follow").setAttribute("aria-pressed", String(following));
  showStep();
}

function showStep() {
  const listed = view.kept.find((step) => step.step === chosenStep);
  const step = details.get(chosenStep) || listed;
  if (!step) {
    timeline.show(null, view.ranks.length
      ? "No step is kept yet. Steps are kept as ONECAST_TRACE_ONE_IN says, and those that are slow, skewed or failed."
      : "No rank has appeared yet.");
    setText($("step-line"), "");
    return;
  }
  const trace = el("bdi", { title: "trace id" }, step.trace_id.slice(0, 8) + "…" + step.trace_id.slice(-4));
  $("step-line").replaceChildren(
    el("b", {}, `Step ${step.step}`), ` · ${duration(step.duration_ns)} · ${plural(step.ranks, "rank")} · ${plural(step.bars, "call")} of collectives`,
    step.batch ? ` · batch of ${step.batch}` : "", ` · kept ${REASONS[step.reason] || visible(step.reason)}`,
    step.error ? ` · error: ${isolated(step.error)}` : "", ` · ${clock(step.at_ms)} · trace `, trace, listed ? "" : " · no longer in the list",
  );
  if (!step.detail) return timeline.show(null, "Of this step only the outline is left: details are sent of the newest ones only.");
  if (!unpackedSteps.has(step)) unpackedSteps.set(step, unpack(step));
  const unpacked = unpackedSteps.get(step);
  timeline.show(unpacked, "");
  showLegend(unpacked);
  setText($("summary"), summary(unpacked));
  showTable(unpacked);
  return undefined;
}

function showLegend(step) {
  const ops = [...new Set(step.lanes.flatMap((lane) => lane.bars.map((one) => one.op)))];
  const wanted = JSON.stringify(ops);
  if ($("legend").dataset.shown === wanted) return;
  $("legend").dataset.shown = wanted;
  const swatch = (colour) => {
    const mark = el("i");
    mark.style.background = `var(--op${colour})`;
    return mark;
  };
  $("legend").replaceChildren(
    ...ops.slice(0, 12).map((op) => el("li", {}, swatch(timeline.colourOf(op)), name(op))),
    ...(ops.length > 12 ? [el("li", {}, `${ops.length - 12} more`)] : []),
    el("li", {}, el("i", { class: "waited" }), "waiting for the last rank"),
    el("li", {}, el("i", { class: "last" }), "came last"),
    el("li", {}, el("i", { class: "phase" }), "phase"),
  );
}

function worstOf(step) {
  let worst = null;
  for (const bars of step.collectives) for (const one of bars) if (one.wait > (worst ? worst.wait : 0)) worst = one;
  return worst;
}

function summary(step) {
  const worst = worstOf(step);
  const last = worst && worst.ofAll.find((one) => one.flags & LAST);
  return `Step ${step.step} took ${duration(step.duration_ns)} on ${plural(step.lanes.length, "rank")}, with ${plural(step.collectives.length, "collective")}. `
    + (worst ? `The longest wait was ${duration(worst.wait)}: rank ${worst.rank} in ${isolated(worst.op)} number ${worst.sequence} of ${isolated(worst.group)}`
      + (last ? `, for rank ${last.rank}. ` : ". ") : "")
    + "The same as a table stands below the timeline.";
}

// One collective in words, as pieces for textContent.
function describe(one) {
  const last = one.ofAll.find((bar) => bar.flags & LAST);
  const longest = Math.max(...one.ofAll.map((bar) => bar.wait));
  const first = one.ofAll.find((bar) => bar.wait === longest);
  const parts = [
    el("b", {}, name(one.op)), " · group ", name(one.group), one.groupSize ? ` of ${one.groupSize}` : "", ` · #${one.sequence} · ${bytes(one.size)} `,
    name(one.dtype), ` · rank ${one.rank} at ${duration(one.begin)}: `,
  ];
  if (one.flags & OPEN) parts.push(`in it for ${duration(one.took)}, never ended`);
  else if (one.wait < 0) parts.push(`took ${duration(one.took)}`);
  else parts.push(`waited ${duration(one.wait)}, transfer ${duration(Math.max(0, one.took - one.wait))}`);
  if (one.overlap) parts.push(`, its wait was called after ${duration(one.overlap)}`);
  if (one.flags & FAILED) parts.push(", failed");
  if (one.flags & UNWAITED) parts.push(", nobody waited for its end");
  if (last) parts.push(" · ", el("span", { class: "who" }, `rank ${last.rank} came last`), `, ${duration(longest)} after rank ${first.rank}`);
  else if (one.wait < 0) parts.push(" · when the others came is not known");
  return parts;
}

function onChoice(chosen, byUser) {
  const shown = timeline.hovered || chosen;
  const line = $("detail");
  if (!shown) line.replaceChildren(timeline.step && timeline.step.leftOut
    ? `${plural(timeline.step.leftOut, "shorter call")} left out. Choose a bar to see who waited for whom.`
    : "Choose a bar to see who waited for whom.");
  else if (shown.ofAll) line.replaceChildren(...describe(shown));
  else line.replaceChildren(el("b", {}, name(shown.name)), ` · phase · ${duration(shown.end - shown.begin)}, from ${duration(shown.begin)}`);
  if (!byUser) return;
  setText($("said"), chosen ? describe(chosen).map((part) => part.textContent ?? part).join("") : "Nothing chosen");
  if (chosen && following) hold();
}

function hold() {
  following = false;
  $("follow").setAttribute("aria-pressed", "false");
}

function showTable(step) {
  if (!$("as-table").open) return;
  const most = 400;
  const rows = step.collectives.map((bars) => ({
    bars, first: bars.reduce((a, b) => (b.begin < a.begin ? b : a)), last: bars.find((one) => one.flags & LAST),
    wait: Math.max(...bars.map((one) => one.wait)),
  })).sort((a, b) => a.first.begin - b.first.begin);
  setText($("table-caption"), `Step ${step.step}, ${duration(step.duration_ns)}: ${plural(rows.length, "collective")}`
    + (rows.length > most ? `, the first ${most} of them` : ""));
  fillRows($("table-rows"), rows.slice(0, most), ({ first }) => `${first.lane} ${first.place}`, ({ bars, first, last, wait }) => {
    const end = Math.max(...bars.map((one) => one.end));
    return [
      { value: duration(first.begin), head: true }, { value: name(first.op) }, { value: name(first.group) }, number(String(first.sequence)),
      number(bytes(first.size)), number(String(bars.length)), number(last ? `rank ${last.rank}` : "–"),
      number(last ? duration(wait) : "–"), number(duration(last ? Math.max(0, end - last.begin) : end - first.begin)),
    ];
  });
}

// Moves the choice among the kept steps; what is not listed any more is left at the older end.
function goTo(place) {
  if (!view || !view.kept.length) return;
  hold();
  chosenStep = view.kept[Math.min(view.kept.length - 1, Math.max(0, place))].step;
  showSteps();
}

const placeOf = () => view.kept.findIndex((step) => step.step === chosenStep);

$("strip").addEventListener("keydown", (event) => {
  if (!view || event.ctrlKey || event.metaKey || event.altKey) return;
  const to = {
    ArrowLeft: () => placeOf() - 1, ArrowRight: () => placeOf() + 1, PageUp: () => placeOf() - 10, PageDown: () => placeOf() + 10,
    Home: () => 0, End: () => view.kept.length - 1,
  }[event.key];
  if (!to) return;
  event.preventDefault();
  goTo(to());
});
$("strip").addEventListener("click", (event) => {
  const option = event.target.closest("[role=option]");
  if (option) goTo([...$("strip").children].indexOf(option));
});
$("timeline").addEventListener("keydown", (event) => {
  if (view && (event.key === "[" || event.key === "]")) {
    goTo(placeOf() + (event.key === "]" ? 1 : -1));
    setText($("said"), $("step-line").textContent);
  }
});
$("older").addEventListener("click", () => view && goTo(placeOf() - 1));
$("newer").addEventListener("click", () => view && goTo(placeOf() + 1));
$("zoom-in").addEventListener("click", () => timeline.zoom(0.5));
$("zoom-out").addEventListener("click", () => timeline.zoom(2));
$("whole").addEventListener("click", () => timeline.whole());
$("follow").addEventListener("click", () => {
  following = !following;
  if (view && following && view.kept.length) chosenStep = view.kept[view.kept.length - 1].step;
  if (view) showSteps();
  else $("follow").setAttribute("aria-pressed", String(following));
});
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  tell();
  poll();
});
$("as-table").addEventListener("toggle", () => timeline.step && showTable(timeline.step));
for (const radio of document.querySelectorAll("input[name=span]")) radio.addEventListener("change", () => view && showAll());
document.addEventListener("visibilitychange", poll);
poll();
