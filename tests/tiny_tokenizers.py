"""Small real tokenizers, one for each way in which decoders turn tokens into text.

A helper of the tests, not a test.
"""

from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

LINES = (
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Über den Wolken muß die Freiheit wohl grenzenlos sein: naïve café.",
    "一個語言模型 生成文字。",
    "Say 😀 or 👩‍👩‍👧 and stop.\n\nStop here! STOP",
    "def f(x):\n    return x + 1\n",
)


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it: tokens are bytes, characters may be split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    # Added tokens are text, even where their characters stand for bytes or for none.
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("é è"), AddedToken("Ġé")])
    return tokenizer


def byte_fallback(strip: bool = True) -> Tokenizer:
    """As Llama 2 and Mistral have it: `▁` is a space, characters without a token are bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    pieces = ["▁", *sorted({c for line in LINES[:2] for c in line if c not in " \n"}), "\ufffd"]
    merges = [("t", "h"), ("th", "e"), ("▁", "q"), ("▁", "the"), ("▁", "▁"), ("s", "t")]
    for piece in (*pieces, *("".join(merge) for merge in merges)):
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * strip)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """Metaspace alone: `▁` is a space, but not at the beginning."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def byte_level_in_sequence() -> Tokenizer:
    """A decoder that splits characters, but whose text is not simply its bytes."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def word_piece() -> Tokenizer:
    """`##` continues a word, everything else begins one; punctuation loses its space."""
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "fox", "##es", "jump", "##s", ".", ",", "do", "n't"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "byte-fallback-without-strip": lambda: byte_fallback(strip=False),
    "metaspace": metaspace,
    "byte-level-in-sequence": byte_level_in_sequence,
    "word-piece": word_piece,
}


def save(tokenizer: Tokenizer, directory: Path) -> Path:
    """Write tokenizer.json into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
