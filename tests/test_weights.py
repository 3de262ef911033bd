"""Each rank reads its slices and nothing else; a checkpoint that cannot work is refused early."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_checkpoints import VARIANTS, edit_config, make_checkpoint, make_variant

from onecast.comm.testing import run_ranks
from onecast.runtime import weights
from onecast.runtime.llama import LlamaModel
from onecast.runtime.model_config import ModelConfig
from onecast.runtime.weights import Weights, check_checkpoint, expected_shapes

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def open_weights(directory: Path) -> Weights:
    return Weights(directory, ModelConfig.from_dir(directory), device=CPU)


# ---- reading


def test_rows_columns_and_padding_are_those_of_the_whole_tensor(checkpoint: Path) -> None:
    with open_weights(checkpoint) as opened:
        whole = opened.whole("model.layers.1.mlp.down_proj.weight")
        assert whole.shape == (64, 96)
        rows = opened.rows("model.layers.1.mlp.down_proj.weight", 5, 9)
        assert torch.equal(rows, whole[5:9])
        columns = opened.columns("model.layers.1.mlp.down_proj.weight", 48, 96)
        assert torch.equal(columns, whole[:, 48:]) and columns.is_contiguous()
        padded = opened.rows("model.embed_tokens.weight", 200, 259, pad_to=65)
        assert torch.equal(padded[:59], opened.whole("model.embed_tokens.weight")[200:])
        assert padded.shape == (65, 64) and not padded[59:].any()
        assert opened.rows("model.embed_tokens.weight", 259, 259, pad_to=3).shape == (3, 64)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stored_dtype_is_kept_unless_another_is_asked_for(
    tmp_path: Path, stored: torch.dtype
) -> None:
    directory = make_checkpoint(tmp_path, dtype=stored)
    config = ModelConfig.from_dir(directory)
    with Weights(directory, config, device=CPU) as opened:
        assert opened.dtype == stored
        kept = opened.whole("model.norm.weight")
    with Weights(directory, config, device=CPU, dtype=torch.float32) as opened:
        wide = opened.whole("model.norm.weight")
    assert kept.dtype == stored and wide.dtype == torch.float32
    assert torch.equal(kept.float(), wide)


def test_several_files_hold_what_one_file_holds(tmp_path: Path) -> None:
    one = make_checkpoint(tmp_path / "one")
    several = make_checkpoint(tmp_path / "several", max_shard_bytes=60_000)
    assert len(list(several.glob("*.safetensors"))) > 3
    with open_weights(one) as single, open_weights(several) as sharded:
        for name, shape in expected_shapes(ModelConfig.from_dir(one)):
            assert single.whole(name).shape == shape
            assert torch.equal(single.whole(name), sharded.whole(name))


def read_on_a_rank(rank: int, directory: str) -> tuple[int, dict[str, list[Any]]]:
    """Bytes read and, per tensor, the slices asked of safetensors."""
    asked: dict[str, list[Any]] = {}
    open_file = weights.safe_open

    class Recorded:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = open_file(*args, **kwargs)

        def __enter__(self) -> "Recorded":
            self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def get_slice(self, name: str) -> Any:
            part = self.file.get_slice(name)

            class Slice:
                def __getitem__(self, index: Any) -> torch.Tensor:
                    pairs = [(one.start, one.stop) for one in index]
                    asked.setdefault(name, []).append(pairs)
                    return part[index]  # type: ignore[no-any-return]

            return Slice()

    weights.safe_open = Recorded
    config = ModelConfig.from_dir(directory)
    with Weights(directory, config, device=CPU) as opened:
        LlamaModel(config, opened, group=dist.group.WORLD)
    return opened.bytes_read, asked


def test_two_ranks_read_half_of_the_matrices_each_and_no_byte_twice(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "llama-biased", num_hidden_layers=2, vocab_size=260)
    shapes = dict(expected_shapes(ModelConfig.from_dir(directory)))
    sizes = {name: 4 * torch.Size(shape).numel() for name, shape in shapes.items()}
    on_both = sum(size for name, size in sizes.items() if "norm" in name)
    on_the_first = sum(
        size for name, size in sizes.items() if name.endswith(("o_proj.bias", "down_proj.bias"))
    )
    divided = sum(sizes.values()) - on_both - on_the_first
    first, second = run_ranks(read_on_a_rank, 2, str(directory))
    assert first[0] == divided // 2 + on_both + on_the_first
    assert second[0] == divided // 2 + on_both
    assert second[1]["model.embed_tokens.weight"] == [[(130, 260)]]
    assert second[1]["model.layers.0.self_attn.q_proj.weight"] == [[(32, 64)]]
    assert second[1]["model.layers.1.self_attn.k_proj.bias"] == [[(16, 32)]]
    assert second[1]["model.layers.1.self_attn.o_proj.weight"] == [[(None, None), (32, 64)]]
    assert second[1]["model.layers.1.mlp.up_proj.weight"] == [[(48, 96)]]
    assert second[1]["model.layers.1.mlp.down_proj.weight"] == [[(None, None), (48, 96)]]
    assert all(len(slices) == 1 for rank in (first, second) for slices in rank[1].values())
    assert set(shapes) - set(second[1]) == {
        f"model.layers.{layer}.{name}.bias"
        for layer in range(2)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    }


# ---- checking


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_writes_is_accepted(tmp_path: Path, variant: str) -> None:
    directory = make_variant(tmp_path, variant)
    config = ModelConfig.from_dir(directory)
    checked = check_checkpoint(directory, config)
    assert list(checked) == [name for name, _ in expected_shapes(config)]


def test_checking_reads_no_tensor(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "safe_open", None)
    file = checkpoint / "model.safetensors"
    with file.open("r+b") as stream:  # the same header before nothing but a hole
        size = file.stat().st_size
        stream.truncate(8 + struct.unpack("<Q", stream.read(8))[0])
        stream.truncate(size)
    check_checkpoint(checkpoint, ModelConfig.from_dir(checkpoint))


def refusal(directory: Path) -> str:
    with pytest.raises(ValueError) as error:
        check_checkpoint(directory, ModelConfig.from_dir(directory))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_directory_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert refusal(checkpoint) == (
        f"{checkpoint} has neither model.safetensors nor model.safetensors.index.json"
    )


@pytest.mark.parametrize("keep", [0, 5, 8, 400, -1])
def test_a_truncated_file_is_refused_with_both_sizes(checkpoint: Path, keep: int) -> None:
    file = checkpoint / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(keep % size)
    message = refusal(checkpoint)
    assert str(file) in message and f"{keep % size} bytes" in message
    if keep == -1:
        assert message == f"{file} is truncated: {size - 1} bytes, its header expects {size}"
    assert "is truncated" in message or "is not a safetensors file" in message


def test_a_file_with_more_than_its_header_promises_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    size = file.stat().st_size
    with file.open("ab") as stream:
        stream.write(b"rest")
    assert refusal(checkpoint) == (
        f"{file} is too long: {size + 4} bytes, its header expects {size}"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"<html>this is not a checkpoint</html>" + b" " * 1000,
        struct.pack("<Q", 30) + b"not json".ljust(60),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 26) + b'{"a":{"dtype":"F32"}}'.ljust(26),
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(checkpoint: Path, content: bytes) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(content)
    message = refusal(checkpoint)
    assert message.startswith(str(file))
    assert "is not a safetensors file" in message or "is truncated" in message


def test_a_missing_tensor_is_refused_with_the_file_and_the_shape(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_config(directory, tie_word_embeddings=False)
    assert refusal(directory) == (
        f"{directory}/model.safetensors: tensor lm_head.weight [259, 64] is missing"
    )


def test_a_wrong_shape_is_refused_with_found_and_expected(checkpoint: Path) -> None:
    edit_config(checkpoint, intermediate_size=128)
    assert refusal(checkpoint) == (
        f"{checkpoint}/model.safetensors: tensor model.layers.0.mlp.gate_proj.weight has shape "
        "[96, 64], config.json expects [128, 64]"
    )


def test_a_tensor_of_another_type_is_refused_by_name(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, file)
    assert refusal(checkpoint) == (
        f"{file}: tensor model.norm.weight has type I8; supported: F32, F16, BF16"
    )


def test_an_index_that_names_a_missing_file_or_tensor_is_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, max_shard_bytes=60_000)
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first, second = sorted(set(values["weight_map"].values()))[:2]
    saved = (directory / second).read_bytes()
    (directory / second).unlink()
    assert refusal(directory) == f"{index} names {second}, which does not exist"
    (directory / second).write_bytes(saved)
    values["weight_map"]["model.norm.weight"] = first
    index.write_text(json.dumps(values))
    assert refusal(directory) == (
        f"{directory / first}: tensor model.norm.weight of {index.name} is missing"
    )
    del values["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(values))
    assert refusal(directory) == f"{index}: tensor model.norm.weight [64] is missing"
    for broken in ("{", "[]", '{"weight_map": {"a": "../b.safetensors"}}'):
        index.write_text(broken)
        assert refusal(directory).startswith(str(index))
