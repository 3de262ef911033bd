// A step of /live.json as objects: its lanes, their bars and phases, and the collectives they make up.

const LAST = 1, FAILED = 2, UNWAITED = 4, OPEN = 8; // live_steps' flags

function unpack(step) {
  const { kinds, phase_names: phaseNames, lanes } = step.detail;
  const collectives = new Map();
  const unpacked = lanes.map((lane, laneNumber) => {
    const columns = lane.bars;
    let begin = 0, sequence = 0;
    const bars = columns.kind.map((kind, i) => {
      begin += columns.begin[i];
      sequence += columns.sequence[i];
      const [op, group, groupNumber, groupSize, dtype, size] = kinds[kind];
      const bar = {
        lane: laneNumber, place: i, rank: lane.rank, begin, end: begin + columns.took[i], took: columns.took[i],
        wait: columns.wait[i], overlap: columns.overlap ? columns.overlap[i] : 0, flags: columns.flags[i],
        op, group, groupSize, dtype, size, sequence, row: 0,
      };
      const key = bar.wait < 0 ? `${groupNumber} ${sequence} ${lane.rank} ${i}` : `${groupNumber} ${sequence}`;
      if (!collectives.has(key)) collectives.set(key, []);
      collectives.get(key).push(bar);
      bar.ofAll = collectives.get(key);
      return bar;
    });
    const phases = lane.phases.map(([number, start, took, flags]) =>
      ({ name: phaseNames[number], number, begin: start, end: start + took, flags }));
    return { ...lane, bars, phases, rows: stack(bars), depth: stack(phases) };
  });
  return { ...step, lanes: unpacked, collectives: [...collectives.values()], leftOut: step.detail.left_out };
}

// Gives each interval a row in which it overlaps nobody, at most three; returns how many.
function stack(intervals) {
  const ends = [];
  for (const one of intervals) {
    let row = ends.findIndex((end) => end <= one.begin);
    if (row < 0) row = ends.length < 3 ? ends.length : 2;
    ends[row] = Math.max(ends[row] || 0, one.end);
    one.row = row;
  }
  return Math.max(1, ends.length);
}
