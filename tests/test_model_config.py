"""config.json is read in all its layouts, and refused in one line that says what is wrong."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import VARIANTS, make_variant

from onecast.runtime.model_config import ARCHITECTURES, ModelConfig, RopeConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 240,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "rope_theta": 500000.0,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def write(directory: Path, **fields: Any) -> Path:
    """LLAMA with `fields` on top; a field of None is null, `...` is left out."""
    values = {key: value for key, value in {**LLAMA, **fields}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def read(directory: Path, **fields: Any) -> ModelConfig:
    return ModelConfig.from_dir(write(directory, **fields))


def refusal(directory: Path, **fields: Any) -> str:
    with pytest.raises(ValueError) as error:
        read(directory, **fields)
    message = str(error.value)
    prefix = f"{directory}/config.json"
    assert message.startswith(prefix) and "\n" not in message
    return message.removeprefix(prefix).removeprefix(": ")


# ---- reading


def test_the_shape_is_what_the_file_says(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=1000,
        hidden_size=96,
        intermediate_size=240,
        num_layers=2,
        num_heads=12,
        num_kv_heads=4,
        head_dim=8,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope=RopeConfig("default", 500000.0),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=False,
        sliding_window=None,
        dtype="bfloat16",
        eos_token_ids=(2,),
    )


def test_old_and_new_rope_layouts_mean_the_same(tmp_path: Path) -> None:
    expected = RopeConfig("llama3", 500000.0, 8.0, 512, 1.0, 4.0)
    assert read(tmp_path, rope_scaling={"type": "llama3", **LLAMA3}).rope == expected
    assert read(tmp_path, rope_scaling={"rope_type": "llama3", **LLAMA3}).rope == expected
    parameters = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}
    assert read(tmp_path, rope_theta=..., rope_parameters=parameters).rope == expected
    assert read(tmp_path, rope_theta=1.5, rope_parameters=parameters).rope == expected


def test_rope_without_any_scaling_is_the_default(tmp_path: Path) -> None:
    assert read(tmp_path, rope_scaling=None, rope_theta=...).rope == RopeConfig("default", 10000.0)
    assert read(tmp_path, rope_parameters={"rope_theta": 7}).rope == RopeConfig("default", 7.0)


def test_rope_types_keep_their_parameters(tmp_path: Path) -> None:
    linear = read(tmp_path, rope_scaling={"type": "linear", "factor": 4}).rope
    assert linear == RopeConfig("linear", 500000.0, 4.0)
    yarn = read(tmp_path, rope_scaling={"type": "yarn", "factor": 4, "beta_fast": 16}).rope
    assert (yarn.factor, yarn.original_max_position_embeddings, yarn.beta_fast) == (4, 2048, 16)
    assert yarn.attention_factor == pytest.approx(1.1386294)
    given = {"type": "yarn", "factor": 4, "attention_factor": 0.5}
    assert read(tmp_path, rope_scaling=given).rope.attention_factor == 0.5


def test_missing_key_value_heads_mean_one_per_head(tmp_path: Path) -> None:
    assert read(tmp_path, num_key_value_heads=...).num_kv_heads == 12
    assert read(tmp_path, num_key_value_heads=None).num_kv_heads == 12


def test_families_differ_where_their_architectures_do(tmp_path: Path) -> None:
    def options(architecture: str, **fields: Any) -> tuple[bool, bool, bool, bool, int]:
        c = read(tmp_path, architectures=[architecture], sliding_window=None, **fields)
        return c.qkv_bias, c.output_bias, c.mlp_bias, c.qk_norm, c.head_dim

    biased = {"attention_bias": True, "mlp_bias": True}
    assert options("LlamaForCausalLM", **biased) == (True, True, True, False, 8)
    assert options("MistralForCausalLM", head_dim=16) == (False, False, False, False, 16)
    assert options("Qwen2ForCausalLM") == (True, False, False, False, 8)
    assert options("Qwen3ForCausalLM", head_dim=32) == (False, False, False, True, 32)
    assert options("Qwen3ForCausalLM", attention_bias=True) == (True, True, False, True, 128)


def test_sliding_windows_of_mistral_are_kept_where_they_matter(tmp_path: Path) -> None:
    def window(**fields: Any) -> int | None:
        return read(tmp_path, architectures=["MistralForCausalLM"], **fields).sliding_window

    assert window(sliding_window=1024) == 1024
    assert window(sliding_window=None) is None
    assert window(sliding_window=2048) is None  # no sequence is longer
    assert window(max_position_embeddings=8192) == 4096  # what the absent key means


def test_sliding_windows_of_qwen_are_refused_only_where_a_layer_has_one(tmp_path: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 1024}
    assert read(tmp_path, **qwen, use_sliding_window=False).sliding_window is None
    assert read(tmp_path, **qwen, use_sliding_window=True, max_window_layers=2) is not None
    message = refusal(tmp_path, **qwen, use_sliding_window=True, max_window_layers=1)
    assert message == "use_sliding_window true is not supported; supported: false"


def test_generation_config_has_the_last_word_on_the_end_of_sequence(tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=[5, 6]).eos_token_ids == (5, 6)
    assert read(tmp_path, eos_token_id=None).eos_token_ids == ()
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [7, 8]}')
    assert read(tmp_path).eos_token_ids == (7, 8)
    generation.write_text("{}")
    assert read(tmp_path).eos_token_ids == (2,)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_writes_is_read(tmp_path: Path, variant: str) -> None:
    config = ModelConfig.from_dir(make_variant(tmp_path, variant))
    assert config.architecture in ARCHITECTURES
    assert config.dtype == "float32" and config.eos_token_ids == (1,)


def test_reading_a_configuration_needs_no_torch() -> None:
    import subprocess

    script = "import sys, onecast.runtime.model_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", script], timeout=60).returncode == 0


# ---- refusing


def test_a_missing_directory_or_file_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ValueError, match=f"^model directory {missing} does not exist$"):
        ModelConfig.from_dir(missing)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config.json does not exist$"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: Expecting property name"),
        (b"", "is not JSON: Expecting value"),
        (b"\xff\xfe\x00", "is not JSON: "),
        (b"[]", "holds a JSON list, not an object"),
    ],
)
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        ModelConfig.from_dir(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json {message}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel is not supported; supported: " + ", ".join(ARCHITECTURES),
        ),
        (
            {"architectures": ...},
            "architecture none is not supported; supported: " + ", ".join(ARCHITECTURES),
        ),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', not a list"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: 'silu'"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0, not a whole number of at least 1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', not a whole number of at least 1"),
        ({"intermediate_size": True}, "intermediate_size is True, not a whole number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, not a number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', not true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', not a token id or a list of them"),
        (
            {"num_key_value_heads": 5},
            "num_attention_heads 12 is not a multiple of num_key_value_heads 5",
        ),
        ({"head_dim": 7}, "head_dim 7 is odd; rotary embedding needs an even one"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported; supported: bfloat16, float16"),
        (
            {"rope_scaling": {"type": "longrope"}},
            "rope type 'longrope' is not supported; "
            "supported: default, dynamic, linear, llama3, yarn",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            "rope_parameters.factor is 0, not a number above 0",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor 0.5 is not supported; supported: 1.0",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization 'gptq' is not supported; supported: none",
        ),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    assert refusal(tmp_path, **fields).startswith(message)


# ---- tensor parallelism


def test_sizes_that_divide_the_model_are_accepted_and_others_listed(tmp_path: Path) -> None:
    config = read(tmp_path)  # 12 heads, 4 key/value heads, 240 intermediate
    for tp, kv_heads in ((1, 4), (2, 2), (4, 1), (12, 1)):
        config.check_tensor_parallel(tp)
        assert config.kv_heads_per_rank(tp) == kv_heads
    for tp, message in (
        (0, "tensor-parallel size 0 is less than 1"),
        (-2, "tensor-parallel size -2 is less than 1"),
        (5, "tensor-parallel size 5 does not divide num_attention_heads 12; "),
        (24, "tensor-parallel size 24 does not divide num_attention_heads 12; "),
        (3, "tensor-parallel size 3 neither divides num_key_value_heads 4 nor is a multiple of it"),
    ):
        with pytest.raises(ValueError) as error:
            config.check_tensor_parallel(tp)
        assert str(error.value).startswith(message)
        assert tp < 1 or str(error.value).endswith("possible for this model: 1, 2, 4, 12")


def test_an_intermediate_size_that_does_not_divide_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"size 4 does not divide intermediate_size 90.*: 1, 2$"):
        read(tmp_path, intermediate_size=90).check_tensor_parallel(4)
