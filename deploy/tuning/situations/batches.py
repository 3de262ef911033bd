"""The batches that situations are made of: how many requests, how long, how much to answer.

Owns the lines. The texts are of the kind the shipped checkpoint was trained on, greedy and without
an end of their own, so that both runs of a situation have the same work.
"""

import json
from pathlib import Path

_WORDS = "and the king said unto the people of the land in those days".split()


def write_batch(path: Path, *, requests: int, prompt_words: int, max_tokens: int) -> Path:
    """Completions of `prompt_words` words each, no two with a beginning in common."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(requests):
            words = [
                str(number),
                *(_WORDS[(number + k) % len(_WORDS)] for k in range(prompt_words)),
            ]
            body = {
                "model": "demo",
                "prompt": " ".join(words),
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            line = {
                "custom_id": f"request-{number}",
                "method": "POST",
                "url": "/v1/completions",
                "body": body,
            }
            file.write(json.dumps(line) + "\n")
    return path
