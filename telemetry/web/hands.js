// Keys and pointers on the timeline: which of them does what.

function listenToKeys(timeline) {
  timeline.box.addEventListener("keydown", (event) => {
    if (!timeline.step || event.ctrlKey || event.metaKey || event.altKey) return;
    const { lanes } = timeline.step;
    const done = {
      ArrowRight: () => timeline.walk(1), ArrowLeft: () => timeline.walk(-1),
      ArrowDown: () => timeline.cross(1), ArrowUp: () => timeline.cross(-1),
      Home: () => timeline.pick(timeline.lane(), 0), End: () => timeline.pick(timeline.lane(), lanes[timeline.lane()].bars.length - 1),
      "+": () => timeline.zoom(0.5), "=": () => timeline.zoom(0.5), "-": () => timeline.zoom(2), 0: () => timeline.whole(),
      PageDown: () => timeline.move(0.8), PageUp: () => timeline.move(-0.8),
      Escape: () => timeline.choose(null),
    }[event.key];
    if (!done) return;
    event.preventDefault();
    done();
  });
}

function listenToPointers(timeline) {
  const { canvas } = timeline;
  const fingers = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, event.clientX);
    moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!timeline.step) return;
    const before = fingers.get(event.pointerId);
    if (before === undefined) return timeline.hover(timeline.find(event));
    const others = [...fingers].filter(([id]) => id !== event.pointerId).map(([, x]) => x);
    const by = event.clientX - before;
    moved += Math.abs(by);
    if (moved > 4 && !canvas.hasPointerCapture(event.pointerId)) canvas.setPointerCapture(event.pointerId);
    if (others.length) {
      const left = canvas.getBoundingClientRect().left;
      const apart = Math.abs(event.clientX - others[0]), were = Math.abs(before - others[0]);
      if (apart > 8 && were > 8) timeline.zoom(were / apart, others[0] - left);
    } else if (moved > 4) timeline.move(-by / timeline.room);
    fingers.set(event.pointerId, event.clientX);
    return undefined;
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => {
      if (end === "pointerup" && moved <= 4 && fingers.size === 1 && timeline.step) {
        const found = timeline.find(event);
        timeline.choose(found && found.ofAll ? found : null);
      }
      fingers.delete(event.pointerId);
    });
  }
  canvas.addEventListener("pointerleave", () => timeline.hover(null));
  // A wheel alone scrolls the page, unless the timeline was entered: nobody shall be caught by it.
  canvas.addEventListener("wheel", (event) => {
    if (!timeline.step) return;
    const inside = document.activeElement === timeline.box;
    const x = event.clientX - canvas.getBoundingClientRect().left;
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey) {
      event.preventDefault();
      timeline.move((event.deltaX || event.deltaY) / timeline.room);
    } else if ((event.ctrlKey || event.metaKey || inside) && timeline.zoom(1.0015 ** event.deltaY, x)) event.preventDefault();
    else if (event.ctrlKey) event.preventDefault();
  }, { passive: false });
}
