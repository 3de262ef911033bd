"""A model's tokenizer: text to token ids and back, and the bytes behind every single token.

Owns tokenizer.json, read by the `tokenizers` library, and which of its tokens never show in a
text. Which ids end a sequence is the model configuration's business; turning a growing sequence
into text, token by token, is `detokenizer.py`'s.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A batch of one needs no threads, and a process that forks afterwards no warning about them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers

from .chat_template import find_chat_template, read_json_object

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The tokenizer of a Hugging Face model directory.

    ValueError, one line naming the file: tokenizer.json is missing or broken, or
    tokenizer_config.json is broken (it may be missing).
    """

    def __init__(self, model_dir: str | Path) -> None:
        directory = Path(model_dir)
        self._directory = directory
        self._tokenizer = _load(directory / "tokenizer.json")
        config = read_json_object(directory / "tokenizer_config.json")
        self._chat_template = find_chat_template(directory, config)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._ids = frozenset(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.vocab_size = max(self._ids, default=-1) + 1
        decoders = _decoder_types(self._tokenizer)
        self.byte_level = decoders == ["ByteLevel"]  # a text is its tokens' bytes, no more
        self.splits_characters = "ByteLevel" in decoders
        self._byte_fallback = "ByteFallback" in decoders
        self._token_bytes: dict[int, bytes] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with the special tokens that the tokenizer puts around a text, or bare."""
        # A batch of one: `encode` alone would hold the interpreter lock, 1.3 s for a million bytes.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt text of a conversation, special tokens included: encode it without adding any.

        ValueError: there is no template, or it refuses these messages.
        """
        if self._chat_template is None:
            raise ValueError(
                f"{self._directory}: no chat template, neither chat_template.jinja nor "
                "a chat_template in tokenizer_config.json"
            )
        return self._chat_template.render(messages)

    def is_silent(self, token_id: int) -> bool:
        """True where a token adds nothing to a text: special ones, and ids without a token.

        (A model's vocabulary is often padded beyond its tokenizer's.)
        """
        return token_id in self._special_ids or token_id not in self._ids

    def fallback_byte(self, token_id: int) -> int | None:
        """The byte of a token like `<0xE2>` where the decoder joins those to characters."""
        if not self._byte_fallback:
            return None
        match = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        return None if match is None else int(match[1], 16)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, in UTF-8; it may begin or end inside a character.

        Special tokens give their name, ids without a token b"".
        """
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        r"""`token_bytes` as text; `bytes:\xe2\x80` where they are not whole characters."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            # An added token may hold characters that stand for no byte: it means itself.
            if all(character in _BYTE_OF for character in token):
                return bytes(map(_BYTE_OF.__getitem__, token))
            return token.encode()
        byte = self.fallback_byte(token_id)
        if byte is not None:
            return bytes((byte,))
        # Decoders drop a space at the beginning of a text; the second of two equal tokens shows
        # what the token means inside of one.
        once = self.decode([token_id], skip_special_tokens=False)
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(once) :].encode()


def _load(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error
    tokenizer.no_truncation()  # settings of training that must not touch a prompt
    tokenizer.no_padding()
    return tokenizer


def _decoder_types(tokenizer: tokenizers.Tokenizer) -> list[str]:
    if tokenizer.decoder is None:
        return []
    decoder = json.loads(tokenizer.decoder.__getstate__())
    return [part["type"] for part in decoder.get("decoders", [decoder])]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the printable bytes stand for themselves, the other 68 follow from U+0100.

    Source: `bytes_to_unicode` in the encoder published with GPT-2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF = _byte_level_alphabet()
