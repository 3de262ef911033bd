"""The checkpoint that ships: small, complete, free of its maker's machine; it writes English."""

import json
import os
import random
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from onecast.runtime import demo
from onecast.runtime.demo import train
from onecast.runtime.demo.corpus import END, Chapter, conversations, parse, prose
from onecast.runtime.demo.network import Llama

transformers = pytest.importorskip("transformers")

ROOT = Path(demo.__file__).parent
CHECKPOINT = ROOT / "checkpoint"
CONFIG = json.loads((CHECKPOINT / "config.json").read_text())
PROMPTS = [json.loads(line) for line in (ROOT / "prompts.jsonl").read_text().splitlines()]
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


def prompt_ids(tokenizer: Any, body: dict[str, Any]) -> list[int]:
    if "prompt" in body:
        text = body["prompt"]
    else:
        text = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, tokenize=False
        )
    ids: list[int] = tokenizer.encode(text)
    return ids


def continuation(model: Any, tokenizer: Any, ids: list[int], count: int) -> str:
    output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count)
    text: str = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return text


def english_share(text: str) -> float:
    """The share of words in `text` that the shipped prompts use too, about 900 common ones."""
    known = set(re.findall(r"[a-z]+", json.dumps(PROMPTS).lower()))
    words = re.findall(r"[a-z]+", text.lower())
    return sum(word in known for word in words) / max(1, len(words))


def test_the_checkpoint_holds_the_five_files_of_the_layout_and_at_most_six_megabytes() -> None:
    files = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert set(files) == FILES
    assert sum(files.values()) <= 6_000_000
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in CHECKPOINT.iterdir())


def test_the_heads_split_over_two_and_over_four_ranks() -> None:
    assert CONFIG["architectures"] == ["LlamaForCausalLM"]
    assert CONFIG["max_position_embeddings"] >= 512
    assert 2 <= CONFIG["num_key_value_heads"] < CONFIG["num_attention_heads"]
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert CONFIG[name] % 4 == 0, name


def test_every_weight_is_finite_and_in_the_precision_that_the_configuration_names() -> None:
    content = (CHECKPOINT / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"F16"}
    assert CONFIG["torch_dtype"] == "float16"
    values = torch.frombuffer(bytearray(content[8 + length :]), dtype=torch.float16)
    assert values.isfinite().all()
    assert "lm_head.weight" not in header and CONFIG["tie_word_embeddings"]


def test_nothing_in_the_checkpoint_tells_of_the_machine_it_was_made_on() -> None:
    for path in CHECKPOINT.iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":  # the header: the rest is numbers
            content = content[8 : 8 + struct.unpack_from("<Q", content)[0]]
        text = content.decode()
        node = os.uname().nodename
        for trace in ("/home/", "/root", "/tmp", "/usr", "/work", str(Path.home()), node):
            assert trace not in text, f"{path.name} holds {trace!r}"
        assert not re.search(r"20\d\d-\d\d-\d\d", text), f"{path.name} holds a date"


def test_transformers_and_tokenizers_read_the_same_tokens(tokenizer: Any) -> None:
    plain = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert len(tokenizer) == plain.get_vocab_size() == CONFIG["vocab_size"]
    for text in ("And God said, Let there be light", " two  spaces\n\n", "naïve ☃ 漢", ""):
        ids = plain.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert plain.decode(ids) == tokenizer.decode(ids) == text
    assert plain.token_to_id(END) == CONFIG["eos_token_id"] == tokenizer.eos_token_id


def test_the_chat_template_opens_a_turn_of_the_assistant(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Speak of Moses. "},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|end|><|user|>Speak of Moses.<|end|><|assistant|>"
    ids = tokenizer.encode(text)
    roles = [tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("system", "user")]
    assert ids[0] == roles[0] and roles[1] in ids and ids.count(0) == 2


def test_every_prompt_is_a_request_that_fits_the_context(tokenizer: Any) -> None:
    assert 40 <= len(PROMPTS) <= 64
    assert len({line["custom_id"] for line in PROMPTS}) == len(PROMPTS)
    lengths = []
    for line in PROMPTS:
        assert set(line) == {"custom_id", "method", "url", "body"}
        body = line["body"]
        chat = line["url"] == "/v1/chat/completions"
        assert line["method"] == "POST" and (chat or line["url"] == "/v1/completions")
        assert ("messages" in body) is chat and ("prompt" in body) is not chat
        assert body["model"] == "onecast-demo"
        assert 32 <= body["max_tokens"] <= 160
        assert body["temperature"] == 0 or "seed" in body, "two runs must give the same text"
        ids = prompt_ids(tokenizer, body)
        lengths.append(len(ids))
        total = len(ids) + body["max_tokens"]
        assert 0 < len(ids) and total <= CONFIG["max_position_embeddings"], line["custom_id"]
    assert min(lengths) <= 8 and max(lengths) >= 200


def test_the_prompts_use_what_the_engine_offers() -> None:
    bodies = [line["body"] for line in PROMPTS]
    assert sum("messages" in body for body in bodies) >= 8
    assert {body.get("n", 1) for body in bodies} >= {1, 2, 4}
    assert any("stop" in body for body in bodies)
    assert any("logprobs" in body for body in bodies)
    assert {body["temperature"] > 0 for body in bodies} == {True, False}


def test_a_greedy_continuation_reads_like_english(model: Any, tokenizer: Any) -> None:
    text = continuation(model, tokenizer, tokenizer.encode("And it came to pass in those"), 60)
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) >= 30
    assert english_share(text) >= 0.8, text
    assert len(set(words)) / len(words) >= 0.4, f"it repeats itself: {text}"


def test_the_english_check_refuses_what_random_weights_write(tokenizer: Any) -> None:
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(CHECKPOINT), dtype=torch.float32
    )
    text = continuation(network, tokenizer, tokenizer.encode("And it came to pass in those"), 60)
    assert english_share(text) < 0.8


def test_a_question_is_answered_about_its_subject_and_the_answer_ends(
    model: Any, tokenizer: Any
) -> None:
    for topic in ("Moses", "David", "wisdom"):
        ids = prompt_ids(
            tokenizer, {"messages": [{"role": "user", "content": f"Speak of {topic}."}]}
        )
        output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=250)
        assert output[0, -1] == CONFIG["eos_token_id"], f"no end: {tokenizer.decode(output[0])}"
        assert topic in tokenizer.decode(output[0, len(ids) :])


def shipped_network() -> Llama:
    network = Llama()
    weights = load_file(CHECKPOINT / "model.safetensors")
    network.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    return network.eval()


def test_the_training_script_writes_the_very_files_that_ship(tmp_path: Path) -> None:
    train.save(shipped_network(), Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (CHECKPOINT / name).read_bytes(), name


def test_the_network_that_was_trained_is_the_one_transformers_runs(
    model: Any, tokenizer: Any
) -> None:
    ids = torch.tensor([tokenizer.encode(max((str(line["body"]) for line in PROMPTS), key=len))])
    with torch.no_grad():
        trained = shipped_network().loss(ids).item()
        served = model(ids, labels=ids).loss.item()
    assert trained == pytest.approx(served, rel=0.01)  # one computes in bfloat16


VERSES = """\
Ge1:1 In the beginning God created the heaven and the earth.
Ge1:2 And the earth was without form,
Ge1:3 and darkness was upon the face of the deep.
Psa23:1 The LORD is my shepherd; I shall not want.
"""


def test_verses_become_prose_by_chapter_with_a_heading() -> None:
    first, second = parse(VERSES)
    assert first == Chapter(
        "Genesis",
        1,
        (
            "In the beginning God created the heaven and the earth.",
            "And the earth was without form,",
            "and darkness was upon the face of the deep.",
        ),
    )
    assert prose(second) == [f"Psalm 23\n\nThe LORD is my shepherd; I shall not want.{END}"]
    assert prose(first)[0].startswith("Genesis, chapter 1\n\nIn the beginning God created")


def test_a_line_that_is_no_verse_is_refused_by_its_number() -> None:
    with pytest.raises(ValueError, match="line 2 is no verse"):
        parse("Ge1:1 In the beginning\nnothing\n")


def test_a_conversation_answers_with_a_passage_that_names_its_topic() -> None:
    verses = tuple(f"And Moses went up the mount on day {day}." for day in range(40))
    documents = conversations([Chapter("Exodus", 1, verses)], 50, random.Random(0))
    asked = [text for text in documents if "Moses" in text.split(END)[0]]
    assert asked
    for text in documents:
        turns = text.split("<|user|>")[1:]
        assert turns and text.endswith(END)
        for turn in turns:
            question, answer, rest = turn.split(END)
            assert question and rest == ""
            assert answer.startswith("<|assistant|>And Moses went up") and answer.endswith(".")
