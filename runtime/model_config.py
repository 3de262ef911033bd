"""What a checkpoint's config.json says about its model, checked once.

Owns the reading of Hugging Face configurations of the Llama family, old and new layouts alike, and
says which tensor-parallel sizes a model allows. Knows nothing of torch, of weights or of requests.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from .json_fields import Fields

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "yarn")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: the base frequency and how it is stretched.

    `dynamic` changes the frequencies only beyond the model's own context length, which no sequence
    here may exceed, so it is kept by name and computed like `default`.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0  # linear, llama3, yarn
    original_max_position_embeddings: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole dimensions at the ends of the ramp
    attention_factor: float = 1.0  # yarn: scales cosines and sines


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Llama-family model."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    sliding_window: int | None  # positions a token sees, itself included; None: all
    dtype: str | None  # of the checkpoint, where config.json says so
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_dir(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json`, and the end-of-sequence ids from `generation_config.json`.

        Raises ValueError, one line, where the directory, the file or a value in it cannot be used.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise ValueError(f"model directory {directory} does not exist")
        fields = Fields.read(directory / "config.json")
        generation = directory / "generation_config.json"
        if generation.exists():
            eos = Fields.read(generation).token_ids("eos_token_id") or fields.token_ids(
                "eos_token_id"
            )
        else:
            eos = fields.token_ids("eos_token_id")
        return _parse(fields, eos)

    def check_tensor_parallel(self, tp: int) -> None:
        """Raise ValueError unless `tp` ranks can share the model evenly.

        Key/value heads fewer than ranks are replicated, each on `tp / num_kv_heads` ranks. The
        vocabulary needs no check: its last shard is padded.
        """
        if tp < 1:
            raise ValueError(f"tensor-parallel size {tp} is less than 1")
        for name, count in (
            ("num_attention_heads", self.num_heads),
            ("intermediate_size", self.intermediate_size),
        ):
            if count % tp:
                raise ValueError(
                    f"tensor-parallel size {tp} does not divide {name} {count}; "
                    f"possible for this model: {self._possible_sizes()}"
                )
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            raise ValueError(
                f"tensor-parallel size {tp} neither divides num_key_value_heads "
                f"{self.num_kv_heads} nor is a multiple of it; "
                f"possible for this model: {self._possible_sizes()}"
            )

    def kv_heads_per_rank(self, tp: int) -> int:
        """Key/value heads each of `tp` ranks holds."""
        return max(1, self.num_kv_heads // tp)

    def _possible_sizes(self) -> str:
        sizes = (
            tp
            for tp in range(1, self.num_heads + 1)
            if not (self.num_heads % tp or self.intermediate_size % tp)
            and not (self.num_kv_heads % tp and tp % self.num_kv_heads)
        )
        return ", ".join(map(str, sizes))


def _parse(fields: Fields, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    architecture = _architecture(fields)
    if fields.values.get("quantization_config"):
        method = fields.section("quantization_config").get("quant_method", "unknown")
        raise fields.error(f"quantization {method!r} is not supported; supported: none")
    hidden_act = fields.values.get("hidden_act") or "silu"
    if hidden_act != "silu":
        raise fields.error(f"hidden_act {hidden_act!r} is not supported; supported: 'silu'")
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            f"num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    qwen3 = architecture == "Qwen3ForCausalLM"
    head_dim = fields.count("head_dim", default=128 if qwen3 else hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error(f"head_dim {head_dim} is odd; rotary embedding needs an even one")
    attention_bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and fields.flag(
        "attention_bias"
    )
    max_position_embeddings = fields.count("max_position_embeddings")
    num_layers = fields.count("num_hidden_layers")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=fields.positive("rms_norm_eps", default=1e-6),
        rope=_rope(fields, max_position_embeddings),
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        output_bias=attention_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and fields.flag("mlp_bias"),
        qk_norm=qwen3,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        sliding_window=_sliding_window(fields, architecture, max_position_embeddings, num_layers),
        dtype=_dtype(fields),
        eos_token_ids=eos_token_ids,
    )


def _architecture(fields: Fields) -> str:
    architectures = fields.values.get("architectures") or []
    if not isinstance(architectures, list):
        raise fields.error(f"architectures is {architectures!r}, not a list")
    for architecture in architectures:
        if architecture in ARCHITECTURES:
            return str(architecture)
    found = ", ".join(map(str, architectures)) or "none"
    raise fields.error(
        f"architecture {found} is not supported; supported: {', '.join(ARCHITECTURES)}"
    )


def _sliding_window(
    fields: Fields, architecture: str, max_position_embeddings: int, num_layers: int
) -> int | None:
    """The window of all layers. Windows on some layers only (Qwen) are refused."""
    if architecture == "MistralForCausalLM":
        # An absent key means 4096 to transformers, null means none.
        if fields.values.get("sliding_window", 4096) is None:
            return None
        window = fields.count("sliding_window", default=4096)
        return window if window < max_position_embeddings else None
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM") and fields.flag(
        "use_sliding_window"
    ):
        first = fields.values.get("max_window_layers", 28)
        types = fields.values.get("layer_types")
        windowed = (
            "sliding_attention" in types
            if isinstance(types, list)
            else isinstance(first, int) and first < num_layers
        )
        if windowed and fields.values.get("sliding_window", 4096) is not None:
            raise fields.error("use_sliding_window true is not supported; supported: false")
    return None


def _dtype(fields: Fields) -> str | None:
    dtype = fields.values.get("dtype") or fields.values.get("torch_dtype")
    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise fields.error(f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    return str(dtype)


def _rope(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """Both layouts: `rope_parameters` (transformers 5), and `rope_scaling` beside `rope_theta`."""
    key = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    rope = fields.within(key)
    rope_type = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise fields.error(
            f"rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    for where in (rope, fields):
        if where.values.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise where.error(
                f"partial_rotary_factor {where.values['partial_rotary_factor']} "
                "is not supported; supported: 1.0"
            )
    theta = rope.positive("rope_theta", default=fields.positive("rope_theta", default=10000.0))
    if rope_type in ("default", "dynamic"):
        return RopeConfig(rope_type, theta)
    if rope_type == "linear":
        return RopeConfig(rope_type, theta, rope.positive("factor"))
    original = fields.count(
        "original_max_position_embeddings",
        default=rope.count("original_max_position_embeddings", default=max_position_embeddings),
    )
    if rope_type == "llama3":
        return RopeConfig(
            rope_type,
            theta,
            rope.positive("factor"),
            original,
            low_freq_factor=rope.positive("low_freq_factor"),
            high_freq_factor=rope.positive("high_freq_factor"),
        )
    factor = rope.positive("factor", default=max_position_embeddings / original)
    return RopeConfig(
        rope_type,
        theta,
        factor,
        original,
        beta_fast=rope.positive("beta_fast", default=32.0),
        beta_slow=rope.positive("beta_slow", default=1.0),
        truncate=rope.flag("truncate", default=True),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    """YaRN's temperature on attention, as transformers derives it (arXiv 2309.00071, eq. 22)."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.values.get("attention_factor") is not None:
        return rope.positive("attention_factor")
    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        return scale(rope.positive("mscale")) / scale(rope.positive("mscale_all_dim"))
    return scale(1.0)
