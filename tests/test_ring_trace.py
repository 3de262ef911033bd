"""The code of the ring makes the accesses of its model, in the same order.

The real writer and reader run one after the other in one process, on a real segment, and write down
what they do to shared memory, as on a weakly ordered CPU. The model's segments do the same with the
answers that the code got. What other processes do not see, and signs of life, are left out; so are
repetitions, as of a load while spinning.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ring_model import LEFT, RingModel, World
from weak_machine import End, Fence, Gone, Load, Sleep, Use

from onecast.comm import Closed, PeerLost
from onecast.comm.frame_ring import (
    BASE,
    BEAT,
    BLAMED,
    LOST,
    PUBLISHED,
    SLEEPERS,
    SLOTS,
    TAKEN,
    WRITER_BEAT,
    WRITER_WAITS,
    reader_line,
    table_entry,
)
from onecast.comm.peers import Peers
from onecast.comm.ring_reader import RingReader
from onecast.comm.ring_writer import FIRST_SLOT_BYTES, RingWriter, make_ring_segment

Log = list[str]
NAMES = {
    PUBLISHED: "published",
    WRITER_WAITS: "writer waits",
    LOST: "lost",
    SLEEPERS: "sleeper 0",
    reader_line(0) + TAKEN: "taken 0",
    **{table_entry(n) + BASE: f"base in line {n}" for n in range(4)},
    **{
        table_entry(n) + word: f"ring in line {n}" for n in range(4) for word in range(1, SLOTS + 1)
    },
}
SIGNS_OF_LIFE = (WRITER_BEAT, reader_line(0) + BEAT, reader_line(0) + BLAMED)


class Recorder:
    """Stands for a process's view of the words, its fence and its futexes."""

    def __init__(self, words: Any, names: dict[int, str]) -> None:
        self.log: Log = []
        self.words = words
        self.names = names

    def __getitem__(self, word: int) -> int:
        self.log.append(f"load {self.names[word]}")
        return cast(int, self.words[word])

    def __setitem__(self, word: int, value: int) -> None:
        if word not in SIGNS_OF_LIFE:
            self.log.append(f"store {self.names[word]}")
        self.words[word] = value

    def fence(self) -> None:
        self.log.append("fence")

    def futex(self, name: str, while_asleep: Callable[[], object]) -> SimpleNamespace:
        def wait(expected: int, timeout_ns: int) -> None:
            self.log.append(f"sleep {name}")
            while_asleep()

        return SimpleNamespace(wait=wait, wake=lambda: self.log.append(f"wake {name}"))


class Pair:
    """A writer and its only reader, both recorded."""

    def __init__(self) -> None:
        segment = make_ring_segment(1)
        self.writer = RingWriter(segment, [1], self._peers(0), 5.0)
        self.reader = RingReader(segment, [1], 0, self._peers(1), 0.0)
        self.while_writer_sleeps: Callable[[], object] = lambda: None
        self.while_reader_sleeps: Callable[[], object] = lambda: None
        writer, reader = cast(Any, self.writer), cast(Any, self.reader)
        self.words = writer._words
        self.writes = Recorder(writer._words, NAMES)
        self.reads = Recorder(reader._words, NAMES)
        sleeper = Recorder(reader._control.bytes, {SLEEPERS * 8: "sleeper 0"})
        sleeper.log = self.reads.log
        for process, recorder in ((writer, self.writes), (reader, self.reads)):
            process._words, process._fence, process._weak = recorder, recorder.fence, True
        writer._takens = [self.writes.futex("taken 0", lambda: self.while_writer_sleeps())]
        writer._control = SimpleNamespace(
            published=self.writes.futex("published", lambda: None), takens=writer._control.takens
        )
        reader._control = SimpleNamespace(
            published=self.reads.futex("published", lambda: self.while_reader_sleeps()),
            bytes=sleeper,
        )
        reader._wakes_writer = self.reads.futex("taken 0", lambda: None)

    def _peers(self, own_rank: int) -> Peers:
        """Nobody is ever gone."""
        own = SimpleNamespace(rank=own_rank)
        return cast(Peers, SimpleNamespace(own=own, neighbours=[own], gone=lambda: None))

    def publish(self, nbytes: int = 100) -> Log:
        """What the writer does for one frame."""
        self.writes.log.clear()
        self.writer.reserve(nbytes)
        self.writes.log.append("store the frame")
        self.writer.publish()
        return squeezed(self.writes.log)

    def receive(self) -> Log:
        """What the reader does for one frame."""
        self.reads.log.clear()
        self.reader.next(5.0)
        self.reads.log.append("load the frame")
        self.reader.release()
        return squeezed(self.reads.log)


def squeezed(log: Log) -> Log:
    """Without repetitions."""
    return [entry for entry, before in zip(log, ["", *log], strict=False) if entry != before]


def modelled(segment: tuple[Any, ...], last: str, answers: dict[str, list[int]]) -> Log:
    """What the model does from a segment on to the end of segment `last`.

    `answers`: what the loads of a word find, one after the other; the last one again and again.
    """
    model = segment[0].__self__
    names, log = model.words.names, []
    while True:
        function, *arguments = segment
        running = function(*arguments)
        answer: Any = None
        try:
            while True:
                action = running.send(answer)
                answer = "woken" if isinstance(action, Sleep) else None
                if isinstance(action, Fence):
                    log.append("fence")
                elif not isinstance(action, Gone):
                    name = names[action.word]
                    frame = "slot" in name
                    kind = "load" if isinstance(action, Use) else type(action).__name__.lower()
                    log.append(f"{kind} {'the frame' if frame else name}")
                    if isinstance(action, Load):
                        found = answers[name]
                        answer = found.pop(0) if len(found) > 1 else found[0]
        except StopIteration as stop:
            if isinstance(stop.value, End) or function.__name__ == last:
                return squeezed(log)
            segment = stop.value


@pytest.fixture
def pair() -> Pair:
    return Pair()


MODEL = RingModel(World(readers=1, slots=(4, 4, 4), frames=9))
IDLE, ASLEEP = {"sleeper 0": [0]}, {"sleeper 0": [1]}


def test_to_publish_where_there_is_room(pair: Pair) -> None:
    pair.publish()
    expected = modelled((MODEL.publish, 1, (0,), 0, 4), "publish", IDLE)
    assert pair.publish() == expected
    assert expected == [
        "store the frame",
        "fence",
        "store published",
        "fence",
        "load sleeper 0",
    ]


def test_to_publish_for_a_sleeper(pair: Pair) -> None:
    pair.publish()
    cast(Any, pair.reader)._control.bytes.words[SLEEPERS * 8] = 1
    expected = modelled((MODEL.publish, 1, (0,), 0, 4), "publish", ASLEEP)
    assert pair.publish() == expected
    assert expected[-1] == "wake published"


def test_to_wait_for_room(pair: Pair) -> None:
    for _ in range(4):
        pair.publish()
    pair.while_writer_sleeps = pair.receive
    expected = modelled((MODEL.make_room, 4, (0,), 0), "publish", {"taken 0": [0, 0, 1], **IDLE})
    assert pair.publish() == expected
    assert expected[:6] == [
        "load taken 0",
        "store writer waits",
        "fence",
        "load taken 0",
        "sleep taken 0",
        "store writer waits",
    ]
    assert "wake taken 0" in pair.reads.log, "the reader saw that the writer waits"


def test_to_go_on_in_larger_slots(pair: Pair) -> None:
    pair.publish()
    pair.receive()
    expected = modelled((MODEL.write_line, 1, (0,), 0, 0), "publish", {"taken 0": [1], **IDLE})
    # The model erases the old ring by stores, the code by a system call.
    assert pair.publish(FIRST_SLOT_BYTES + 1) == expected
    assert expected[:3] == ["store base in line 2", "store ring in line 1", "store base in line 1"]
    followed = modelled(
        (MODEL.next, 0, 1, 0, 0, 0),
        "hold",
        {
            "published": [4],
            "base in line 1": [1],
            "ring in line 1": [1],
            "base in line 2": [LEFT],
            "writer waits": [0],
        },
    )
    assert pair.receive() == followed
    assert "load ring in line 1" in followed


def test_to_wait_for_a_frame(pair: Pair) -> None:
    pair.publish()
    pair.receive()
    pair.while_reader_sleeps = pair.publish
    expected = modelled(
        (MODEL.next, 0, 1, 0, 0, 0),
        "hold",
        {"published": [2, 2, 4], "base in line 1": [LEFT], "writer waits": [0]},
    )
    assert pair.receive() == expected
    assert expected == [
        "load published",
        "store sleeper 0",
        "fence",
        "load published",
        "sleep published",
        "store sleeper 0",
        "load published",
        "fence",
        "load base in line 1",
        "load the frame",
        "fence",
        "store taken 0",
        "fence",
        "load writer waits",
    ]
    assert "wake published" in pair.writes.log, "the writer saw that the reader sleeps"


def test_to_leave(pair: Pair) -> None:
    pair.words[WRITER_WAITS] = 1
    pair.reader.leave()
    assert pair.reads.log == modelled((MODEL.leave, 0), "leave", {"writer waits": [1]})


def test_to_close_and_to_find_it_closed(pair: Pair) -> None:
    pair.writer.close()
    assert pair.writes.log == modelled((MODEL.close, 0, End("")), "close", IDLE)
    with pytest.raises(Closed):
        pair.reader.next(5.0)
    answers = {"published": [1], "lost": [0]}
    assert squeezed(pair.reads.log) == modelled((MODEL.next, 0, 0, -1, 0, 0), "finish", answers)


def test_to_give_up_and_to_find_out_why(pair: Pair) -> None:
    pair.writer.abandon(7)
    assert pair.writes.log == modelled((MODEL.abandon, 0, 7), "close", IDLE)
    with pytest.raises(PeerLost) as caught:
        pair.reader.next(5.0)
    assert caught.value.rank == 7
    answers = {"published": [1], "lost": [8]}
    assert squeezed(pair.reads.log) == modelled((MODEL.next, 0, 0, -1, 0, 0), "finish", answers)
