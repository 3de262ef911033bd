"""The prompts of the end-to-end benchmark: the same for every protocol, and for its peers.

Owns how they are cut from the shipped texts. Knows nothing of who answers them.
"""

import json
import math
from pathlib import Path

from onecast.runtime import demo
from onecast.runtime.tokenizer import Tokenizer

LEAST, MOST = 24, 40  # tokens of a prompt


def make_prompts(
    tokenizer: Tokenizer, count: int, least: int = LEAST, most: int = MOST
) -> list[tuple[int, ...]]:
    """`count` prompts of `least` to `most` tokens, each beginning at a place of its own.

    Windows of the shipped texts, each beginning half a window after the one before; where the texts
    are at their end they begin again, between the beginnings so far.
    """
    tokens = tokenizer.encode(_texts(), add_special_tokens=False)
    stride = most // 2 + 1
    while math.gcd(stride, len(tokens)) > 1:  # else it would come back to where it began
        stride += 1
    endless = tokens + tokens[:most]
    windows = []
    for number in range(count):
        start = number * stride % len(tokens)
        length = least + number * 7 % (most - least + 1)
        windows.append(tuple(endless[start : start + length]))
    return windows


def _texts() -> str:
    """The prompts of the shipped batch that are plain text, one after the other."""
    lines = Path(demo.__path__[0], "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["body"].get("prompt") for line in lines]
    return "\n".join(prompt for prompt in prompts if isinstance(prompt, str))
