"""What an all-reduce promises: the sum in rank order, bit for bit the same on every rank.

And that ranks which do not fit together are told so by name, on all of them.
"""

import contextlib
import gc
import hashlib
import os
import random
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from onecast.comm import (
    AllReduceTimeout,
    BrokenChannel,
    CannotShare,
    Closed,
    Mismatch,
    PeerLost,
    meeting,
    open_all_reduce,
    peers,
    shared_all_reduce,
)
from onecast.comm.shared_all_reduce import SUMMED
from onecast.comm.testing import run_ranks

Case = tuple[tuple[int, ...], str, int, bool]  # shape, dtype, seed, transposed

# Instead of a slice of a wait: who is not woken sleeps for good.
FOR_EVER_NS = 10**12
DTYPES = sorted(str(dtype).removeprefix("torch.") for dtype in SUMMED)
ODD = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 65504.0, 3.3e38)


def part(case: Case, rank: int) -> torch.Tensor:
    """What a rank brings: any bits of its dtype, or values with many odd ones among them."""
    shape, name, seed, transposed = case
    dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    shape = shape[::-1] if transposed else shape
    if dtype.is_floating_point:
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64) * 100
        odd = torch.tensor(ODD, dtype=torch.float64)
        which = torch.randint(0, 40, shape, generator=generator)
        tensor = torch.where(which < len(ODD), odd[which % len(ODD)], tensor).to(dtype)
    else:
        limits = torch.iinfo(dtype)
        tensor = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=dtype)
    return tensor.T if transposed else tensor


def in_rank_order(case: Case, size: int) -> torch.Tensor:
    total = part(case, 0).clone()
    for rank in range(1, size):
        total += part(case, rank)
    return total


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


def same_sum(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, but for those of a NaN."""
    left, right = left.clone(), right.clone()
    if left.is_floating_point():
        for one in (left, right):
            one[torch.isnan(one)] = float("nan")
    return left.shape == right.shape and bits(left) == bits(right)


def draw_cases(count: int) -> list[Case]:
    """Drawn once for all ranks: what hypothesis draws may differ among processes."""
    drawn: list[Case] = []
    small = st.lists(st.integers(0, 9), max_size=4).map(tuple)
    large = st.tuples(st.integers(1, 300), st.integers(100, 400))

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=count,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(small | large, st.sampled_from(DTYPES), st.integers(0, 10**6), st.booleans())
    def draw(shape: tuple[int, ...], dtype: str, seed: int, transposed: bool) -> None:
        drawn.append((shape, dtype, seed, transposed and len(shape) == 2))

    draw()
    return drawn


def reduce_cases(rank: int, cases: list[Case], by_shares: bool) -> str:
    """A digest of all the sums, of which none has gone through the group."""
    if by_shares:
        shared_all_reduce._SHARED_BYTES = 1000
    size = dist.get_world_size()
    digest = hashlib.blake2b()
    reducer: Any = open_all_reduce(transport="shared-memory")
    before = calls_of_group()
    for number, case in enumerate(cases):
        tensor = part(case, rank)
        if number % 3 == rank:
            tensor = tensor.contiguous()  # ranks need not agree about strides
        strides = tensor.stride()
        reducer.all_reduce(tensor)
        assert same_sum(tensor, in_rank_order(case, size)), case
        assert tensor.stride() == strides
        digest.update(bits(tensor))
    assert calls_of_group() == before
    reducer.close()
    return digest.hexdigest()


def calls_of_group() -> int:
    """How many collectives the default group has carried out, by its own count."""
    world = dist.group.WORLD
    assert world is not None
    return world._get_sequence_number_for_group()


@pytest.mark.parametrize(("ranks", "by_shares"), [(1, False), (2, False), (3, True), (4, False)])
def test_every_rank_gets_the_sum_in_rank_order_bit_for_bit(ranks: int, by_shares: bool) -> None:
    cases = draw_cases(120)
    assert {case[1] for case in cases} == set(DTYPES)
    assert len(set(run_ranks(reduce_cases, ranks, cases, by_shares))) == 1


def differ_from_gloo(rank: int, cases: list[Case]) -> list[Case]:
    reducer = open_all_reduce(transport="shared-memory")
    different = []
    for case in cases:
        ours, theirs = part(case, rank).contiguous(), part(case, rank).contiguous()
        reducer.all_reduce(ours)
        dist.all_reduce(theirs)
        if not same_sum(ours, theirs):
            different.append(case)
    reducer.close()
    return different


def test_two_ranks_get_the_bits_that_gloo_gives() -> None:
    assert run_ranks(differ_from_gloo, 2, draw_cases(80)) == [[], []]


def leave_to_the_group(rank: int) -> list[int]:
    """Whether each tensor took a collective of the group."""
    reducer = open_all_reduce(max_bytes=1000)
    assert reducer.name == "shared-memory"
    used = []
    original = dist.all_reduce
    for tensor in (
        torch.full((250,), rank, dtype=torch.float32),
        torch.full((251,), rank, dtype=torch.float32),
        torch.full((3,), rank, dtype=torch.complex64),
        torch.full((3,), rank).to_sparse(),
        torch.full((3,), rank),
    ):
        called: list[Any] = []

        def counted(*args: Any, called: list[Any] = called, **options: Any) -> Any:
            called.append(args)
            return original(*args, **options)

        dist.all_reduce = counted  # found through the module, by whoever watches it there
        reducer.all_reduce(tensor)
        used.append(len(called))
        assert tensor.to_dense().tolist() == [1] * tensor.numel()
    dist.all_reduce = original
    reducer.close()
    return used


def test_tensors_that_do_not_suit_go_through_the_group() -> None:
    assert run_ranks(leave_to_the_group, 2) == [[0, 1, 1, 1, 0]] * 2


def sum_in_every_mode(rank: int) -> None:
    reducer = open_all_reduce(transport="shared-memory")
    with torch.inference_mode():
        made_in = torch.full((5,), rank)
        reducer.all_reduce(made_in)
    assert made_in.tolist() == [1] * 5
    reducer.all_reduce(made_in)
    assert made_in.is_inference() and made_in.tolist() == [2] * 5
    leaf = torch.full((5,), float(rank), requires_grad=True)
    reducer.all_reduce(leaf)
    assert leaf.tolist() == [1] * 5 and leaf.requires_grad and leaf.is_leaf
    with torch.inference_mode():
        made_out = torch.tensor(7.0)
        reducer.all_reduce(made_out)
        assert made_out.item() == 14
    plain = torch.full((5,), rank)
    reducer.all_reduce(plain)
    assert plain.tolist() == [1] * 5
    reducer.close()


def test_tensors_of_inference_mode_and_with_gradients_are_summed_too() -> None:
    run_ranks(sum_in_every_mode, 2)


def bring_unlike_tensors(rank: int) -> list[str]:
    reducer = open_all_reduce(transport="shared-memory", max_bytes=1000)
    texts = []
    for mine in (
        (torch.zeros(4), torch.zeros(4), torch.zeros(5)),
        (torch.zeros(4), torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(4), torch.zeros(4), torch.zeros(4000)),
        (torch.zeros(8), torch.zeros(8), torch.zeros(4, dtype=torch.complex64)),
    ):
        before = mine[rank].clone()
        with pytest.raises(Mismatch) as caught:
            reducer.all_reduce(mine[rank])
        assert isinstance(caught.value, ValueError)
        assert torch.equal(mine[rank], before)
        texts.append(str(caught.value))
        tensor = torch.tensor([rank])
        reducer.all_reduce(tensor)  # all have raised: they are in step
        assert tensor.item() == 3
    reducer.close()
    return texts


def test_unlike_tensors_are_told_by_rank_on_all_ranks_and_the_next_sum_is_right() -> None:
    texts, *others = run_ranks(bring_unlike_tensors, 3)
    assert others == [texts, texts]
    same = "rank 0 brought 16 bytes of float32, rank 1 brought 16 bytes of float32, "
    assert [text.partition(": ")[2] for text in texts] == [
        same + "rank 2 brought 20 bytes of float32",
        same + "rank 2 brought 16 bytes of int32",
        same + "rank 2 brought 16,000 bytes of float32",
        same.replace("16", "32") + "rank 2 brought 32 bytes of complex64",
    ]
    assert all(re.match(r"all-reduce \d+ of group default_pg", text) for text in texts)


def wait_in_vain(rank: int) -> str:
    reducer = open_all_reduce(timeout_s=0.4 if rank == 0 else 60)
    reducer.all_reduce(torch.zeros(1))
    text = ""
    if rank == 0:
        with pytest.raises(AllReduceTimeout) as caught:
            reducer.all_reduce(torch.zeros(1))
        text = str(caught.value)
        with pytest.raises(BrokenChannel, match="AllReduceTimeout"):
            reducer.all_reduce(torch.zeros(1))
        reducer.close()
        dist.barrier()
        return text
    dist.barrier()
    with pytest.raises(PeerLost, match="rank 0 says so") as lost:
        for _ in range(2):  # rank 0 had come to the next one before it gave up
            reducer.all_reduce(torch.zeros(1))
    assert lost.value.rank == 0
    return text


def test_a_time_out_names_who_did_not_come_and_the_others_learn_who_gave_up() -> None:
    text = run_ranks(wait_in_vain, 2)[0]
    assert re.match(
        r"all-reduce 2 of group default_pg: waited 0\.\d s in vain at meeting 2: rank 1 has come "
        r"to 1, it last waited here \d+\.\d s ago, its process \d+ is \w+",
        text,
    ), text


def close_in_turn(rank: int) -> None:
    meeting._SLICE_NS = FOR_EVER_NS
    reducer = open_all_reduce(transport="shared-memory")
    tensor = torch.tensor([1])
    reducer.all_reduce(tensor)
    if rank == 1:
        time.sleep(0.3)  # the others are asleep by then
        reducer.close()
        reducer.close()
    else:
        with pytest.raises(Closed, match="rank 1 has closed after meeting 1"):
            reducer.all_reduce(tensor)
        reducer.close()
    with pytest.raises((Closed, BrokenChannel)):
        reducer.all_reduce(tensor)


def test_who_waits_for_a_rank_that_closes_is_told_so() -> None:
    run_ranks(close_in_turn, 3)


def drop(rank: int) -> None:
    reducer: Any = open_all_reduce(transport="shared-memory")
    if rank == 1:
        del reducer
        gc.collect()
    else:
        with pytest.raises(PeerLost) as lost:
            reducer.all_reduce(torch.zeros(1))
        assert lost.value.rank == 1


def test_who_waits_for_a_rank_that_dropped_its_end_is_told_so() -> None:
    run_ranks(drop, 2)


def use_several(rank: int) -> None:
    pair = dist.new_group([1, 2])
    world, again = (open_all_reduce(transport="shared-memory") for _ in range(2))
    inner = open_all_reduce(pair, transport="shared-memory") if rank else None
    chance = random.Random(1)
    for _ in range(300):
        which = chance.choice(("world", "again", "inner"))
        tensor = torch.full((chance.choice((1, 1000)),), 10**rank)
        if which == "inner":
            if inner is not None:
                inner.all_reduce(tensor)
                assert (tensor == 110).all()
            continue
        (world if which == "world" else again).all_reduce(tensor)
        assert (tensor == 111).all()
        if random.random() < 0.05:
            time.sleep(random.choice((0.0001, 0.001, 0.005)))
    for reducer in (world, again, inner):
        if reducer is not None:
            reducer.close()


def test_several_at_once_and_of_a_part_of_the_ranks_do_not_meet() -> None:
    run_ranks(use_several, 3)


def kept_memory() -> list[str]:
    """Descriptors and mappings of segments that this process has."""
    kept = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that reads the folder
            kept.append(os.readlink(f"/proc/self/fd/{fd}"))
    with open("/proc/self/maps") as file:
        kept += file.read().splitlines()
    return [one for one in kept if "memfd:onecast" in one]


def look_at_memory(rank: int) -> None:
    reducer = open_all_reduce(transport="shared-memory")
    reducer.all_reduce(torch.zeros(10))
    assert kept_memory()
    reducer.close()
    del reducer
    gc.collect()
    assert not kept_memory()


def test_the_memory_has_no_name_and_goes_with_its_users() -> None:
    run_ranks(look_at_memory, 2)


def open_apart(rank: int) -> None:
    peers._host_key = lambda: rank  # pretend
    assert open_all_reduce().name == "process-group"
    with pytest.raises(CannotShare, match="different hosts"):
        open_all_reduce(transport="shared-memory")
    reducer = open_all_reduce(transport="process-group")
    tensor = torch.tensor([rank])
    reducer.all_reduce(tensor)
    assert tensor.item() == 1
    reducer.close()


def test_ranks_that_cannot_share_go_through_the_group() -> None:
    run_ranks(open_apart, 2)


def disagree(rank: int) -> list[str]:
    texts = []
    for options in (
        {"transport": "telepathy"},
        {"timeout_s": 0},
        {"max_bytes": 0},
        {"spin": 2},
        {"max_bytes": 1.5},
        {"max_bytes": 1 << 70},
        {"max_bytes": 1000 + rank},
        {"transport": ("auto", "process-group")[rank]},
    ):
        with pytest.raises(ValueError) as caught:
            open_all_reduce(**options)
        texts.append(str(caught.value))
    return texts


def test_what_cannot_be_or_differs_is_refused_by_value() -> None:
    texts, others = run_ranks(disagree, 2)
    assert texts == others
    assert "'telepathy'" in texts[0] and "shared-memory" in texts[0]
    assert "timeout_s is 0" in texts[1] and "max_bytes is 0" in texts[2] and "spin is 2" in texts[3]
    assert "max_bytes is 1.5" in texts[4] and "max_bytes is 1180591620717411303424" in texts[5]
    assert texts[6] == "the ranks disagree about max_bytes: {0: 1000, 1: 1001}"
    assert "transport" in texts[7] and "{0: 0, 1: 2}" in texts[7]


def sum_with_gaps(rank: int) -> list[tuple[list[float], list[float]]]:
    sums = []
    for options in ({"max_bytes": 16}, {"transport": "process-group"}):
        reducer = open_all_reduce(**options)
        gaps = torch.arange(20, dtype=torch.float32)[::2]
        reducer.all_reduce(gaps)
        negated = torch._neg_view(torch.ones(10))
        reducer.all_reduce(negated)
        sums.append((gaps.tolist(), negated.tolist()))
        reducer.close()
    return sums


def test_views_with_gaps_are_summed_alike_by_the_group() -> None:
    expected = ([4.0 * number for number in range(10)], [-2.0] * 10)
    assert run_ranks(sum_with_gaps, 2) == [[expected, expected]] * 2


class Told:
    """A probe that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def begin(self, op: str, group: dist.ProcessGroup, nbytes: int, dtype: torch.dtype) -> int:
        assert group is dist.group.WORLD
        self.told.append((op, nbytes, dtype))
        return len(self.told)

    def end(self, ticket: int) -> None:
        self.told.append(ticket)

    def fail(self, ticket: int, error: BaseException) -> None:
        self.told.append((ticket, type(error).__name__))


class Failing(Told):
    def begin(self, *args: Any) -> int:
        super().begin(*args)
        raise RuntimeError("no more paper")


def tell(rank: int) -> tuple[list[Any], list[Any]]:
    probe, failing = Told(), Failing()
    reducer = open_all_reduce(probe=probe, max_bytes=100)
    reducer.all_reduce(torch.zeros(2, 3))
    reducer.all_reduce(torch.zeros(100))  # torch.distributed sees it
    with pytest.raises(Mismatch):
        reducer.all_reduce(torch.zeros(1 + rank, dtype=torch.int32))
    reducer.close()
    other = open_all_reduce(probe=failing)
    for _ in range(3):
        other.all_reduce(torch.zeros(1))
    other.close()
    return probe.told, failing.told


def test_a_probe_is_told_of_what_the_group_does_not_carry() -> None:
    for rank, (told, failing) in enumerate(run_ranks(tell, 2)):
        assert told == [
            ("all_reduce", 24, torch.float32),
            1,
            ("all_reduce", 4 * (1 + rank), torch.int32),
            (3, "Mismatch"),
        ]
        assert failing == [("all_reduce", 4, torch.float32)], "it failed, and is removed"


def wait_for_others(rank: int, pauses: list[float]) -> tuple[float, float]:
    """CPU seconds and seconds of a rank whose peer is late each time."""
    reducer = open_all_reduce(transport="shared-memory")
    tensor = torch.zeros(100)
    for _ in range(200):
        reducer.all_reduce(tensor)  # all of them short: it learns to spin
    cpu_begin, begin = time.process_time(), time.monotonic()
    for pause_s in pauses:
        if rank == 0:
            time.sleep(pause_s)
        reducer.all_reduce(tensor)
    used = time.process_time() - cpu_begin, time.monotonic() - begin
    reducer.close()
    return used


def test_a_rank_whose_peers_are_away_sleeps() -> None:
    _, (cpu_s, wall_s) = run_ranks(wait_for_others, 2, [0.5, 0.02, 0.3, 0.1, 0.2] * 2)
    assert wall_s > 2
    assert cpu_s < wall_s / 3


def stress(rank: int, seconds: float) -> int:
    """All-reduces with every kind of pause before and between them."""
    meeting._SLICE_NS = FOR_EVER_NS
    reducer = open_all_reduce(transport="shared-memory")
    size = dist.get_world_size()
    chance, own = random.Random(3), random.Random(rank)
    until = time.monotonic() + seconds
    number = 0
    go_on = torch.ones(1, dtype=torch.int64)
    while go_on.item() > 0:
        numel = chance.choice((1, 5, 300, 5000, 60_000))
        tensor = torch.full((numel,), number * size + rank, dtype=torch.int64)
        own_pause = own.random()
        if own_pause < 0.05:
            time.sleep(own.choice((0.0, 0.0001, 0.0005, 0.003)))
        reducer.all_reduce(tensor)
        expected = number * size * size + size * (size - 1) // 2
        assert bool((tensor == expected).all()), f"torn in {number}"
        number += 1
        if number % 50 == 0:
            go_on.fill_(int(rank == 0 and time.monotonic() < until))
            reducer.all_reduce(go_on)
    reducer.close()
    return number


def test_nothing_is_torn_or_lost_with_pauses_of_every_length() -> None:
    numbers = run_ranks(stress, 3, 1.5)
    assert len(set(numbers)) == 1 and numbers[0] >= 50


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_nothing_is_torn_or_lost_for_long(ranks: int) -> None:
    numbers = run_ranks(stress, ranks, 12.0)
    assert len(set(numbers)) == 1 and numbers[0] >= 50


def gather_cases(rank: int) -> list[int]:
    """What each case took of the group's collectives; all are as torch.distributed joins them."""
    ranks = dist.get_world_size()
    reducer = open_all_reduce(max_bytes=1000)
    used = []
    for shape, dtype in (
        ((3, 5), torch.float32),
        ((7,), torch.bfloat16),
        ((100, 24), torch.float64),  # in pieces of five rows
        ((2, 3, 4), torch.uint8),
        ((0, 5), torch.float32),
        ((3, 0), torch.float32),
        ((2, 251), torch.float32),  # a row is more than a slot
    ):
        generator = torch.Generator().manual_seed(rank)
        tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
        # Ranks need not agree about strides.
        given = tensor.mT.contiguous().mT if rank and tensor.ndim > 1 else tensor
        before = calls_of_group()
        joined = reducer.gather(given)
        used.append(calls_of_group() - before)
        parts = [torch.empty_like(tensor) for _ in range(ranks)]
        dist.all_gather(parts, tensor)
        if rank == 0:
            assert joined is not None and torch.equal(joined, torch.cat(parts, -1))
            assert joined.is_contiguous()
        else:
            assert joined is None
        total = torch.ones(3)
        reducer.all_reduce(total)  # slots go on taking turns
        assert total.tolist() == [ranks] * 3
    reducer.close()
    return used


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_first_rank_gets_what_all_brought_side_by_side(ranks: int) -> None:
    assert run_ranks(gather_cases, ranks) == [[0, 0, 0, 0, 0, 0, 1]] * ranks


def gather_again_and_again(rank: int) -> None:
    """A rank that is early must not overwrite what the first has yet to read."""
    reducer = open_all_reduce(max_bytes=4096)
    chance = random.Random(rank)
    for number in range(300):
        if chance.random() < 0.1:
            time.sleep(chance.random() / 1000)
        joined = reducer.gather(torch.full((20, 512), number * 10 + rank))
        if joined is not None:
            assert joined[:, :512].eq(number * 10).all()
            assert joined[:, 512:].eq(number * 10 + 1).all()
    reducer.close()


def test_what_is_gathered_is_whole_whoever_is_early() -> None:
    run_ranks(gather_again_and_again, 2)


def gather_unlike(rank: int) -> str:
    reducer = open_all_reduce()
    tensor = torch.zeros(2, 2)
    with pytest.raises(Mismatch) as caught:
        if rank:
            reducer.gather(tensor)
        else:
            reducer.all_reduce(tensor)
    joined = reducer.gather(torch.full((1,), rank))  # all have raised: they are in step
    assert joined is None if rank else joined.tolist() == [0, 1]
    with pytest.raises(ValueError, match="0 axes"):
        reducer.gather(torch.tensor(1.0))
    reducer.close()
    return str(caught.value)


def test_who_gathers_while_another_sums_is_told_so() -> None:
    texts = run_ranks(gather_unlike, 2)
    told = "rank 0 brought 16 bytes of float32, rank 1 brought 2 rows of 2 float32 to be gathered"
    assert [text.partition(": ")[2] for text in texts] == [told] * 2


def gather_other_shapes(rank: int) -> None:
    reducer = open_all_reduce(max_bytes=1000)
    # In one piece; in another number of pieces; one of them too long a row for shared memory.
    for shapes in (((2, 4), (4, 2)), ((5, 60), (60, 5)), ((1, 300), (300, 1))):
        with pytest.raises(Mismatch, match=r"rank 0 brought \d+ rows of \d+ float32 to be"):
            reducer.gather(torch.ones(shapes[rank]))
        total = torch.full((4,), 1.0 + rank)
        reducer.all_reduce(total)  # all have raised: they are in step
        assert total.tolist() == [3.0] * 4
    reducer.close()


def test_equal_bytes_of_another_shape_are_not_gathered() -> None:
    run_ranks(gather_other_shapes, 2)


def refuse_overlapping(rank: int, transport: str) -> None:
    reducer = open_all_reduce(transport=transport, max_bytes=1000)
    line = torch.arange(10.0)
    for overlapping in (
        line[:1].expand(5),
        line[:1].expand(5000),
        line.unfold(0, 3, 1),
        line.as_strided((3, 2), (2, 4)),
        torch.zeros(1, dtype=torch.complex64).expand(5),
    ):
        if rank == 0:  # alone: nobody is waited for
            with pytest.raises(ValueError, match="overlaps itself"):
                reducer.all_reduce(overlapping)
    assert line.tolist() == list(range(10))
    apart = line.as_strided((3, 2), (2, 3))  # its strides interleave, its elements lie apart
    reducer.all_reduce(apart)
    assert line.tolist() == [0, 1, 4, 6, 8, 10, 6, 14, 8, 9]
    reducer.close()


@pytest.mark.parametrize("transport", ["shared-memory", "process-group"])
def test_a_tensor_that_overlaps_itself_is_refused_before_anybody_is_waited_for(
    transport: str,
) -> None:
    run_ranks(refuse_overlapping, 2, transport)


def sum_int16(rank: int) -> list[str]:
    texts = []
    for transport in ("shared-memory", "process-group"):
        reducer = open_all_reduce(transport=transport, max_bytes=1000)
        for size in (3, 3000):
            with pytest.raises(RuntimeError) as caught:
                reducer.all_reduce(torch.ones(size, dtype=torch.int16))
            texts.append(str(caught.value).partition("\n")[0])
            with pytest.raises(RuntimeError):
                reducer.gather(torch.ones(size, dtype=torch.int16))
        reducer.close()
    return texts


def test_a_dtype_that_the_group_cannot_sum_is_refused_at_every_size_and_by_every_transport() -> (
    None
):
    for texts in run_ranks(sum_int16, 2):
        assert len(set(texts)) == 1, texts


def open_with_time_outs(rank: int) -> None:
    for timeout_s in (0, -1, float("nan"), float("inf"), 1e300, 10**400):
        with pytest.raises(ValueError, match="above 0 and at most 1,000,000,000"):
            open_all_reduce(timeout_s=timeout_s)
    open_all_reduce(timeout_s=10**9).close()


def test_a_time_out_that_no_clock_counts_to_is_refused_at_once() -> None:
    run_ranks(open_with_time_outs, 1)
