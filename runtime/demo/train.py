"""Train the demo checkpoint from nothing: a small Llama on public-domain text.

    python -P -m onecast.runtime.demo.train --out DIR [--minutes 13] [--threads 2] [--text FILE]

Text and licence: the King James Version of the Bible, public domain, from Debian's packages
`bible-kjv-text` and `bible-kjv` (see corpus.py). Without `--text` it is fetched with
`apt-get download`; `--text` names a file of the same lines (`bible -f 'gen1:1-rev22:21'`).
The weights, the tokenizer and everything else in DIR are made by this script alone.

Owns the tokenizer, the training loop and the files in DIR, which are in the Hugging Face layout.
The seed is fixed; as the learning rate follows the clock, two runs see the same data in the same
order but not the same number of steps. One chapter in forty is held out; its loss is printed.

The shipped weights had 2,049 steps of 4,096 tokens (held-out loss 3.08, training loss 1.93), the
work of some 13 minutes of two idle cores. Stay near that. Seventeen passes over the text, not six,
teach it by heart (tried with half of the text), and words are invented where a prompt leaves it;
dropout and more weight decay bring the held-out loss to 2.95, but greedy decoding runs in circles.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from .corpus import CHAT_TEMPLATE, END, ROLES, conversations, download_text, parse, prose
from .network import CONFIG, CONTEXT, VOCAB, Llama

SEED = 1611
BATCH = 8  # windows of CONTEXT tokens
CHAT_SHARE = 0.27  # of the windows
PEAK_RATE, WEIGHT_DECAY = 8e-3, 0.1
CONVERSATIONS = 40_000
HELD_OUT_EVERY = 40

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": CONTEXT,
    "eos_token": END,
    "pad_token": END,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE: END is token 0, the roles follow, then the bytes, then what was learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.replace(END, "") for text in documents), trainer)
    return tokenizer


class Stream:
    """Documents end to end, cut into windows that begin at a document's start or anywhere."""

    def __init__(self, tokenizer: Tokenizer, documents: list[str]) -> None:
        encoded = [encoding.ids for encoding in tokenizer.encode_batch(documents)]
        self.tokens = torch.tensor([token for ids in encoded for token in ids])
        ends = torch.tensor([len(ids) for ids in encoded]).cumsum(0)
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), ends[:-1]))
        self.starts = starts[starts < len(self.tokens) - CONTEXT]

    def window(self, rng: random.Random, aligned: float) -> Tensor:
        if rng.random() < aligned:
            start = int(self.starts[rng.randrange(len(self.starts))])
        else:
            start = rng.randrange(len(self.tokens) - CONTEXT)
        return self.tokens[start : start + CONTEXT + 1]

    def in_order(self) -> list[Tensor]:
        count = (len(self.tokens) - 1) // CONTEXT
        return [self.tokens[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)]


def train(network: Llama, text: Stream, chat: Stream, held_out: Stream, minutes: float) -> None:
    """Train for `minutes`: Muon for the matrices, AdamW for the rest, one cosine down to zero."""
    rng = random.Random(SEED)
    matrices = [p for name, p in network.named_parameters() if "proj" in name]
    others = [p for name, p in network.named_parameters() if "proj" not in name]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=PEAK_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]

    def report(step: int, loss: float) -> None:
        with torch.no_grad():
            windows = held_out.in_order()
            batches = [torch.stack(windows[i : i + BATCH]) for i in range(0, len(windows), BATCH)]
            total = sum(network.loss(batch).item() * len(batch) for batch in batches)
        spent = (time.monotonic() - start) / 60
        speed = step * BATCH * CONTEXT / (spent * 60)
        print(
            f"{spent:5.1f} min  step {step:5d}  {speed:6.0f} tokens/s  "
            f"loss {loss:.3f}  held-out {total / len(windows):.3f}",
            flush=True,
        )

    start, step, average = time.monotonic(), 0, math.log(VOCAB)
    while (progress := (time.monotonic() - start) / (minutes * 60)) < 1:
        rate = PEAK_RATE * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer in optimizers:
            for settings in optimizer.param_groups:
                settings["lr"] = rate
        # Conversations always begin at a start, as they do when the model is asked.
        windows = [
            chat.window(rng, 1.0) if rng.random() < CHAT_SHARE else text.window(rng, 0.5)
            for _ in range(BATCH)
        ]
        loss = network.loss(torch.stack(windows))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        average += (loss.item() - average) / min(step, 50)
        if step % 200 == 0:
            report(step, average)
    report(step, average)


def save(network: Llama, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint: configuration and tokenizer as JSON, the weights in half precision."""
    out.mkdir(parents=True, exist_ok=True)

    def write(name: str, content: object) -> None:
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write("config.json", CONFIG)
    write("generation_config.json", {"eos_token_id": 0, "pad_token_id": 0})
    write("tokenizer_config.json", TOKENIZER_CONFIG)
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    weights = {f"model.{name}": p.detach().half() for name, p in network.named_parameters()}
    (out / "model.safetensors").write_bytes(serialize(weights, metadata={"format": "pt"}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=13.0, help="training time")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch computes with")
    parser.add_argument("--text", type=Path, help="verses, one a line; default: from Debian")
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error(f"--minutes {arguments.minutes} must be above 0")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)

    chapters = parse(arguments.text.read_text("utf-8") if arguments.text else download_text())
    training = [c for i, c in enumerate(chapters) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    held_out = [c for i, c in enumerate(chapters) if i % HELD_OUT_EVERY == HELD_OUT_EVERY // 2]
    documents = [document for chapter in training for document in prose(chapter)]
    tokenizer = train_tokenizer(documents)
    text = Stream(tokenizer, documents)
    chat = Stream(tokenizer, conversations(training, CONVERSATIONS, random.Random(SEED)))
    unseen = Stream(tokenizer, [d for chapter in held_out for d in prose(chapter)])
    network = Llama()
    print(
        f"{sum(p.numel() for p in network.parameters()):,} parameters; tokens: "
        f"{len(text.tokens):,} prose, {len(chat.tokens):,} chat, {len(unseen.tokens):,} held out",
        flush=True,
    )
    train(network, text, chat, unseen, arguments.minutes)
    save(network, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
