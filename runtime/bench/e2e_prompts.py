"""The prompts of the end-to-end benchmark: the same for every protocol, and for its peers.

Owns how they are cut from the shipped texts. Knows nothing of who answers them.
"""

import itertools
import json
from pathlib import Path

from onecast.runtime import demo
from onecast.runtime.tokenizer import Tokenizer

LEAST, MOST = 24, 40  # tokens of a prompt


def make_prompts(
    tokenizer: Tokenizer, count: int, least: int = LEAST, most: int = MOST
) -> list[tuple[int, ...]]:
    """`count` prompts of `least` to `most` tokens, no two of them with the same beginning.

    Windows of the shipped texts, one after the other, each beginning a little later than the one
    before; where the texts are at their end they begin again, at another token.
    """
    tokens = tokenizer.encode(_texts(), add_special_tokens=False)
    stride = most // 2 + 1
    windows = []
    starts: set[int] = set()
    start = 0
    for number in range(count):
        while start in starts:
            start = (start + 1) % len(tokens)
        starts.add(start)
        if len(starts) == len(tokens):
            starts.clear()
        length = least + number * 7 % (most - least + 1)
        windows.append(tuple(itertools.islice(itertools.cycle(tokens[start:] + tokens), length)))
        start = (start + stride) % len(tokens)
    return windows


def _texts() -> str:
    """The prompts of the shipped batch that are plain text, one after the other."""
    lines = Path(demo.__path__[0], "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["body"].get("prompt") for line in lines]
    return "\n".join(prompt for prompt in prompts if isinstance(prompt, str))
