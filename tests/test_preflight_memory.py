"""Blocks and weights that cannot fit are refused in one line, before any rank starts."""

import re
from pathlib import Path

import pytest
import torch
from cli_runs import DEMO, completion, generate_args, run, write_batch

from onecast.runtime import preflight
from onecast.runtime.config import RunConfig
from onecast.runtime.gpu_memory import total_gpu_bytes
from onecast.runtime.memory import available_host_bytes
from onecast.runtime.model_config import ModelConfig

MIB = 1 << 20
BLOCK_TOKENS = 16


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command of that name, first on PATH, that runs the shell script which a test writes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    script = folder / "nvidia-smi"
    script.touch(mode=0o755)
    return script


def answers(script: Path, *lines: object, status: int = 0) -> None:
    printed = "".join(f"{line}\\n" for line in lines)
    script.write_text(
        f"#!/bin/sh\necho \"$@\" > '{script}.asked'\nprintf '{printed}'\nexit {status}\n"
    )


def has_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def make_config(tmp_path: Path, **options: object) -> RunConfig:
    batch = write_batch(tmp_path / "in.jsonl", [completion("a")])
    given = {"tp": 1, "device": "cuda", "block_size": BLOCK_TOKENS, **options}
    return RunConfig(model=DEMO, input=batch, output=tmp_path / "out.jsonl", **given)  # type: ignore[arg-type]


def block_bytes(tp: int, itemsize: int) -> int:
    model = ModelConfig.from_dir(DEMO)
    heads = model.kv_heads_per_rank(tp)
    return model.num_layers * 2 * BLOCK_TOKENS * heads * model.head_dim * itemsize


def weight_bytes(itemsize: int) -> int:
    tensors = preflight.check_checkpoint(DEMO, ModelConfig.from_dir(DEMO))
    return sum(torch.Size(tensor.shape).numel() for tensor in tensors.values()) * itemsize


@pytest.mark.parametrize("tp", [1, 2])
def test_blocks_that_no_gpu_holds_beside_the_weights_are_refused_with_all_sizes(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tp: int
) -> None:
    has_gpus(monkeypatch, 2)
    answers(nvidia_smi, 60, 64)  # of unlike GPUs the largest counts
    block, weights = block_bytes(tp, itemsize=2), weight_bytes(itemsize=2) // tp
    most = (64 * MIB - weights) // block
    config = make_config(tmp_path, tp=tp, dtype="bfloat16", num_blocks=most)
    preflight.check(config, tp, tp)
    asked = Path(f"{nvidia_smi}.asked").read_text()
    assert asked == "--query-gpu=memory.total --format=csv,noheader,nounits\n"
    needed = weights + (most + 1) * block
    with pytest.raises(ValueError) as caught:
        preflight.check(make_config(tmp_path, tp=tp, dtype="bfloat16", num_blocks=most + 1), tp, tp)
    assert str(caught.value) == (
        f"--num-blocks: {weights:,} bytes of weights and {most + 1:,} blocks of {block:,} bytes "
        f"need {needed:,} bytes of GPU memory; a GPU here has {64 * MIB:,}"
    )


def test_a_model_that_no_gpu_holds_is_refused_whatever_the_number_of_blocks(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    has_gpus(monkeypatch, 1)
    answers(nvidia_smi, weight_bytes(4) // MIB)
    message = "--model, --tp: .* bytes of weights and 1 block of .* a GPU here has"
    with pytest.raises(ValueError, match=message):
        preflight.check(make_config(tmp_path, dtype="float32"), 1, 1)
    preflight.check(make_config(tmp_path, dtype="bfloat16"), 1, 1)  # half the size


def test_ranks_that_share_a_gpu_need_it_together(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    answers(nvidia_smi, 64)
    block, weights = block_bytes(2, itemsize=4), weight_bytes(itemsize=4) // 2
    num_blocks = (64 * MIB - weights) // block
    config = make_config(tmp_path, tp=2, dtype="float32", num_blocks=num_blocks)
    has_gpus(monkeypatch, 2)
    preflight.check(config, 2, 2)
    has_gpus(monkeypatch, 1)
    with pytest.raises(ValueError, match=r"bytes for each of 2 ranks need [\d,]+ bytes of GPU"):
        preflight.check(config, 2, 2)


def test_without_nvidia_smi_or_its_answer_the_rank_is_left_to_find_out(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    has_gpus(monkeypatch, 1)
    config = make_config(tmp_path, num_blocks=10**9)
    answers(nvidia_smi, 1, "NVIDIA-SMI has failed because ...", status=9)
    preflight.check(config, 1, 1)
    answers(nvidia_smi, "[N/A]", "[Not Supported]", "")
    preflight.check(config, 1, 1)
    answers(nvidia_smi, "[N/A]", " 81559 ")
    assert total_gpu_bytes() == [81559 * MIB]
    nvidia_smi.write_text("no program")
    assert total_gpu_bytes() == []
    nvidia_smi.unlink()
    assert total_gpu_bytes() == []
    preflight.check(config, 1, 1)


def test_nothing_is_asked_for_a_run_on_the_cpu(nvidia_smi: Path, tmp_path: Path) -> None:
    answers(nvidia_smi, 1)
    preflight.check(make_config(tmp_path, device="cpu"), 1, 1)
    assert not Path(f"{nvidia_smi}.asked").exists()


def test_blocks_of_all_ranks_that_the_host_does_not_hold_are_refused_with_all_sizes(
    tmp_path: Path,
) -> None:
    block = block_bytes(2, itemsize=4)
    each = available_host_bytes() * 3 // 4 // block  # one rank alone would find room
    config = make_config(tmp_path, tp=2, device="cpu", num_blocks=each - 5, num_host_blocks=5)
    message = f"{each:,} blocks of {block:,} bytes on 2 ranks need {2 * each * block:,} bytes"
    with pytest.raises(ValueError, match=message):
        preflight.check(config, 2, 2)


def test_the_command_says_so_in_one_line_and_starts_no_rank(tmp_path: Path) -> None:
    batch = write_batch(tmp_path / "in.jsonl", [completion("a")])
    output = tmp_path / "out.jsonl"
    status, out, err = run(*generate_args(batch, output, "--num-blocks=1000000000"))
    assert status == 2 and out == "" and not output.exists()
    assert re.fullmatch(
        r"onecast: --num-blocks, --num-host-blocks: 1,000,000,000 blocks of .* are available\n", err
    )
