"""Text to tokens and back: exact, incremental, and stopped at the right character."""

import itertools
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_runs import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import LINES, TOKENIZERS, byte_level, save
from tokenizers import processors

from onecast.runtime.detokenizer import Detokenizer, text_offsets
from onecast.runtime.tokenizer import Tokenizer

INTERRUPTED_BYTES = b"\xe2\x82\xac\xe2\x82\xf0\x9f\x98\x80\xff\n \xef\xbf\xbd\xed\xa0\x80"


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer(save(TOKENIZERS[request.param](), tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def text_tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer(save(TOKENIZERS[request.param](), tmp_path_factory.mktemp(request.param)))


def token_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any tokens, ids without one, and many pieces of characters."""
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    pieces = [i for b, i in by_bytes.items() if len(b) == 1 and b in INTERRUPTED_BYTES]
    token = st.integers(0, tokenizer.vocab_size + 2)
    return st.lists(st.one_of(token, st.sampled_from(pieces)) if pieces else token, max_size=24)


def first_stop(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop string, found one character after the other."""
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return None


def ids_of_bytes(tokenizer: Tokenizer, raw: bytes, splits: Sequence[int]) -> list[int]:
    """Tokens that spell `raw`; at each place the split-th longest of those that fit."""
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    by_bytes = {b: i for b, i in by_bytes.items() if not tokenizer.is_silent(i)}
    ids = []
    for split in itertools.cycle(splits):
        if not raw:
            return ids
        fitting = [n for n in range(1, 12) if raw[:n] in by_bytes and n <= len(raw)]
        length = fitting[split % len(fitting)]
        ids.append(by_bytes[raw[:length]])
        raw = raw[length:]
    raise AssertionError


@pytest.mark.parametrize("text", LINES)
def test_encoding_and_decoding_gives_the_text_back(text_tokenizer: Tokenizer, text: str) -> None:
    assert text_tokenizer.decode(text_tokenizer.encode(text)) == text


def test_special_tokens_are_added_only_when_asked_for(tmp_path: Path) -> None:
    raw = byte_level()
    raw.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    tokenizer = Tokenizer(save(raw, tmp_path))
    bare = tokenizer.encode(LINES[0], add_special_tokens=False)
    assert tokenizer.encode(LINES[0]) == [0, *bare]
    assert tokenizer.decode([0, *bare, 1]) == LINES[0], "settings of training must not cut or pad"
    assert tokenizer.decode([0, *bare, 1], skip_special_tokens=False) == f"<s>{LINES[0]}</s>"
    assert tokenizer.encode("<|im_end|>") == [0, 3], "special tokens are found in a text"


def test_the_bytes_of_tokens_join_to_the_text(text_tokenizer: Tokenizer) -> None:
    for text in LINES:
        ids = text_tokenizer.encode("x" + text)
        joined = b"".join(map(text_tokenizer.token_bytes, ids)).decode()
        assert joined.removeprefix(" ") == "x" + text  # the first space is not part of the text


def test_token_text_of_pieces_of_a_character_names_the_bytes(text_tokenizer: Tokenizer) -> None:
    ids = ids_of_bytes(text_tokenizer, "€".encode(), [0])
    assert [text_tokenizer.token_text(i) for i in ids] == [
        r"bytes:\xe2",
        r"bytes:\x82",
        r"bytes:\xac",
    ]
    assert text_tokenizer.token_text(text_tokenizer.vocab_size + 5) == ""
    assert text_tokenizer.token_text(2).startswith("<"), "special tokens give their name"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_text_without_stop_strings_is_that_of_decoding_everything(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(token_lists(tokenizer))
    plain, watching = Detokenizer(tokenizer), Detokenizer(tokenizer, ["\0never\0"])
    assert not any([plain.add(i) or watching.add(i) for i in ids])
    assert plain.finish() == watching.finish() == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_offsets_are_those_of_decoding_every_beginning(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(token_lists(tokenizer))
    for count, offset in enumerate(text_offsets(tokenizer, ids)):
        text = tokenizer.decode(ids[:count])
        if "\ufffd" in text:  # perhaps an incomplete character, and nothing that shows
            assert offset <= len(text)
        else:
            assert offset == len(text)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_stop_string_is_found_with_the_token_that_completes_it(
    text_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    text = data.draw(st.text(alphabet="abst €😀\n", max_size=24).map(lambda t: "x" + t))
    stop = data.draw(st.lists(st.text(alphabet="abst €😀\n", min_size=1, max_size=4), max_size=4))
    splits = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
    ids = ids_of_bytes(text_tokenizer, text.encode(), splits)
    detokenizer = Detokenizer(text_tokenizer, stop)
    expected = first_stop(text, stop)
    for count, token_id in enumerate(ids, start=1):
        stopped = detokenizer.add(token_id)
        complete = b"".join(map(text_tokenizer.token_bytes, ids[:count])).decode(errors="ignore")
        assert stopped == (first_stop(complete, stop) is not None), (complete, stop)
        if stopped:
            break
    assert detokenizer.finish() == (text if expected is None else expected)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_random_tokens_stop_where_their_text_says(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(token_lists(tokenizer))
    whole = tokenizer.decode(ids)
    start = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = [whole[start : start + data.draw(st.integers(1, 4))] or "x", "\n "]
    detokenizer = Detokenizer(tokenizer, stop)
    taken = list(itertools.takewhile(lambda i: not detokenizer.add(i), ids))
    text = tokenizer.decode(ids[: len(taken) + 1])
    expected = first_stop(text, stop)
    assert detokenizer.finish() == (text if expected is None else expected)
    if len(taken) < len(ids):
        assert expected is not None


def test_a_line_break_stops_at_once_though_its_byte_might_begin_a_run(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(TOKENIZERS["byte-fallback"](), tmp_path))
    newline = tokenizer.encode("a\n")[-1]
    assert tokenizer.fallback_byte(newline) == 10
    detokenizer = Detokenizer(tokenizer, ["\n\n"])
    added = [detokenizer.add(i) for i in (*tokenizer.encode("q"), newline, newline)]
    assert added == [False] * (len(added) - 1) + [True]
    assert detokenizer.finish() == "q"


def test_of_two_stop_strings_the_one_completed_first_counts(text_tokenizer: Tokenizer) -> None:
    ids = ids_of_bytes(text_tokenizer, b"xabcdef", [0])
    for stop, expected in [
        (["abcdef", "cd"], "xab"),
        (["d", "bcd", "cd"], "xa"),
        (["f", "e"], "xabcd"),
    ]:
        detokenizer = Detokenizer(text_tokenizer, stop)
        any(detokenizer.add(i) for i in ids)
        assert detokenizer.finish() == expected


def test_an_empty_stop_string_is_refused(text_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="empty"):
        Detokenizer(text_tokenizer, ["a", ""])


def test_the_cost_of_a_token_does_not_grow_with_the_text(tokenizer: Tokenizer) -> None:
    def duration_s(sample: Sequence[int], count: int) -> float:
        detokenizer = Detokenizer(tokenizer, ["\0never\0"])
        begin_s = time.thread_time()
        for token_id in itertools.islice(itertools.cycle(sample), count):
            detokenizer.add(token_id)
        return time.thread_time() - begin_s

    pieces = [i for i in range(3, tokenizer.vocab_size) if tokenizer.fallback_byte(i) is None]
    run = [i for i in range(tokenizer.vocab_size) if (tokenizer.fallback_byte(i) or 0) in b"0123"]
    for sample in filter(None, [pieces, run]):
        # Were it O(text) per token, eight times the tokens would take 64 times as long.
        short_s = min(duration_s(sample, 500) for _ in range(5))
        assert min(duration_s(sample, 4000) for _ in range(3)) < 24 * short_s


def test_broken_tokenizer_files_are_named(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            Tokenizer(tmp_path)
        assert "\n" not in str(caught.value)

    refused(r"tokenizer\.json: no such file")
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    refused(r"tokenizer\.json: EOF")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    refused(r"tokenizer\.json: ")
    save(byte_level(), tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{'a': 1}")
    refused(r"tokenizer_config\.json: Expecting")
    config.write_text("[1]")
    refused(r"tokenizer_config\.json: holds list, not an object")
    config.write_text("[" * 100_000)
    refused(r"tokenizer_config\.json: maximum recursion")
    config.write_text(json.dumps({"chat_template": 5}))
    refused(r"tokenizer_config\.json: chat_template is int")
    config.write_text(json.dumps({"chat_template": [{"name": "rag", "template": ""}]}))
    refused(r"no chat_template is named 'default', only 'rag'")
    config.write_text(json.dumps({"chat_template": ["x"]}))
    refused(r"a list of something else")
    config.unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    refused(r"chat_template\.jinja: ")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}: no chat template"):
        Tokenizer(tmp_path).render_chat([{"role": "user", "content": "hi"}])


def test_a_long_text_lets_other_threads_run() -> None:
    tokenizer = Tokenizer(DEMO)
    thread = threading.Thread(target=tokenizer.encode, args=("ab " * 500_000,))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20, "the interpreter lock was held"
