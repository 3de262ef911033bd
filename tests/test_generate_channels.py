"""`onecast generate` over every channel: the same tokens, and counts that are the group's own."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cli_runs import completion, generate_args, read_results, run, write_batch
from tiny_checkpoints import make_variant

from onecast.comm import all_reduce, channel, waiting
from onecast.comm.prior_art import PROTOCOLS
from onecast.comm.testing import run_ranks
from onecast.runtime import config as runtime_config
from onecast.runtime.config import RunConfig, rank_environment
from onecast.runtime.generate import generate
from onecast.runtime.observer import NullObserver
from onecast.runtime.rank import open_rank

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

CHANNELS = (*channel.TRANSPORTS, *PROTOCOLS)
LEAST_TENSORS, MOST_TENSORS = 7, 10  # of a step; the three block lists can be empty


@dataclass(frozen=True)
class Run:
    """What one run over one channel did, on rank 0."""

    name: str
    texts: dict[str, str]
    steps: int
    broadcasts: int
    growth_steps: int | None
    collectives: int  # of the control group, by its own count


def run_over_all(rank: int, checkpoint: Path, batch: Path, folder: Path) -> dict[str, Run]:
    """Every channel in turn, set up as the worker does it."""
    environment = rank_environment()
    model_group = dist.new_group()
    control_group = dist.new_group()
    assert model_group is not None and control_group is not None
    runs = {}
    for name in CHANNELS:
        output = folder / f"{name}.jsonl"
        config = RunConfig(
            model=checkpoint,
            input=batch,
            output=output,
            tp=2,
            channel=name,
            num_blocks=20,
            num_host_blocks=100,
            block_size=8,
            max_batch_tokens=48,
        )
        device = torch.device("cpu")
        groups = model_group, control_group
        with open_rank(config, environment, device, *groups, NullObserver()) as one:
            before = control_group._get_sequence_number_for_group()
            if rank != 0:
                one.executor.follow(one.channel)
                continue
            figures = generate(config, one)
            runs[name] = Run(
                figures.channel,
                {
                    r["custom_id"]: r["response"]["body"]["choices"][0]["text"]
                    for r in read_results(output)
                },
                figures.steps,
                figures.broadcasts,
                figures.growth_steps,
                control_group._get_sequence_number_for_group() - before,
            )
            assert figures.swapped_in > 0
    return runs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("checkpoint") / "llama", "llama")


@pytest.fixture(scope="module")
def runs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    lines = [completion(f"r{i}", "abcdefgh" * (i % 5 + 1), max_tokens=10 + 7 * i) for i in range(8)]
    batch = write_batch(folder / "in.jsonl", lines)
    result: dict[str, Run] = run_ranks(run_over_all, 2, checkpoint, batch, folder, timeout_s=120)[0]
    return result


def test_the_command_offers_what_comm_does() -> None:
    assert runtime_config.TRANSPORTS == channel.TRANSPORTS
    assert runtime_config.ALL_REDUCES == all_reduce.TRANSPORTS
    assert runtime_config.PRIOR_PROTOCOLS == PROTOCOLS
    assert runtime_config.CHANNELS == CHANNELS
    assert runtime_config.DEFAULT_SPIN == waiting.DEFAULT_SPIN


def test_every_channel_gives_the_same_greedy_tokens(runs: dict[str, Run]) -> None:
    assert list(runs) == list(CHANNELS)
    expected = runs["process-group"]
    assert len(expected.texts) == 8
    for name, one in runs.items():
        assert one.texts == expected.texts, name
        assert one.steps == expected.steps, name


def test_the_summary_counts_the_broadcasts_that_the_group_carried(runs: dict[str, Run]) -> None:
    for name, one in runs.items():
        assert one.broadcasts == one.collectives, name
        assert one.name == (name if name != "auto" else "shared-memory")
    steps = runs["process-group"].steps
    for name in {"auto", "shared-memory", "two-level"} & runs.keys():  # all ranks on one host
        assert (runs[name].broadcasts, runs[name].growth_steps) == (0, None)
    growth = runs["process-group"].growth_steps
    assert growth is not None and 0 <= growth <= 5
    assert runs["process-group"].broadcasts == steps + growth


def test_the_prior_protocols_cost_one_or_two_broadcasts_and_one_per_tensor(
    runs: dict[str, Run],
) -> None:
    steps = runs["process-group"].steps
    two, fixed, cached = (runs[name].broadcasts for name in PROTOCOLS)
    assert (1 + LEAST_TENSORS) * steps < fixed < (1 + MOST_TENSORS) * steps
    assert two == fixed + steps
    assert fixed < cached < fixed + steps / 4  # some steps' metadata is longer than any before
    assert [runs[name].growth_steps for name in PROTOCOLS] == [None] * 3


@pytest.mark.parametrize("name", ["shared-memory", "two-broadcasts"])
def test_the_command_takes_a_channel_and_says_what_it_cost(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    batch, output = write_batch(tmp_path / "in.jsonl", [completion("a")]), tmp_path / "out.jsonl"
    options = (f"--model={checkpoint}", f"--channel={name}", "--spin=0.5", "--no-telemetry")
    status, out, err = run(*generate_args(batch, output, *options))
    assert status == 0, err
    assert [r["custom_id"] for r in read_results(output)] == ["a"]
    assert name in out
    (line,) = (line for line in out.splitlines() if "control broadcasts per step" in line)
    per_step = float(line.split("│")[2].split()[0])
    assert per_step == 0 if name == "shared-memory" else 2 + LEAST_TENSORS <= per_step


@pytest.mark.parametrize("spin", ["-0.1", "1.1", "nan"])
def test_a_spin_beyond_its_range_is_refused(tmp_path: Path, spin: str) -> None:
    with pytest.raises(ValueError, match=rf"--spin: {spin} is (below 0|above 1)"):
        RunConfig(model=tmp_path, input=tmp_path, output=tmp_path, spin=float(spin))


def test_a_run_sums_through_shared_memory_unless_told_otherwise(
    checkpoint: Path, tmp_path: Path
) -> None:
    batch = write_batch(tmp_path / "in.jsonl", [completion("a", max_tokens=20)])
    texts, said = [], []
    for options in ((), ("--all-reduce=process-group",)):
        output = tmp_path / f"{len(texts)}.jsonl"
        arguments = (f"--model={checkpoint}", "--no-telemetry", *options)
        status, out, err = run(*generate_args(batch, output, *arguments))
        assert status == 0, err
        (result,) = read_results(output)
        texts.append(result["response"]["body"]["choices"][0]["text"])
        said += [line.split("│")[2].strip() for line in out.splitlines() if "all-reduces" in line]
    assert texts[0] == texts[1]
    assert said == ["shared-memory", "process-group"]


def test_sums_through_shared_memory_on_a_gpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--all-reduce: shared-memory needs --device cpu, not c"):
        RunConfig(
            model=tmp_path,
            input=tmp_path,
            output=tmp_path,
            all_reduce="shared-memory",
            device="cuda",
        )
