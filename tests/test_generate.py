"""`onecast generate` on the shipped checkpoint: answers, errors in place, nothing left over."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import (
    DEMO,
    completion,
    generate_args,
    read_results,
    run,
    write_batch,
)
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_config, make_checkpoint

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


def test_a_batch_is_answered_line_by_line_with_errors_in_their_place(tmp_path: Path) -> None:
    lines = [
        completion("greedy"),
        completion("greedy", "a second line of that name"),
        completion("many", n=3, seed=4, temperature=0.8, max_tokens=12),
        completion("prompts", ["In the beginning", "And God said"]),
        {
            "custom_id": "chat",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "messages": [{"role": "user", "content": "Speak of David."}],
                "max_completion_tokens": 10,
                "logprobs": True,
                "top_logprobs": 2,
            },
        },
        '{"custom_id": "torn", "method"',
        completion("negative", max_tokens=-3),
        completion("unknown", colour="red"),
        completion("too long", "begat " * 5000),
        completion("beyond the cache", "begat " * 60, max_tokens=200),
        completion("last"),
    ]
    batch, output = write_batch(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    status, out, err = run(*generate_args(batch, output, "--num-blocks=12", "--show=2"))
    assert status == 0, err
    results = read_results(output)
    assert len(results) == len(lines)
    good = {
        r["custom_id"]: r["response"]["body"]
        for r in results
        if r["response"] and r["response"]["status_code"] == 200
    }
    assert sorted(good) == ["chat", "greedy", "last", "many", "prompts"]
    assert good["greedy"]["choices"][0]["text"] == good["last"]["choices"][0]["text"]
    assert len({choice["text"] for choice in good["many"]["choices"]}) > 1
    assert [choice["index"] for choice in good["prompts"]["choices"]] == [0, 1]
    assert good["chat"]["choices"][0]["message"]["role"] == "assistant"
    entries = good["chat"]["choices"][0]["logprobs"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    refused = {
        r["custom_id"]: r["response"]["body"]["error"]["message"]
        for r in results
        if r["response"] and r["response"]["status_code"] == 400
    }
    assert "-3 is below 1" in refused["negative"]
    assert "colour" in refused["unknown"]
    for name in ("too long", "beyond the cache"):
        assert "KV cache of 192" in refused[name]  # 12 blocks of 16
    broken = [r["error"]["message"] for r in results if r["error"]]
    assert any("line 2" in message and "greedy" in message for message in broken)
    assert any("line 6" in message for message in broken)
    assert len(broken) == 2
    for word in ("tokens/s", "control broadcasts per step", "all_reduce", "swapped out"):
        assert word in out


def test_the_same_batch_gives_the_same_bytes_of_text_again(tmp_path: Path) -> None:
    lines = [completion(f"r{i}", temperature=1.0, max_tokens=20) for i in range(6)]
    batch = write_batch(tmp_path / "in.jsonl", lines)
    texts = []
    for name, tp in (("one", 2), ("two", 1)):
        output = tmp_path / name
        status, _, err = run(*generate_args(batch, output, "--no-telemetry", tp=tp))
        assert status == 0, err
        texts.append(
            {
                r["custom_id"]: r["response"]["body"]["choices"][0]["text"]
                for r in read_results(output)
            }
        )
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) == 6  # each request its own draws, though prompts are equal


def test_what_the_prefix_cache_finds_is_in_the_usage_and_in_the_summary(tmp_path: Path) -> None:
    lines = [completion(f"r{i}", "In the beginning " * 8, max_tokens=4) for i in range(3)]
    batch = write_batch(tmp_path / "in.jsonl", lines)
    usages, texts, tables = [], [], []
    for name, options in (("on", ()), ("off", ("--no-prefix-caching", "--no-overlap"))):
        output = tmp_path / name
        one_at_a_time = ("--max-batch-size=1", "--no-telemetry", *options)
        status, out, err = run(*generate_args(batch, output, *one_at_a_time, tp=1))
        assert status == 0, err
        results = sorted(read_results(output), key=lambda result: result["custom_id"])
        bodies = [result["response"]["body"] for result in results]
        usages.append([body["usage"] for body in bodies])
        texts.append([body["choices"][0]["text"] for body in bodies])
        tables.append(out)
    assert texts[0] == texts[1]
    length = usages[0][0]["prompt_tokens"]
    shared = (length - 1) // 16 * 16  # full blocks, and never the last token
    assert shared >= 16
    found = [usage.pop("prompt_tokens_details")["cached_tokens"] for usage in usages[0]]
    assert found == [0, shared, shared]
    assert usages[0] == usages[1]
    share = f"{2 * shared:,} of {3 * length:,} tokens"
    assert "found in the prefix cache" in tables[0] and share in tables[0]
    assert "prefix cache" not in tables[1]


def test_plain_torchrun_runs_the_same_worker(tmp_path: Path) -> None:
    batch, output = write_batch(tmp_path / "in.jsonl", [completion("a")]), tmp_path / "out.jsonl"
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += ["-m", "onecast.runtime.worker", f"--model={DEMO}", f"--input={batch}"]
    result = subprocess.run(
        [*command, f"--output={output}"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert [r["custom_id"] for r in read_results(output)] == ["a"]
    assert "control broadcasts per step" in result.stdout


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    return write_batch(tmp_path / "in.jsonl", [completion("a")])


def refusal(batch: Path, *more: object, tp: int = 2) -> str:
    """The one line a run that cannot start ends with."""
    output = batch.with_name("out.jsonl")
    status, out, err = run(*generate_args(batch, output, *more, tp=tp))
    assert status != 0
    assert "Traceback" not in out + err
    (line,) = err.strip().splitlines()
    return line


def test_a_missing_checkpoint_is_named(batch: Path) -> None:
    assert "/nowhere" in refusal(batch, "--model=/nowhere")


def test_a_truncated_checkpoint_is_named_with_its_sizes(batch: Path, tiny: Path) -> None:
    copy = batch.with_name("short")
    copy.mkdir()
    for file in tiny.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = copy / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size - 1000)
    message = refusal(batch, f"--model={copy}")
    assert "model.safetensors" in message
    assert str(size - 1000) in message.replace(",", "")


def test_a_config_that_is_no_regular_file_is_refused_not_waited_for(
    batch: Path, tiny: Path
) -> None:
    copy = batch.with_name("pipe")
    shutil.copytree(tiny, copy)
    (copy / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(copy / "generation_config.json")
    assert "generation_config.json is not a regular file" in refusal(batch, f"--model={copy}")


def test_logits_that_are_not_finite_name_the_line_by_its_custom_id(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "nan")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors")
    batch = write_batch(tmp_path / "in.jsonl", [completion("my-line")])
    status, _, err = run(*generate_args(batch, tmp_path / "out.jsonl", f"--model={model}", tp=1))
    assert status == 2  # it would break again
    assert "the logits of request 'my-line' at token " in err
    assert "Traceback" not in err


def test_an_unsupported_architecture_is_named_with_what_is_supported(
    batch: Path, tiny: Path
) -> None:
    copy = batch.with_name("other")
    copy.mkdir()
    for file in tiny.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    edit_config(copy, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    message = refusal(batch, f"--model={copy}")
    assert "GPT2LMHeadModel" in message
    assert "LlamaForCausalLM" in message


def test_files_of_a_run_are_never_each_other_nor_something_else(batch: Path) -> None:
    before = batch.read_bytes()
    folder = batch.with_name("folder")
    folder.mkdir()
    for options, word in (
        ((f"--output={batch}", "--overwrite"), "--input"),
        ((f"--trace={batch}",), "no trace file"),
        ((f"--output={folder}", "--overwrite"), "not a regular file"),
        (("--output=/dev/null", "--overwrite"), "not a regular file"),
        ((f"--output={batch}/x.jsonl",), "in.jsonl"),
        ((f"--trace={folder}",), "not a regular file"),
        ((f"--input={folder}",), "not a regular file"),
    ):
        assert word in refusal(batch, *options), options
    assert batch.read_bytes() == before


def test_heads_that_ranks_do_not_divide_are_named(batch: Path, tiny: Path) -> None:
    message = refusal(batch, f"--model={tiny}", tp=3)
    assert "3" in message and "4" in message


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--num-blocks=-1", ("--num-blocks", "-1", "1")),
        ("--block-size=0", ("--block-size", "0", "1")),
        ("--timeout-s=nan", ("--timeout-s", "nan")),
        ("--timeout-s=inf", ("--timeout-s", "inf", "604800")),
        ("--metrics-port=70000", ("70000", "65535")),
        ("--max-model-len=100000", ("100000", "512")),
        ("--num-blocks=100000000", ("--num-blocks", "100,000,000", "bytes")),
    ],
)
def test_sizes_out_of_range_are_named_with_their_limit(
    batch: Path, option: str, words: tuple[str, ...]
) -> None:
    message = refusal(batch, option)
    for word in words:
        assert word in message


def test_a_metrics_port_in_use_is_named(batch: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refusal(batch, f"--metrics-port={port}")


def test_more_ranks_than_gpus_are_refused(batch: Path) -> None:
    import torch

    message = refusal(batch, "--device=cuda", tp=torch.cuda.device_count() + 2)
    assert "GPU" in message


def test_results_that_are_there_are_not_overwritten_unasked(batch: Path) -> None:
    output = batch.with_name("out.jsonl")
    assert run(*generate_args(batch, output, tp=1))[0] == 0
    before = output.read_bytes()
    assert "--resume" in refusal(batch)
    assert output.read_bytes() == before
    status, _, err = run(*generate_args(batch, output, "--resume", tp=1))
    assert status == 0, err
    assert output.read_bytes() == before  # nothing was left to do
    assert json.loads(before)["custom_id"] == "a"
