"""Hugging Face transformers beside onecast: the same checkpoint, prompts and cores, in turns.

Owns who takes turns and what a turn is: a batch of prompts answered greedily, from the call with
the prompts to the last token. Every contender lives in processes of its own, which wait while
another has its turn, and all of them are kept to the same cores. Refuses to know what the ratios
are held against.

    onecast, TP 1                        1 process of 1 thread      1 core
    onecast, TP 2                        2 processes of 1 thread    2 cores
    transformers, generate               1 process of 1 or 2 threads, on as many cores;
    transformers, continuous batching    the prompts padded on the left, or one by one

All compute in float32 and read the prompts as token ids; none looks prompts up in a cache of the
turn before, and none stops at an end-of-sequence token.
"""

import gc
import importlib.util
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from onecast.comm import open_all_reduce, open_channel
from onecast.comm.testing import run_ranks
from onecast.runtime.executor import StepExecutor
from onecast.runtime.kv_cache import KVCache
from onecast.runtime.model_runner import load_model
from onecast.runtime.observer import NullObserver
from onecast.runtime.tokenizer import Tokenizer

from .e2e_channels import SHM, TIMEOUT_S, TurnChannel
from .e2e_prompts import make_prompts
from .e2e_run import BLOCK_SIZE, MAX_BATCH_TOKENS, Plan, blocks_of, drive, make_engine

ONECAST, PEER = "onecast", "transformers"
GENERATE, CONTINUOUS = "generate", "continuous batching"

_RANKS = 4  # TP 1, the two of TP 2, transformers
_QUIET = {  # of the libraries: no question to a network, nothing but the report on the terminal
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "critical",
}
_PAGE = 64  # tokens of a page of transformers' paged cache: a sequence of the benchmark needs two


class Contender(NamedTuple):
    program: str
    how: str
    threads: int  # of each process
    processes: int = 1

    @property
    def cores(self) -> int:
        return self.threads * self.processes


CONTENDERS = (
    Contender(ONECAST, "TP 1", 1),
    Contender(ONECAST, "TP 2", 1, processes=2),
    *(Contender(PEER, how, threads) for how in (GENERATE, CONTINUOUS) for threads in (1, 2)),
)
_AT = {CONTENDERS[0]: (0,), CONTENDERS[1]: (1, 2)}  # ranks; all others: rank 3


class PeerTurn(NamedTuple):
    contender: Contender
    round: int
    tokens_per_s: float
    tokens: list[list[int]]


class Seen(NamedTuple):
    turns: list[PeerTurn]
    failed: list[tuple[Contender, str]]  # what a contender could not do, in one line
    versions: dict[str, str]


def missing() -> str | None:
    """Why the peer cannot be measured here, in one line; None: it can."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install transformers)"
    return None


def launch(model: Path, batch: int, drawn: int, rounds: int, timeout_s: float = 3600.0) -> Seen:
    """Load everything, let everything take turns. Needs what `missing` looks for."""
    plan = Plan(model, "cpu", (batch,), (SHM,), rounds=rounds, drawn=drawn, timeout_s=timeout_s)
    found = run_ranks(_measure, _RANKS, plan, timeout_s=timeout_s, env=_QUIET)
    turns = sorted((turn for seen in found for turn in seen.turns), key=lambda turn: turn.round)
    failed = [failure for seen in found for failure in seen.failed]
    return Seen(turns, failed, found[-1].versions)


Answer = Callable[[], list[list[int]]]  # the tokens of each prompt; none where the driver is not


def _measure(rank: int, plan: Plan) -> Seen:
    """On one rank: the turns that it drove."""
    cores = sorted(os.sched_getaffinity(0))
    own = [one for one in CONTENDERS if rank in _AT.get(one, (_RANKS - 1,))]
    groups = [dist.new_group(list(ranks)) for ranks in _AT.values()]
    tokenizer = Tokenizer(plan.model)
    prompts = make_prompts(tokenizer, max(plan.batches))
    seen = Seen([], [], {})
    answers: dict[Contender, Answer] = {}
    for one, group in zip(_AT, groups, strict=True):
        if one in own:
            assert group is not None
            answers[one] = _onecast(plan, one, group, tokenizer, prompts)
    if not answers:
        answers, versions = _transformers(plan, own, prompts)
        seen.versions.update(versions)
    chance = random.Random(0)  # the same on all ranks
    for number in range(-1, plan.rounds):  # the first round only warms up
        for one in chance.sample(CONTENDERS, len(CONTENDERS)):
            dist.barrier()
            if one not in answers:
                continue
            os.sched_setaffinity(0, cores[: one.cores])
            torch.set_num_threads(one.threads)
            gc.collect()
            begin = time.perf_counter()
            try:
                tokens = answers[one]()
            except Exception as error:  # of a library of which other versions do other things
                if one.program == ONECAST:
                    raise
                seen.failed.append((one, f"{type(error).__name__}: {error}".split("\n")[0]))
                del answers[one]
                continue
            elapsed_s = time.perf_counter() - begin
            if number >= 0 and tokens:
                rate = sum(map(len, tokens)) / elapsed_s
                seen.turns.append(PeerTurn(one, number, rate, tokens))
    dist.barrier()
    return seen


# ---- onecast


def _onecast(
    plan: Plan,
    contender: Contender,
    group: dist.ProcessGroup,
    tokenizer: Tokenizer,
    prompts: list[tuple[int, ...]],
) -> Answer:
    """As `onecast generate` puts it together; a collective call of the group."""
    alone = contender.processes == 1
    reducer = None if alone else open_all_reduce(group, timeout_s=TIMEOUT_S)
    model = load_model(
        plan.model,
        group=None if alone else group,
        device="cpu",
        all_reduce=None if reducer is None else reducer.all_reduce,
        gather=None if reducer is None else reducer.gather,
    )
    kv_cache = KVCache(
        model.cache_spec,
        num_blocks=blocks_of(len(prompts), plan.drawn),
        num_host_blocks=0,
        block_size=BLOCK_SIZE,
        device="cpu",
    )
    channel = TurnChannel(
        open_channel(group, src=dist.get_global_rank(group, 0), timeout_s=TIMEOUT_S)
    )
    observer = NullObserver()
    executor = StepExecutor(model, kv_cache, observer)

    def answer() -> list[list[int]]:
        if dist.get_rank(group) != 0:
            executor.follow(channel)
            return []
        engine = make_engine(plan, channel, executor, tokenizer, kv_cache, observer)
        tokens = drive(engine, channel, prompts, plan.drawn).tokens
        channel.end_turn()
        return tokens

    return answer


# ---- transformers


def _transformers(
    plan: Plan, contenders: Sequence[Contender], prompts: list[tuple[int, ...]]
) -> tuple[dict[Contender, Answer], dict[str, str]]:
    import transformers

    library: Any = transformers  # as good as untyped
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    model = library.AutoModelForCausalLM.from_pretrained(
        plan.model, dtype=torch.float32, local_files_only=True
    )
    # The checkpoint's own settings, a stop at its end-of-sequence token among them, do not apply.
    settings = library.GenerationConfig(
        do_sample=False, max_new_tokens=plan.drawn, pad_token_id=0, eos_token_id=None
    )
    model.generation_config = settings
    ways = {
        GENERATE: _padded(model, settings, prompts),
        CONTINUOUS: _continuous(model, settings, prompts, plan.drawn),
    }
    versions = {PEER: library.__version__, "attention": model.config._attn_implementation}
    return {one: ways[one.how] for one in contenders}, versions


def _padded(model: Any, settings: Any, prompts: list[tuple[int, ...]]) -> Answer:
    """`generate` of one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1

    def answer() -> list[list[int]]:
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        tokens: list[list[int]] = found[:, longest:].tolist()
        return tokens

    return answer


def _continuous(model: Any, settings: Any, prompts: list[tuple[int, ...]], drawn: int) -> Answer:
    """`generate_batch`, its manager kept from turn to turn, with a cache of the batch's size.

    Without sizes it would reserve most of the machine's memory.
    """
    inputs = [list(prompt) for prompt in prompts]
    longest = max(map(len, prompts)) + drawn

    def answer() -> list[list[int]]:
        from transformers import ContinuousBatchingConfig

        config = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=len(prompts) * (-(-longest // _PAGE) + 1),
            max_batch_tokens=MAX_BATCH_TOKENS,
            allow_block_sharing=False,
        )
        found = model.generate_batch(
            inputs,
            generation_config=settings,
            continuous_batching_config=config,
            persistent_manager=True,
        )
        tokens = [list(output.generated_tokens) for output in found.values()]
        lengths = {len(one) for one in tokens}
        if len(tokens) != len(prompts) or lengths != {drawn}:
            raise RuntimeError(f"{len(tokens)} answers of {sorted(lengths)} tokens")
        return tokens

    return answer
