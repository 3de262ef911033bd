"""How long a reader sleeps in the kernel, and how long it spins, for the next frame.

Owns the policy and nothing else: numbers in, numbers out. It makes no system call and reads no
clock, so a fake clock tests it, and it serves a futex as well as a process group.

A wake-up from the kernel costs a frame about 50 us on a virtual machine; spinning costs a core.
Frames come at a cadence, so a reader sleeps through most of the gap and spins around the moment
at which the next one is due:

    begin           wake                         stop
      |--- asleep ----|-late-|----- spinning -----|--- asleep until it comes --->
                                 ^ most frames

Short waits are another matter. By the ski-rental rule a wait that is likely to be short is spun
through for about what sleeping would cost, whatever the budget.
"""

from collections import deque

DEFAULT_SPIN = 0.1

# Two to three wake-ups at the 40-70 us measured on two and on four virtual cores: what spinning at
# once may take before sleeping would have been cheaper.
SHORT_NS = 150_000
# Nine frames of a new cadence are the majority of sixteen, and one odd gap weighs little. The next
# of sixteen alike is beyond their range once in eight or nine times.
_MEMORY = 16
_FEW = 3  # waits, before which nothing can be said
# What meeting one frame awake is worth in time on the core, for the whole of the knob: 1 ms at the
# default, twenty wake-ups. Wide jitter would else eat the budget for a hit now and then.
_PRICE_NS = 10_000_000
# A plan serves so many frames while they keep to it: making one takes 10 us, and, when caches have
# gone cold in the sleep before, 50 us.
_PLAN_FRAMES = 8
# The budget of this time can be saved up, so that one stray wait does not stop the next ones.
_SAVED_NS = 50_000_000
# Before the earliest arrival seen. At 10 us a steady source came too early for it once in 20 times.
_LEAD_NS = 30_000
_SLACK_NS = 50_000  # after the latest: spent only when the frame is late
# What a timed sleep overshoots until one was seen: Linux' timer slack and a wake-up.
_LATE_NS = 100_000
# What of a frame's time is the waking up of its reader. Left in, a frame met asleep would put the
# next plan later, and the next frame would be met asleep for that.
_WAKEUP_NS = 50_000
_BRIEF_NS = 20_000  # not worth a sleep
_FOREVER_NS = 1 << 62


class Cadence:
    """When the next frame is due, learnt from the last sixteen.

    `spin` is the share of a core that spinning around due moments may take, on average: 0 always
    sleeps, 1 always spins and never sleeps. Spinning at once for up to SHORT_NS, where most recent
    waits were that short, is not counted. All times are CLOCK_MONOTONIC in ns, and never go back.

    A wait:

        wake, stop = cadence.begin(now)
        while stop > now:
            if wake > now: sleep until wake or the frame; without a frame overslept(now - wake)
            spin until stop or the frame
            wake, stop = cadence.begin(now)     # unless the frame is here
        sleep until the frame
        cadence.arrived(now)

    `begin` without `arrived` since the last one goes on with the same wait: it gives the next
    moment worth spinning for (gaps of two kinds have two) and, when none is left, wake == stop ==
    now: sleep. The loop above ends after a few turns; a caller may also go to sleep after the
    first. A reader whose time ran out, and who comes again for the same frame, simply begins again.

    A frame that is there when the reader looks is not waited for: `arrived` without `begin`.
    """

    __slots__ = (
        "_asleep",
        "_before_ns",
        "_began_ns",
        "_begun",
        "_budget_ns",
        "_ended_ns",
        "_gaps",
        "_last_ns",
        "_late_ns",
        "_lates",
        "_margin_ns",
        "_mark_ns",
        "_met",
        "_paid_ns",
        "_plan",
        "_served",
        "_short",
        "_shorts",
        "_spin",
        "_stop_ns",
        "_unwaited",
        "_waiting",
        "_waits",
        "_wake_ns",
    )

    def __init__(self, spin: float = DEFAULT_SPIN) -> None:
        if not isinstance(spin, int | float) or not 0 <= spin <= 1:
            raise ValueError(f"spin is {spin!r}, it must be a share of a core, from 0 to 1")
        self._spin = spin
        self._waits: deque[int] = deque(maxlen=_MEMORY)  # from begin to arrival
        self._gaps: deque[int] = deque(maxlen=_MEMORY)  # from arrival to arrival
        self._lates: deque[int] = deque([_LATE_NS] * _MEMORY, maxlen=_MEMORY)
        self._short = False  # most of the recent waits were
        self._waiting = False
        self._begun = False  # a wait has begun that is not in `_waits`
        self._began_ns = self._ended_ns = 0  # of the last wait
        self._before_ns = self._last_ns = 0  # the last two arrivals
        self._mark_ns = -1  # the last arrival that is in `_gaps`
        self._shorts = self._unwaited = 0  # frames that are not in `_waits` and `_gaps`
        self._plan = (True, 0, 0)  # counted from begin, not from the last arrival; wake; stop
        self._served = 0  # frames by the plan
        self._met = False  # the last frame, while spinning by the plan
        self._wake_ns = self._stop_ns = 0  # the spinning that is not paid for
        self._asleep = False  # in a timed sleep before it, for all we know
        self._late_ns = 0  # how late that ended
        self._margin_ns = _LATE_NS  # how late it was expected to
        self._budget_ns = spin * _SAVED_NS
        self._paid_ns = -1

    def begin(self, now_ns: int) -> tuple[int, int]:
        """A wait begins: sleep until the first time, spin until the second, sleep until it comes.

        A first time that is not after `now_ns` means: spin at once.
        """
        if (
            self._short
            and not self._waiting
            and self._ended_ns - self._began_ns <= SHORT_NS  # else there is something to learn
        ):
            self._shorts += 1
            self._began_ns = now_ns
            self._waiting = True
            return now_ns, now_ns + SHORT_NS
        spin = self._spin
        if spin == 0:
            return now_ns, now_ns
        if spin == 1:
            return now_ns, now_ns + _FOREVER_NS
        self._pay(now_ns)
        if not self._waiting:
            self._learn()
            self._began_ns = now_ns
            self._waiting = self._begun = True
            if self._short or len(self._waits) < _FEW:
                return now_ns, now_ns + SHORT_NS
            if self._met and self._served < _PLAN_FRAMES:
                from_begin, wake_ns, stop_ns = self._plan
                base_ns = now_ns if from_begin else self._last_ns
                self._spin_between(now_ns, base_ns + wake_ns, base_ns + stop_ns)
                self._served += 1
            else:
                self._forecast(now_ns)
                self._served = 0
                if self._stop_ns == now_ns:
                    # No sleep will be timed: some that were very late must not decide for ever.
                    self._lates.append(_LATE_NS)
        else:
            self._forecast(now_ns)
            self._served = _PLAN_FRAMES  # the plan is for what is left of this wait only
        return self._wake_ns, self._stop_ns

    def arrived(self, now_ns: int) -> None:
        """The frame is here."""
        if self._waiting:
            self._waiting = False
            self._ended_ns = now_ns
        else:
            self._unwaited += 1
        self._before_ns = self._last_ns
        self._last_ns = now_ns

    def overslept(self, late_ns: int) -> None:
        """A timed sleep ended so much after its time."""
        self._asleep = False
        self._late_ns = late_ns
        self._lates.append(late_ns)

    def _pay(self, now_ns: int) -> None:
        """Takes what was spun since the last call from the budget, adds what was earned."""
        self._met = False
        if self._stop_ns > self._wake_ns:
            end_ns = now_ns if self._waiting else self._ended_ns
            if not self._asleep:
                start_ns = self._wake_ns + self._late_ns
                self._budget_ns -= max(min(end_ns, self._stop_ns) - start_ns, 0)
                self._met = start_ns <= end_ns <= self._stop_ns
            elif end_ns > self._wake_ns:
                # The frame came before the sleep had ended: how late that would have been is not
                # known, but leaving such sleeps out would make them seem better than they are.
                self._lates.append(max(end_ns - self._wake_ns, self._margin_ns))
        self._wake_ns = self._stop_ns = self._late_ns = 0
        if self._paid_ns >= 0:
            self._budget_ns += self._spin * (now_ns - self._paid_ns)
        self._budget_ns = min(self._budget_ns, self._spin * _SAVED_NS)
        self._paid_ns = now_ns

    def _learn(self) -> None:
        """Files what `arrived` and the short waits left behind."""
        waits, gaps = self._waits, self._gaps
        frames = self._shorts + self._unwaited + self._begun
        if not frames:
            return
        if self._unwaited:
            waits.extend([0] * min(self._unwaited, _MEMORY))
        if self._shorts:
            waits.extend([0] * min(self._shorts, _MEMORY))
        if self._begun:
            if not self._met and self._ended_ns - self._began_ns > SHORT_NS:
                self._ended_ns -= _WAKEUP_NS
                if not self._unwaited:
                    self._last_ns -= _WAKEUP_NS
            waits.append(self._ended_ns - self._began_ns)
        if frames > 1:
            if self._mark_ns >= 0:  # of the gaps before the last one only the sum is known
                mean_ns = (self._before_ns - self._mark_ns) // (frames - 1)
                gaps.extend([mean_ns] * min(frames - 1, _MEMORY))
            gaps.append(self._last_ns - self._before_ns)
        elif self._mark_ns >= 0:
            gaps.append(self._last_ns - self._mark_ns)
        self._mark_ns = self._last_ns
        self._shorts = self._unwaited = 0
        self._begun = False
        # With three in four the mean cost of spinning at once is that of sleeping at once.
        count = sum([wait_ns <= SHORT_NS for wait_ns in waits])
        self._short = len(waits) > _FEW and 4 * count >= 3 * len(waits)

    def _forecast(self, now_ns: int) -> None:
        """Plans when the frame is worth spinning for, if that is still ahead."""
        self._wake_ns = self._stop_ns = now_ns
        if self._budget_ns <= 0 or len(self._waits) < _FEW:
            return
        lates = sorted(self._lates)
        # Not higher up: a few sleeps in which the core was lent out must not decide for the others.
        late_ns = self._margin_ns = lates[len(lates) * 3 // 4]
        early_ns = _LEAD_NS + late_ns - lates[len(lates) // 2]  # spun before the first arrival
        most = 0.0
        # After a forward pass the wait is the more regular, in a reader that has nothing else to do
        # the gap. A steady beat as a third met fewer frames, even of a source that goes by a clock.
        for from_begin in (True, False):
            base_ns = self._began_ns if from_begin else self._last_ns
            ago_ns = now_ns - base_ns
            times = self._waits if from_begin else self._gaps
            due = sorted([time_ns - ago_ns for time_ns in times if time_ns > ago_ns])
            gain, first_ns, last_ns = _best(due, early_ns, self._spin * _PRICE_NS, self._budget_ns)
            if gain > most:
                most = gain
                wake_ns = now_ns + first_ns - _LEAD_NS - late_ns
                stop_ns = now_ns + last_ns + (last_ns - first_ns) // 4 + _SLACK_NS
                self._plan = from_begin, wake_ns - base_ns, stop_ns - base_ns
        if most:
            self._spin_between(now_ns, wake_ns, stop_ns)

    def _spin_between(self, now_ns: int, wake_ns: int, stop_ns: int) -> None:
        if wake_ns < now_ns + _BRIEF_NS:
            wake_ns = now_ns
        self._wake_ns = wake_ns
        self._asleep = wake_ns > now_ns
        self._stop_ns = max(min(stop_ns, wake_ns + int(self._budget_ns)), wake_ns)


def _best(due: list[int], early_ns: int, price_ns: float, most_ns: float) -> tuple[float, int, int]:
    """What to spin for next among arrivals due (sorted, times from now): gain, first and last.

    Of all stretches the one where `price_ns` a hit, less the time spun, is most; at least a quarter
    of `due` are hits, and the time spun is `most_ns` on average at most. If an earlier stretch is
    worth its price too, it is the next: this one's turn comes when that has passed in vain. The
    gain, 0 where nothing is worth its price, is that of all of them.
    """
    count = len(due)
    least = max(_FEW, -(-count // 4))
    sums = [0]
    for time_ns in due:
        sums.append(sums[-1] + time_ns)
    most_ns *= count
    best = 0.0, 0, 0
    end = count
    while end >= least:
        gained = 0.0
        for first in range(end - least + 1):
            if price_ns * (end - first) <= gained:
                break  # no later start has as many hits
            start_ns = max(due[first] - early_ns, 0)
            ahead_ns = sums[first] + (count - first) * start_ns
            for last in range(first + least - 1, end):
                # Hits spin until they come, later ones until the last hit.
                spun_ns = sums[last + 1] + (count - last - 1) * due[last] - ahead_ns
                if spun_ns > most_ns:
                    break
                gain = price_ns * (last + 1 - first) - spun_ns
                if gain > gained:
                    gained = gain
                    chosen = first, last
        if not gained:
            break
        best = best[0] + gained, due[chosen[0]], due[chosen[1]]
        end = chosen[0]
    return best
