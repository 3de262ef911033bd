"""The text of a sequence while it grows, and where a stop string ends it.

Owns the incremental decoding of one sequence and the search for stop strings across token
borders. A token costs the same however long the text before it is, and next to nothing where there
are no stop strings. Knows nothing of requests, and nothing of tokens that end a sequence.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from .tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """One sequence's text, which ends before the first of its stop strings.

    First is the one completed first, had the text come character by character; of two completed
    together, the longer. So it never matters where tokens begin and end.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise ValueError("a stop string is empty")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        if stop:  # else no text is needed before the end
            self._decoder = _decoder(tokenizer)
            self._reach = max(map(len, stop)) - 1  # characters before new ones a match may need
            self._tail = ""

    def add(self, token_id: int) -> bool:
        """Take the next token; True when the text now contains a stop string."""
        self._token_ids.append(token_id)
        if not self._stop or self._tokenizer.is_silent(token_id):
            return False
        settled = self._tail + self._decoder.push(token_id)
        self._tail = settled[-self._reach :] if self._reach else ""
        recent = settled + self._decoder.unsettled()
        for stop in self._stop:  # any() over a generator takes twice as long
            if stop in recent:
                return True
        return False

    def finish(self) -> str:
        """`tokenizer.decode` of all tokens, cut before the first stop string."""
        text = self._tokenizer.decode(self._token_ids)
        matches = [
            (start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0
        ]
        return text[: min(matches)[1]] if matches else text


class SettledText:
    """The beginning of a sequence's text that no later token can change, in `text`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = _decoder(tokenizer)
        self.text = ""

    def add(self, token_id: int) -> int:
        """Take the next token; returns how many complete characters the text before it has.

        Tokens that share a character have the same offset, and so have those that show nothing.
        """
        offset = len(self.text) + len(self._decoder.unsettled())
        if not self._tokenizer.is_silent(token_id):
            self.text += self._decoder.push(token_id)
        return offset


def text_offsets(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """For each token, how many complete characters the text before it has."""
    text = SettledText(tokenizer)
    return [text.add(token_id) for token_id in token_ids]


class _Decoder(Protocol):
    def push(self, token_id: int) -> str:
        """Take a token; returns the text that no later token can change."""

    def unsettled(self) -> str:
        """Complete characters behind the settled text which a later token may still change."""


def _decoder(tokenizer: Tokenizer) -> _Decoder:
    return _ByteLevelDecoder(tokenizer) if tokenizer.byte_level else _WindowDecoder(tokenizer)


class _ByteLevelDecoder:
    """Every token is a string of bytes, and the text is those bytes as UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def unsettled(self) -> str:
        return ""


class _WindowDecoder:
    """Any other decoder: decodes the new tokens behind those that gave the latest text.

    The difference to the latest text alone is the new text; spaces that a decoder drops at the
    beginning of a text are dropped in both. `tokenizers.DecodeStream` does the same, but knows
    nothing of runs of byte tokens: one invalid byte turns every character of its run into
    U+FFFD, those handed out already included, and it raises "Invalid prefix encountered". So a run
    is held until it has ended.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # tokens of the latest settled text ...
        self._window_text = ""
        self._held: list[int] = []  # ... and those behind them, up to the run
        self._run: list[int] = []  # byte tokens
        self._run_text = ""  # of its complete characters
        self._partial = bytearray()  # of the next one
        self._run_broken = False

    def push(self, token_id: int) -> str:
        byte = self._tokenizer.fallback_byte(token_id)
        if byte is not None:
            self._run.append(token_id)
            self._extend_run_text(byte)
            return ""
        self._held += self._run
        self._held.append(token_id)
        self._run.clear()
        self._run_text, self._run_broken = "", False
        self._partial.clear()
        text = self._behind_window(self._held)
        incomplete = self._tokenizer.splits_characters and text.endswith(_REPLACEMENT)
        if incomplete or not text:
            return ""
        self._window = self._held
        self._window_text = self._tokenizer.decode(self._window)
        self._held = []
        return text

    def unsettled(self) -> str:
        return self._run_text

    def _extend_run_text(self, byte: int) -> None:
        if self._run_broken:
            return
        self._partial.append(byte)
        try:
            text, complete = codecs.utf_8_decode(self._partial, "strict", False)
        except UnicodeDecodeError:
            self._run_text, self._run_broken = "", True  # no character of it will show
            return
        if not complete:
            return
        self._partial.clear()
        if self._window or self._run_text:
            self._run_text += text
        else:  # at the beginning of a text decoders may drop a space
            self._run_text = self._behind_window(self._held + self._run)

    def _behind_window(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(self._window + token_ids)[len(self._window_text) :]
