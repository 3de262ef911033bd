"""Tiny Hugging Face checkpoints with random weights, for every family that onecast runs.

A helper of the tests, not a test. `make_checkpoint(directory, "qwen2")` writes config.json,
safetensors, tokenizer.json and tokenizer_config.json (with a chat template); transformers opens
what it wrote, and so does onecast.

The tokenizer has one token per byte, so that it encodes any text, behind `<s>` and `</s>`. The
weights are larger than an untrained model's, norms and biases are random too: a wrong mask, a
missing norm or a bias in the wrong place changes the tokens.
"""

import json
from pathlib import Path
from typing import Any

import torch

BOS, EOS = 0, 1
VOCAB_SIZE = 259  # <s>, </s>, 256 bytes and one to spare; odd, so that no rank count divides it
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

# What differs from the common shape in make_checkpoint. Together the families below exercise
# every option of the model code.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-tied": (
        "llama",
        {"rope_parameters": LINEAR_ROPE, "tie_word_embeddings": True},
    ),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1, "rope_parameters": YARN_ROPE}),
    "llama-full-heads": ("llama", {"num_key_value_heads": 4, "rope_parameters": DYNAMIC_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-windowed": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
}


def make_variant(directory: Path, variant: str, **options: Any) -> Path:
    """Write the checkpoint of one of `VARIANTS`; options as of `make_checkpoint`."""
    family, overrides = VARIANTS[variant]
    return make_checkpoint(directory, family, **{**overrides, **options})


def make_checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
    **overrides: Any,
) -> Path:
    """Write a tiny checkpoint into `directory` (made if missing) and return it.

    `overrides` are fields of the Hugging Face configuration. `max_shard_bytes` divides the weights
    among several files with an index.
    """
    import transformers  # seconds to import, and ranks that import a test need none of it

    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    config_class, model_class = classes[family]
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        **overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**fields)).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith(".bias"):
                    parameter.normal_(std=0.3)
    directory.mkdir(parents=True, exist_ok=True)
    shard = {} if max_shard_bytes is None else {"max_shard_size": max_shard_bytes}
    model.save_pretrained(directory, **shard)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: `<s>`, `</s>`, then one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def edit_config(directory: Path, **fields: Any) -> None:
    """Overwrite fields of config.json; a value of None removes the field."""
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}, indent=2))
