"""Shared memory for long, for ranks that are too many, and for two engines at once.

Every rank derives frame n from its number alone: the source to publish it, the readers to compare
every byte of what they got. The shapes repeat after a period, a multiple of the frames after which
a ring may shrink, so that all is in one state at the same point of each, and what grows is a leak.
"""

import gc
import itertools
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import completion, finish, generate_args, read_results, start, write_batch
from zygote import Zygote

from onecast.comm import ReceiveTimeout, open_channel
from onecast.comm.header import MAX_LAYOUTS
from onecast.comm.testing import run_ranks

DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.float64)
LARGE_MIB = (3, 0.7, 12, 5, 40, 2.5, 1)  # one burst a period, in turn; slots are 0.5 MiB else
NUM_TEMPLATES = 400


class Template:
    """The shape of a frame; its tensors are views of one buffer, filled with its number."""

    def __init__(self, words: "np.ndarray[Any, Any]", mapping: dict[str, Any], arrays: bool):
        self.words = words
        self.mapping = mapping
        self.arrays = arrays  # the source publishes numpy arrays

    def fill(self, number: int) -> dict[str, Any]:
        self.words.fill(number)
        if "number" in self.mapping:
            self.mapping["number"] = number
        return self.mapping


class Frames:
    """All frames of a soak, by number."""

    def __init__(self, seed: int, period: int) -> None:
        rng = random.Random(seed)
        small = np.zeros(8 << 10, np.int64)
        templates = [self._template(rng, small, index) for index in range(NUM_TEMPLATES)]
        # Like decode steps, shapes come in runs.
        runs = ([rng.choice(templates)] * int(rng.expovariate(0.1) + 1) for _ in itertools.count())
        self.period = period
        self.order = list(itertools.islice(itertools.chain.from_iterable(runs), period))
        large = np.ones(int(max(LARGE_MIB) * (1 << 17)), np.int64)  # zeros take no memory yet
        self.large = []
        for mib in LARGE_MIB:
            words = large[: int(mib * (1 << 17))]
            tensors = {"number": 0, "large": torch.from_numpy(words).view(torch.int32)}
            self.large.append(Template(words, tensors, arrays=False))

    def __getitem__(self, number: int) -> Template:
        turn, place = divmod(number, self.period)
        return self.order[place] if place else self.large[turn % len(self.large)]

    @staticmethod
    def _template(rng: random.Random, small: "np.ndarray[Any, Any]", index: int) -> Template:
        words = small[: rng.choice((8, 64, 512, len(small)))]
        whole = torch.from_numpy(words)
        tensors = []
        for _ in range(rng.choice((0, 1, 2, 4, 8))):
            flat = whole.view(rng.choice(DTYPES))
            rows, columns = rng.randrange(9), rng.randrange(1, 65)
            columns = min(columns, len(flat) // max(rows, 1))
            first = rng.randrange(0, len(flat) - rows * columns + 1) * flat.itemsize // 8 * 8
            part = flat[first // flat.itemsize :][: rows * columns]
            tensors.append(part.view(rows, columns) if rng.random() < 0.7 else part)
        if index == 0:
            return Template(words, {}, arrays=False)
        mapping: dict[str, Any] = {"number": 0, "text": "x" * rng.randrange(20)}
        mapping |= {f"t{place}": tensor for place, tensor in enumerate(tensors)}
        if index % 3 == 0:  # more layouts than both sides remember
            mapping[f"only here {index}"] = None
        if index % 7 == 0:
            mapping["nested"] = {"list": [1, *tensors[:1], {"deep": index}]}
        return Template(words, mapping, arrays=index % 5 == 1 and index % 7 != 0)


def as_arrays(mapping: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.numpy() if isinstance(value, torch.Tensor) else value
        for key, value in mapping.items()
    }


def same(got: Any, expected: Any) -> bool:
    """Equal in kind, order and every byte."""
    if isinstance(expected, torch.Tensor):
        return got.dtype == expected.dtype and torch.equal(got, expected)
    if isinstance(expected, dict):
        if list(got) != list(expected):
            return False
        return all([same(got[key], value) for key, value in expected.items()])
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(same, got, expected))
    return bool(got == expected)


# What of a Sample may be more at the end of a soak than after its first tenth.
SLACK = {
    "anonymous_kib": 4 << 10,
    "shared_kib": 1 << 10,
    "reserved_kib": 1 << 10,
    "mappings": 8,
    "descriptors": 0,
    "objects": 200,
    "blocks": 1500,
}


@dataclass
class Sample:
    """What a process holds at one moment."""

    anonymous_kib: int
    shared_kib: int
    reserved_kib: int  # of the segment
    mappings: int
    descriptors: int
    objects: int  # that the garbage collector knows
    blocks: int  # that Python has allocated

    @classmethod
    def take(cls, segment: Any) -> "Sample":
        gc.collect()
        with open("/proc/self/status") as file:
            status = dict(line.split(":", 1) for line in file)
        with open("/proc/self/maps") as file:
            mappings = sum(1 for _ in file)
        return cls(
            int(status["RssAnon"].split()[0]),
            int(status["RssShmem"].split()[0]),
            segment.reserved // 1024,
            mappings,
            len(os.listdir("/proc/self/fd")),
            len(gc.get_objects()),
            sys.getallocatedblocks(),
        )

    def leaks(self, since: "Sample") -> dict[str, tuple[int, int]]:
        before, now = asdict(since), asdict(self)
        return {
            name: (before[name], now[name])
            for name, slack in SLACK.items()
            if now[name] > before[name] + slack
        }


def soak(rank: int, seed: int, total: int, period: int) -> tuple[list[Sample], float]:
    frames = Frames(seed, period)
    rng = random.Random(seed * 31 + rank)
    channel: Any = open_channel(transport="shared-memory", timeout_s=60)
    end = channel._writer if channel.is_source else channel._reader
    go_through = publish_all if channel.is_source else receive_all
    samples = []
    gc.collect()
    gc.freeze()  # what torch consists of needs not be counted each time
    start_s = time.monotonic()
    for number in go_through(channel, frames, total, rng):
        if number % period == period // 2 and number * 10 >= total * (len(samples) + 1):
            samples.append(Sample.take(end._segment))
    seconds = time.monotonic() - start_s
    channel.close()
    return samples, seconds


def publish_all(channel: Any, frames: Frames, total: int, rng: random.Random) -> Iterator[int]:
    stalls = stall_points(rng)
    stall = next(stalls)
    for number in range(total):
        template = frames[number]
        mapping = template.fill(number)
        frame = channel.publish(as_arrays(mapping) if template.arrays else mapping)
        if number == stall:  # readers sleep meanwhile; and what was sent can be looked at
            time.sleep(rng.uniform(0, 0.004))
            assert same(frame.mapping, mapping)
            stall = next(stalls)
        yield number


def receive_all(channel: Any, frames: Frames, total: int, rng: random.Random) -> Iterator[int]:
    stalls = stall_points(rng)
    stall = next(stalls)
    for number in range(total):
        if number == stall and rng.random() < 0.5:
            frame = receive_impatiently(channel)
        else:
            frame = channel.receive()
        assert frame.sequence == number
        expected = frames[number].fill(number)
        assert same(frame.mapping, expected), (number, frame.mapping, expected)
        if number == stall:  # the ring fills up meanwhile
            time.sleep(0.1 if rng.random() < 0.02 else rng.uniform(0, 0.004))
            assert same(frame.mapping, expected), "changed before it was released"
            stall = next(stalls)
        if number % 2:
            frame.release()
        yield number


def receive_impatiently(channel: Any) -> Any:
    for _ in range(1_000_000):
        try:
            return channel.receive(timeout_s=0.0001)
        except ReceiveTimeout:
            pass
    raise AssertionError("nothing came")


def stall_points(rng: random.Random) -> Iterator[int]:
    number = 0
    while True:
        number += int(rng.expovariate(1 / 2000)) + 1
        yield number


def check_soak(world_size: int, total: int, period: int, timeout_s: float) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    results = run_ranks(soak, world_size, seed, total, period, timeout_s=timeout_s)
    for rank, (samples, seconds) in enumerate(results):
        print(f"rank {rank}: {total / seconds:,.0f} frames/s, {samples[0]} to {samples[-1]}")
        assert len(samples) >= 5
        # The first ones of a process may still meet a size for the first time.
        assert not samples[-1].leaks(samples[0]), (seed, rank, samples)


def test_thirty_thousand_frames_arrive_whole_and_in_order_and_leave_memory_flat():
    assert NUM_TEMPLATES // 3 > MAX_LAYOUTS
    check_soak(world_size=3, total=30_000, period=6 * 256, timeout_s=60)


@pytest.mark.slow
def test_a_million_frames_arrive_whole_and_in_order_and_leave_memory_flat():
    check_soak(world_size=3, total=1_000_000, period=80 * 256, timeout_s=500)


def take_turns(rank: int, core: int, spin: float) -> float:
    """Seconds for a thousand frames that all ranks get on one core."""
    os.sched_setaffinity(0, {core})
    channel: Any = open_channel(transport="shared-memory", timeout_s=30, spin=spin)
    start_s = time.monotonic()
    for number in range(1000):
        if channel.is_source:
            channel.publish({"number": number})
        else:
            assert channel.receive().mapping == {"number": number}
    channel.close()
    return time.monotonic() - start_s


def test_six_ranks_on_one_core_get_on_though_each_would_spin():
    core = max(os.sched_getaffinity(0))
    with Zygote() as zygote:
        for spin in (0, 0.1, 1):
            ends = zygote.start(take_turns, 6, core, spin).join(60)
            seconds = max(end.value for end in ends)
            print(f"spin {spin}: {1000 / seconds:,.0f} frames/s")
            assert seconds < 5


def test_two_engines_on_one_host_do_not_disturb_each_other():
    seeds = [random.randrange(1 << 32) for _ in range(2)]
    print("seeds", seeds)
    with Zygote() as zygote:
        worlds = [zygote.start(soak, 2, seed, 10_000, 4 * 256) for seed in seeds]
        for world in worlds:
            for rank, end in enumerate(world.join(60)):
                assert end.code == 0
                samples, seconds = end.value
                print(f"rank {rank}: {10_000 / seconds:,.0f} frames/s")
                assert not samples[-1].leaks(samples[0]), (seeds, rank, samples)


@pytest.mark.usefixtures("nothing_left_behind")
def test_two_runs_at_once_give_the_same_answers(tmp_path):
    prompts = ["And the king said", "In the beginning", "The third day", "A lamp"]
    lines = [completion(f"r{n}", prompts[n % 4], max_tokens=8 + n) for n in range(12)]
    batch = write_batch(tmp_path / "in.jsonl", lines)
    outputs = [tmp_path / f"out-{n}.jsonl" for n in range(2)]
    processes = [start(*generate_args(batch, one, "--channel=shared-memory")) for one in outputs]
    answers = []
    for process, output in zip(processes, outputs, strict=True):
        status, out, err = finish(process)
        assert status == 0, out + err
        bodies = {r["custom_id"]: r["response"]["body"] for r in read_results(output)}
        answers.append({name: body["choices"][0]["text"] for name, body in bodies.items()})
    assert len(answers[0]) == len(lines) and answers[0] == answers[1]
