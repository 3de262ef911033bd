"""The model says what transformers says: any family, any tensor-parallel size, any schedule."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_checkpoints import VARIANTS, make_checkpoint, make_variant

from onecast.comm.testing import run_ranks
from onecast.runtime.attention import group_by_length
from onecast.runtime.kv_cache import KVCache
from onecast.runtime.model_runner import ModelRunner, load_model

BLOCK_SIZE = 8
NUM_GENERATED = 12
PROMPT_LENGTHS = (1, 3, 8, 40, 41, 150)
# Decoding 450 cached tokens next to 10 of 20 pads enough to split the batch into groups.
UNEVEN_LENGTHS = (450, *(20 + i for i in range(10)))


def prompts_of(lengths: Iterable[int], vocab_size: int = 259) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


# ---- a scheduler of a few lines


@dataclass
class Player:
    """Drives a model with every prompt at once, blocks scattered over the pool.

    Plays the scheduler's part: decodes first, then as many prompt tokens as `budget` leaves.
    On several ranks each plays the same game; rank 0 tells the others the tokens.
    """

    model: ModelRunner
    prompts: list[list[int]]
    budget: int
    device: str = "cpu"
    tp: int = 1
    tokens: list[list[int]] = field(default_factory=list)
    logits: list[list[torch.Tensor]] = field(default_factory=list)  # per sequence, per new token
    steps: int = 0

    def play(self, num_generated: int) -> "Player":
        self.tokens = [list(prompt) for prompt in self.prompts]
        self.logits = [[] for _ in self.prompts]
        widths = [-(-(len(p) + num_generated) // BLOCK_SIZE) for p in self.prompts]
        scattered = list(range(1, sum(widths) + 1))
        random.Random(3).shuffle(scattered)
        self.tables = [[scattered.pop() for _ in range(width)] for width in widths]
        self.cache = KVCache(
            self.model.cache_spec,
            num_blocks=sum(widths) + 1,
            num_host_blocks=0,
            block_size=BLOCK_SIZE,
            device=self.device,
        )
        self.cache.device_pool.fill_(3.0)  # what must not be seen is there to be seen
        computed = [0] * len(self.prompts)
        while work := self._plan(computed, num_generated):
            self._step(work, computed)
        return self

    def _plan(self, computed: list[int], num_generated: int) -> list[tuple[int, int]]:
        """(sequence, new tokens), those that decode first."""
        left = self.budget
        decodes, chunks = [], []
        for i, tokens in enumerate(self.tokens):
            missing = len(tokens) - computed[i]
            if len(tokens) - len(self.prompts[i]) == num_generated:
                continue
            if missing == 1 and computed[i]:
                decodes.append((i, 1))
                left -= 1
        for i, tokens in enumerate(self.tokens):
            missing = len(tokens) - computed[i]
            if left > 0 and missing and (missing > 1 or not computed[i]):
                new = min(missing, left)
                chunks.append((i, new))
                left -= new
        return decodes + chunks

    def _step(self, work: list[tuple[int, int]], computed: list[int]) -> None:
        inputs: dict[str, list[Any]] = {"input_ids": [], "positions": [], "slot_mapping": []}
        starts, lengths, rows, sampling = [0], [], [], []
        for i, new in work:
            for position in range(computed[i], computed[i] + new):
                block = self.tables[i][position // BLOCK_SIZE]
                inputs["input_ids"].append(self.tokens[i][position])
                inputs["positions"].append(position)
                inputs["slot_mapping"].append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            computed[i] += new
            starts.append(starts[-1] + new)
            lengths.append(computed[i])
            if computed[i] == len(self.tokens[i]):
                rows.append(starts[-1] - 1)
                sampling.append(i)
        used = [self.tables[i][: -(-computed[i] // BLOCK_SIZE)] for i, _ in work]
        width = max(map(len, used))
        tensors = {key: torch.tensor(values) for key, values in inputs.items()}
        tensors["query_start_loc"] = torch.tensor(starts, dtype=torch.int32)
        tensors["seq_lens"] = torch.tensor(lengths, dtype=torch.int32)
        tensors["block_tables"] = torch.tensor(
            [table + [0] * (width - len(table)) for table in used], dtype=torch.int32
        )
        tensors["logits_indices"] = torch.tensor(rows, dtype=torch.int64)
        logits = self.model.forward(tensors, self.cache)
        self.steps += 1
        chosen = torch.zeros(len(rows), dtype=torch.int64)
        if logits is not None:
            assert logits.dtype == torch.float32
            logits = logits.cpu()
            chosen = logits.argmax(-1)
            for row, i in enumerate(sampling):
                self.logits[i].append(logits[row].clone())
        if self.tp > 1 and len(rows):
            dist.broadcast(chosen, 0)
        for i, token in zip(sampling, chosen.tolist(), strict=True):
            self.tokens[i].append(token)


SCHEDULES = {"whole": 10_000, "chunked": 24}


@dataclass
class Played:
    """What a player saw: tokens with prompts, and logits `[generated, vocab]` per sequence."""

    tokens: list[list[int]]
    logits: list[np.ndarray[Any, Any]]

    @classmethod
    def of(cls, player: Player) -> "Played":
        return cls(player.tokens, [torch.stack(rows).numpy() for rows in player.logits])


def assert_equals_transformers(
    directory: Path, played: Played, num_generated: int = NUM_GENERATED
) -> None:
    """Greedy tokens exactly, logits within float32's rounding.

    Transformers reads prompt and generated tokens in one forward pass; that each of these is its
    most likely one, given those before, is what equal greedy texts are.
    """
    for tokens, logits, reference in zip(
        played.tokens, played.logits, references(directory, played.tokens), strict=True
    ):
        ours, theirs = tokens[-num_generated:], reference[-num_generated - 1 : -1]
        assert theirs.argmax(-1).tolist() == ours
        np.testing.assert_allclose(logits, theirs.numpy(), atol=5e-5, rtol=0)


def references(
    directory: Path, sequences: list[list[int]], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.inference_mode():
        return [model(torch.tensor([tokens])).logits[0].float() for tokens in sequences]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {variant: make_variant(root / variant, variant) for variant in VARIANTS}


# ---- one rank


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_rank_generates_what_transformers_generates(
    checkpoints: dict[str, Path], variant: str, schedule: str
) -> None:
    model = load_model(checkpoints[variant], group=None, device="cpu")
    player = Player(model, prompts_of(PROMPT_LENGTHS), SCHEDULES[schedule]).play(NUM_GENERATED)
    assert_equals_transformers(checkpoints[variant], Played.of(player))


@pytest.mark.parametrize("variant", ["llama", "mistral-windowed"])
def test_decoding_sequences_of_very_different_lengths_keep_their_order(
    checkpoints: dict[str, Path], variant: str
) -> None:
    assert len(group_by_length(np.array(sorted(UNEVEN_LENGTHS, reverse=True)))) == 3
    for lengths in (UNEVEN_LENGTHS, tuple(reversed(UNEVEN_LENGTHS))):
        model = load_model(checkpoints[variant], group=None, device="cpu")
        player = Player(model, prompts_of(lengths), 64).play(NUM_GENERATED)
        assert_equals_transformers(checkpoints[variant], Played.of(player))


def test_groups_cover_all_sequences_and_never_pad_more_than_one_group_would() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = np.sort(rng.integers(1, 10 ** int(rng.integers(1, 5)), rng.integers(1, 80)))[::-1]
        bounds = group_by_length(lengths)
        assert bounds[0] == 0 and bounds[-1] == len(lengths)
        assert bounds == sorted(set(bounds))
        padded = sum((stop - start) * lengths[start] for start, stop in pairwise(bounds))
        assert padded + 1024 * (len(bounds) - 2) <= len(lengths) * lengths[0]
    assert group_by_length(np.array([100] * 64)) == [0, 64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["llama", "mistral-windowed", "qwen2", "qwen3"])
def test_half_precision_is_as_close_to_float32_as_transformers_is(
    tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    directory = make_variant(tmp_path, variant, dtype=dtype)
    prompts = prompts_of((5, 40, 100))
    model = load_model(directory, group=None, device="cpu", dtype=dtype)
    assert model.cache_spec.dtype == dtype
    played = Played.of(Player(model, prompts, 24).play(NUM_GENERATED))
    exact = references(directory, played.tokens)
    rounded = references(directory, played.tokens, dtype)
    generated = slice(-NUM_GENERATED - 1, -1)
    ours = [(torch.from_numpy(a) - b[generated]).abs() for a, b in zip(played.logits, exact)]  # noqa: B905
    theirs = [(a[generated] - b[generated]).abs() for a, b in zip(rounded, exact)]  # noqa: B905
    our_mean, their_mean = torch.cat(ours).mean(), torch.cat(theirs).mean()
    our_max, their_max = torch.cat(ours).max(), torch.cat(theirs).max()
    assert our_mean <= 1.3 * their_mean
    assert our_max <= 2 * their_max


def test_auto_computes_in_float32_on_the_cpu_whatever_the_checkpoint_holds(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "llama", dtype=torch.bfloat16)
    model = load_model(directory, group=None, device="cpu", dtype="auto")
    assert model.cache_spec.dtype == torch.float32
    player = Player(model, prompts_of((5, 40)), 1000).play(NUM_GENERATED)
    assert_equals_transformers(directory, Played.of(player))


def test_a_step_that_wants_no_logits_returns_none_of_them(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["llama"], group=None, device="cpu")
    cache = KVCache(
        model.cache_spec, num_blocks=2, num_host_blocks=0, block_size=BLOCK_SIZE, device="cpu"
    )
    inputs = {
        "input_ids": torch.tensor([5, 6]),
        "positions": torch.tensor([0, 1]),
        "slot_mapping": torch.tensor([8, 9]),
        "query_start_loc": torch.tensor([0, 2], dtype=torch.int32),
        "seq_lens": torch.tensor([2], dtype=torch.int32),
        "block_tables": torch.tensor([[1]], dtype=torch.int32),
        "logits_indices": torch.tensor([], dtype=torch.int64),
    }
    logits = model.forward(inputs, cache)
    assert logits is not None and logits.shape == (0, 259)


def test_an_unknown_dtype_is_refused_by_name(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"'float8'.*auto, bfloat16, float16, float32"):
        load_model(checkpoints["llama"], group=None, device="cpu", dtype="float8")


# ---- several ranks


def play_on_a_rank(
    rank: int, cases: list[tuple[str, str, list[list[int]], str]]
) -> list[tuple[Played | None, dict[str, int], dict[str, int], int]]:
    """Per case: what was seen (rank 0), collectives counted and announced, forward passes."""
    results = []
    for directory, schedule, prompts, dtype in cases:
        model: Any = load_model(directory, group=dist.group.WORLD, device="cpu", dtype=dtype)
        player = Player(model, prompts, SCHEDULES[schedule], tp=dist.get_world_size())
        with counted(("all_reduce", "gather", "all_gather", "reduce_scatter")) as counts:
            player.play(NUM_GENERATED)
        played = Played.of(player) if rank == 0 else None
        assert rank == 0 or not any(player.logits)
        results.append((played, dict(counts), model.collectives_per_forward(), player.steps))
    return results


class counted:
    """Counts calls of torch.distributed's functions, found through the module as callers must."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.counts: dict[str, int] = {}
        self.originals: Mapping[str, Callable[..., Any]] = {n: getattr(dist, n) for n in names}

    def __enter__(self) -> dict[str, int]:
        for name, original in self.originals.items():
            setattr(dist, name, self._counting(name, original))
        return self.counts

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def _counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            return original(*args, **kwargs)

        return call


def test_two_ranks_generate_what_transformers_generates(checkpoints: dict[str, Path]) -> None:
    prompts = prompts_of(PROMPT_LENGTHS)
    names = [(variant, schedule) for variant in VARIANTS for schedule in SCHEDULES]
    cases = [(str(checkpoints[v]), schedule, prompts, "auto") for v, schedule in names]
    for rank, results in enumerate(run_ranks(play_on_a_rank, 2, cases)):
        for (variant, _), (played, counts, announced, steps) in zip(names, results, strict=True):
            assert announced == {"all_reduce": 1 + 2 * 3, "gather": 1}
            assert counts == {op: n * steps for op, n in announced.items()}
            assert (played is not None) == (rank == 0)
            if played is not None:
                assert_equals_transformers(checkpoints[variant], played)


def test_more_ranks_than_key_value_heads_or_tokens_generate_the_same(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    few_tokens = make_checkpoint(tmp_path / "few", vocab_size=9)  # shards of 3, 3, 3 and 0
    directories = [checkpoints["llama"], checkpoints["qwen2-tied"], checkpoints["qwen3-tied"]]
    prompts = prompts_of(PROMPT_LENGTHS)
    cases = [(str(d), "chunked", prompts, "auto") for d in directories]
    cases.append((str(few_tokens), "chunked", prompts_of(PROMPT_LENGTHS, 9), "auto"))
    results = run_ranks(play_on_a_rank, 4, cases)[0]
    for directory, (played, *_) in zip([*directories, few_tokens], results, strict=True):
        assert_equals_transformers(directory, played)


def test_two_ranks_in_bfloat16_stay_as_close_to_float32_as_one_rank_does(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "llama-biased", dtype=torch.bfloat16)
    prompts = prompts_of((5, 40, 100))
    [(played, *_)] = run_ranks(
        play_on_a_rank, 2, [(str(directory), "chunked", prompts, "bfloat16")]
    )[0]
    exact = references(directory, played.tokens)
    rounded = references(directory, played.tokens, torch.bfloat16)
    generated = slice(-NUM_GENERATED - 1, -1)
    ours = [
        (torch.from_numpy(a) - b[generated]).abs()
        for a, b in zip(played.logits, exact, strict=True)
    ]
    theirs = [(a - b)[generated].abs() for a, b in zip(rounded, exact, strict=True)]
    assert torch.cat(ours).mean() <= 1.3 * torch.cat(theirs).mean()


def test_the_documented_model_of_ones_own_runs() -> None:
    from onecast.runtime import model_runner

    lines = (model_runner.__doc__ or "").splitlines()
    example = "\n".join(line[4:] for line in lines if line.startswith("    "))
    names: dict[str, Any] = {"CacheSpec": model_runner.CacheSpec, "torch": torch}
    exec(example, names)
    player = Player(names["Uniform"](), prompts_of((3, 20)), 16).play(2)
    assert [tokens[-2:] for tokens in player.tokens] == [[0, 0], [0, 0]]
