// The timeline of one step: ranks as lanes, collectives as bars, phases beneath them.
// Knows one step at a time and nothing of where steps come from.

const AXIS = 22, BAR = 22, PHASE = 14, GAP = 8, COLOURS = 8;

class Timeline {
  constructor(onChoice) {
    this.box = $("timeline");
    this.canvas = $("canvas");
    this.pen = this.canvas.getContext("2d");
    this.onChoice = onChoice;
    this.colours = new Map(); // op -> number, in the order of appearance: stable while the page is open
    this.step = null;
    this.chosen = null;
    this.hovered = null;
    this.from = 0;
    this.to = 1;
    new ResizeObserver(() => this.draw()).observe(this.box);
    for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)"])
      matchMedia(query).addEventListener("change", () => this.draw());
    listenToKeys(this);
    listenToPointers(this);
  }

  colourOf(op) {
    if (!this.colours.has(op)) this.colours.set(op, this.colours.size % COLOURS);
    return this.colours.get(op);
  }

  // Shows a step (unpacked) or, with null, why there is none. Another step of the same kind keeps the zoom.
  show(step, reason) {
    const fresh = step && (!this.step || step.step !== this.step.step || step.trace_id !== this.step.trace_id);
    if (fresh) {
      const whole = !this.step || (this.from <= 0 && this.to >= this.step.duration_ns);
      if (whole || this.from >= step.duration_ns) [this.from, this.to] = [0, step.duration_ns];
      this.hovered = null;
      if (this.chosen) this.choose(null, false);
    }
    this.step = step;
    $("empty").hidden = step !== null;
    this.canvas.hidden = step === null;
    if (step === null) setText($("empty"), reason);
    else for (const lane of step.lanes) for (const bar of lane.bars) this.colourOf(bar.op);
    this.draw();
  }

  get gutter() { return this.box.clientWidth < 520 ? 26 : 56; }
  get room() { return this.box.clientWidth - this.gutter; }
  x(ns) { return this.gutter + ((ns - this.from) / (this.to - this.from)) * this.room; }
  at(x) { return this.from + ((x - this.gutter) / this.room) * (this.to - this.from); }

  lay() {
    const lanes = this.step.lanes;
    const tight = lanes.length > 16 ? 0.6 : 1;
    let top = AXIS;
    for (const lane of lanes) {
      lane.top = top;
      lane.barHeight = Math.round(BAR * tight * (1 + 0.5 * (lane.rows - 1)));
      lane.phaseHeight = lane.phases.length ? Math.round(PHASE * tight) * Math.min(lane.depth, 3) : 0;
      lane.height = lane.barHeight + lane.phaseHeight + 2;
      top += lane.height + Math.round(GAP * tight);
    }
    return top;
  }

  draw() {
    if (!this.step || !this.box.clientWidth) return;
    const height = this.lay(), width = this.box.clientWidth, ratio = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
      this.canvas.style.height = `${height}px`;
    }
    const style = getComputedStyle(document.documentElement);
    this.paint = new Proxy({}, { get: (_, key) => style.getPropertyValue(`--${String(key)}`).trim() });
    this.inks = [...Array(COLOURS).keys()].map((i) => this.paint[`op${i}`]);
    const { pen } = this;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    pen.direction = "ltr";
    this.drawAxis(height);
    let drawn = 0;
    for (const lane of this.step.lanes) drawn += this.drawLane(lane);
    this.drawChoice(height);
    Object.assign(this.box.dataset, {
      step: this.step.step, lanes: this.step.lanes.length, drawn,
      bars: this.step.lanes.reduce((sum, lane) => sum + lane.bars.length, 0),
      from: Math.round(this.from), to: Math.round(this.to),
    });
  }

  drawAxis(height) {
    const { pen, paint } = this;
    const rough = ((this.to - this.from) / this.room) * (this.room < 500 ? 60 : 90); // pixels from one to the next
    const power = 10 ** Math.floor(Math.log10(Math.max(1, rough)));
    const every = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough) || power * 10;
    pen.textAlign = "center";
    for (let ns = Math.ceil(this.from / every) * every; ns <= this.to; ns += every) {
      const x = Math.round(this.x(ns)) + 0.5;
      pen.fillStyle = paint.line;
      pen.fillRect(x, AXIS - 5, 1, height - AXIS);
      pen.fillStyle = paint.dim;
      if (x > this.gutter + 12 && x < this.gutter + this.room - 20) pen.fillText(axisLabel(ns, every, this.to), x, 8);
    }
  }

  drawLane(lane) {
    const { pen, paint } = this;
    const right = this.gutter + this.room;
    pen.fillStyle = lane.error ? paint.bad : paint.text;
    pen.textAlign = "left";
    const label = this.gutter < 40 ? `${lane.rank}` : `rank ${lane.rank}`;
    pen.fillText(label + (lane.error ? " !" : ""), 2, lane.top + lane.barHeight / 2);
    pen.save();
    pen.beginPath();
    pen.rect(this.gutter, 0, this.room, 1e6);
    pen.clip();
    const [begin, end] = [this.x(lane.begin_ns), this.x(lane.end_ns)];
    pen.fillStyle = paint.lane;
    pen.fillRect(begin, lane.top, Math.max(1, end - begin), lane.height);
    for (const phase of lane.phases) this.drawPhase(lane, phase, right);
    let drawn = 0;
    const mates = this.chosen && new Set(this.chosen.ofAll);
    for (const bar of lane.bars) {
      if (bar.end < this.from || bar.begin > this.to) continue;
      this.drawBar(lane, bar, mates && !mates.has(bar));
      drawn += 1;
    }
    pen.restore();
    return drawn;
  }

  drawPhase(lane, phase, right) {
    const [x, end] = [Math.max(this.gutter, this.x(phase.begin)), Math.min(right, this.x(phase.end))];
    if (end < this.gutter || x > right) return;
    const { pen, paint } = this;
    const each = lane.phaseHeight / Math.min(3, lane.depth);
    const y = lane.top + lane.barHeight + 2 + phase.row * each;
    pen.fillStyle = phase.number % 2 ? paint["phase-a"] : paint["phase-b"];
    pen.fillRect(x, y, Math.max(0.5, end - x - 0.5), each - 1);
    if (end - x > 34 && each > 9) this.write(phase.name, x + 3, y + each / 2, end - x - 6, phase.flags & (FAILED | OPEN) ? paint.bad : paint.text);
  }

  drawBar(lane, bar, dimmed) {
    const { pen } = this;
    const [x, end, y, height] = this.boxOf(lane, bar);
    const ink = this.inks[this.colourOf(bar.op)];
    const waited = Math.min(end, Math.max(x, this.x(bar.begin + Math.max(0, bar.wait))));
    const called = Math.min(end, this.x(bar.begin + bar.overlap));
    pen.globalAlpha = dimmed ? 0.45 : 1;
    pen.fillStyle = ink;
    if (waited - x >= 0.5) { // waiting for the last rank: hatched
      const alpha = pen.globalAlpha;
      pen.globalAlpha = alpha * 0.3;
      pen.fillRect(x, y, waited - x, height);
      pen.globalAlpha = alpha;
      if (waited - x > 5) this.hatch(Math.max(x, this.gutter), Math.min(waited, this.gutter + this.room), y, height, ink);
      pen.fillRect(x, y, Math.min(1, waited - x), height);
    }
    pen.fillRect(waited, y, Math.max(end - waited, waited - x < 0.5 ? 1 : 0.5), height);
    if (called - x > 1) { // before its wait was called the rank may have done something else: half as high
      pen.fillStyle = this.paint.lane;
      pen.fillRect(x, y, called - x, height / 2);
    }
    if (bar.flags & (FAILED | OPEN)) {
      pen.strokeStyle = this.paint.bad;
      pen.lineWidth = 2;
      pen.strokeRect(x + 1, y + 1, Math.max(1, end - x - 2), height - 2);
    }
    if (bar.flags & LAST && end - x > 2.5) this.markLast(x, y, Math.min(5, (end - x) / 2));
    const [left, right] = [Math.max(waited, this.gutter), Math.min(end, this.gutter + this.room)];
    if (right - left > 44 && height > 10 && called - x < 1) {
      pen.globalAlpha = 1; // what is written can be read, on a faint bar too
      this.write(bar.op, left + 7, y + height / 2 + 0.5, right - left - 9, dimmed ? this.paint.text : this.paint["on-bar"]);
    }
    pen.globalAlpha = 1;
  }

  boxOf(lane, bar) {
    const [x, end] = [this.x(bar.begin), this.x(bar.end)];
    const each = lane.barHeight / lane.rows;
    return [x, Math.max(end, x + 1), lane.top + bar.row * each, each - (lane.rows > 1 ? 1 : 0)];
  }

  hatch(x, end, y, height, ink) {
    const { pen } = this;
    pen.save();
    pen.beginPath();
    pen.rect(x, y, end - x, height);
    pen.clip();
    pen.strokeStyle = ink;
    pen.lineWidth = 1;
    pen.beginPath();
    for (let at = Math.floor(x / 5) * 5 - height; at < end; at += 5) {
      pen.moveTo(at, y + height);
      pen.lineTo(at + height, y);
    }
    pen.stroke();
    pen.restore();
  }

  markLast(x, y, half) {
    const { pen } = this;
    pen.fillStyle = this.paint.text;
    pen.beginPath();
    pen.moveTo(x - half, y - 3);
    pen.lineTo(x + half, y - 3);
    pen.lineTo(x, y + half);
    pen.fill();
  }

  write(text, x, y, room, ink) {
    const { pen } = this;
    const most = Math.floor(room / 5.2);
    if (most < 3) return;
    pen.save();
    pen.beginPath();
    pen.rect(x - 1, y - 10, room + 1, 20);
    pen.clip();
    pen.fillStyle = ink;
    pen.textAlign = "left";
    pen.fillText(isolated(shorten(text, most)), x, y);
    pen.restore();
  }

  drawChoice(height) {
    if (!this.chosen) return;
    const { pen, paint } = this;
    pen.save();
    pen.beginPath();
    pen.rect(this.gutter - 2, 0, this.room + 4, height);
    pen.clip();
    for (const bar of this.chosen.ofAll) {
      const [x, end, y, tall] = this.boxOf(this.step.lanes[bar.lane], bar);
      pen.strokeStyle = bar === this.chosen ? paint.focus : paint.text;
      pen.lineWidth = bar === this.chosen ? 2.5 : 1;
      pen.strokeRect(x - 1, y - 1, end - x + 2, tall + 2);
    }
    const last = this.chosen.ofAll.find((bar) => bar.flags & LAST);
    if (last) {
      pen.strokeStyle = paint.text;
      pen.lineWidth = 1;
      pen.setLineDash([3, 3]);
      pen.beginPath();
      pen.moveTo(this.x(last.begin), AXIS - 4);
      pen.lineTo(this.x(last.begin), height - GAP);
      pen.stroke();
    }
    pen.restore();
  }

  choose(bar, byUser = true) {
    this.chosen = bar;
    if (bar && byUser) this.reveal(bar);
    if (this.step) this.draw();
    this.onChoice(bar, byUser);
  }

  reveal(bar) {
    const span = this.to - this.from;
    if (bar.begin < this.from || bar.end > this.to) {
      const middle = (bar.begin + bar.end) / 2;
      this.look(bar.took > span ? bar.begin - span * 0.1 : middle - span / 2, span);
    }
  }

  look(from, span) {
    const all = this.step.duration_ns;
    span = Math.min(all, Math.max(Math.min(2000, all), span));
    this.from = Math.min(Math.max(0, from), all - span);
    this.to = this.from + span;
    this.draw();
  }

  // Zooms about a point of the screen, or about what is chosen or the middle.
  zoom(factor, x) {
    if (!this.step) return false;
    const span = this.to - this.from;
    const around = x !== undefined ? this.at(x)
      : this.chosen ? Math.min(this.to, Math.max(this.from, this.chosen.begin)) : (this.from + this.to) / 2;
    const before = [this.from, this.to].join();
    this.look(around - (around - this.from) * factor, span * factor);
    return [this.from, this.to].join() !== before;
  }

  move(part) { if (this.step) this.look(this.from + (this.to - this.from) * part, this.to - this.from); }

  whole() { if (this.step) this.look(0, this.step.duration_ns); }

  lane() { return this.chosen ? this.chosen.lane : Math.max(0, this.step.lanes.findIndex((lane) => lane.bars.length)); }

  pick(lane, place) {
    const bar = this.step.lanes[lane] && this.step.lanes[lane].bars[place];
    if (bar) this.choose(bar);
  }

  walk(by) {
    if (this.chosen) return this.pick(this.chosen.lane, this.chosen.place + by);
    const { bars } = this.step.lanes[this.lane()];
    const shown = bars.findIndex((bar) => bar.end >= this.from && bar.begin <= this.to);
    return this.pick(this.lane(), Math.max(0, shown));
  }

  // The same collective on the next rank that took part, or else what that rank did at the time.
  cross(by) {
    if (!this.chosen) return this.walk(1);
    for (let lane = this.chosen.lane + by; this.step.lanes[lane]; lane += by) {
      const mate = this.chosen.ofAll.find((bar) => bar.lane === lane) || nearest(this.step.lanes[lane].bars, this.chosen.begin);
      if (mate) return this.choose(mate);
    }
    return undefined;
  }

  find(event) {
    const place = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - place.left, event.clientY - place.top];
    const lane = this.step.lanes.find((one) => y >= one.top - 3 && y < one.top + one.height);
    if (!lane || x < this.gutter) return null;
    if (y >= lane.top + lane.barHeight + 1) {
      const ns = this.at(x);
      return lane.phases.filter((phase) => phase.begin <= ns && ns <= phase.end).pop() || null;
    }
    let best = null, gap = 5; // pixels: thin bars are hard to hit
    for (const bar of lane.bars) {
      const [from, to, top, height] = this.boxOf(lane, bar);
      const away = Math.max(from - x, x - to, lane.rows > 1 && (y < top || y > top + height) ? 6 : 0, 0);
      if (away < gap) [best, gap] = [bar, away];
    }
    return best;
  }

  hover(found) {
    if (found === this.hovered) return;
    this.hovered = found;
    this.onChoice(this.chosen, false);
  }
}

function nearest(bars, ns) {
  return bars.reduce((best, bar) => (!best || Math.abs(bar.begin - ns) < Math.abs(best.begin - ns) ? bar : best), null);
}

function axisLabel(ns, every, to) {
  const [unit, word] = to >= 1e9 ? [1e9, "s"] : to >= 1e6 ? [1e6, "ms"] : to >= 1e3 ? [1e3, "µs"] : [1, "ns"];
  return ns === 0 ? "0" : `${(ns / unit).toFixed(Math.max(0, Math.ceil(Math.log10(unit / every))))} ${word}`;
}
