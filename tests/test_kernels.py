"""The kernel that moves rows leaves, byte for byte, what numpy's assignment of rows leaves.

Where there is no GPU, Triton's interpreter runs it, in a process of its own: whether a kernel is
interpreted is settled when it is made.
"""

import json
import os
import random
import re
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def make_rows(count: int, row_bytes: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, row_bytes), dtype=np.uint8)


def as_pool(content: np.ndarray[Any, Any], where: str) -> torch.Tensor:
    """On a GPU, page-locked for it, or (interpreted) plain memory for both."""
    pool = torch.from_numpy(content.copy())
    if not torch.cuda.is_available():
        return pool
    return pool.cuda() if where == "device" else pool.pin_memory()


def move(
    source: torch.Tensor, destination: torch.Tensor, pairs: list[tuple[int, int]], programs: int
) -> None:
    from onecast.runtime import kernels

    given = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    if torch.cuda.is_available():
        given = given.cuda()
    kernels.move_rows(kernels.as_words(source), kernels.as_words(destination), given, programs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_moves(row_bytes: int, programs: int, seed: int) -> None:
    """Swaps out and in, then copies, each between rows drawn at random."""
    rng = random.Random(seed)
    model = {"device": make_rows(23, row_bytes, seed), "host": make_rows(17, row_bytes, seed + 1)}
    pools = {where: as_pool(content, where) for where, content in model.items()}
    for _ in range(3):
        for here, there in (("device", "host"), ("host", "device"), ("device", "device")):
            sources, targets = (list(range(len(model[one]))) for one in (here, there))
            rng.shuffle(targets)
            if here == there:  # none is both
                sources, targets = targets[:11], targets[11:]
            count = rng.randint(1, min(len(sources), len(targets)))
            pairs = [(rng.choice(sources), target) for target in targets[:count]]
            move(pools[here], pools[there], pairs, programs)
            for source, target in pairs:
                model[there][target] = model[here][source]
        for where, pool in pools.items():
            np.testing.assert_array_equal(pool.cpu().numpy(), model[where])


# Words of 8, 4, 2 and 1 bytes; one tile and several, full and not; fewer programs than tiles.
SIZES = (
    *((16384, 4), (32768, 3), (40, 2), (8, 7), (32792, 5), (49156, 3), (4, 1), (12, 64)),
    *((16386, 2), (33333, 4), (1, 2), (7, 3), (98304, 1)),
)
CASES: dict[str, Callable[[], None]] = {
    f"{row_bytes} bytes, {programs} programs": partial(check_moves, row_bytes, programs, seed)
    for seed, (row_bytes, programs) in enumerate(SIZES)
}


def check_floats() -> None:
    """Rows of every dtype that a cache may have, signalling NaNs among them."""
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        content = make_rows(5, 6 * dtype.itemsize, number)
        content[1] = 0xFF
        pool = as_pool(content, "device").view(dtype).view(5, 3, 2)
        move(pool.view(5, -1).view(torch.uint8), pool.view(5, -1).view(torch.uint8), [(1, 4)], 2)
        content[4] = content[1]
        got = pool.cpu().view(5, -1).view(torch.uint8).numpy()
        np.testing.assert_array_equal(got, content)


def check_nothing() -> None:
    """No pair, nothing done."""
    content = make_rows(2, 64, 0)
    pool = as_pool(content, "device")
    move(pool, pool, [], 4)
    np.testing.assert_array_equal(pool.cpu().numpy(), content)


def check_far_rows() -> None:
    """Rows beyond 2 ** 31 words; of a row of odd length a word is a byte."""
    row_bytes, count = (1 << 20) + 1, 2100
    assert (count - 1) * row_bytes > 1 << 31
    # Memory that nothing has written to takes no room.
    far = torch.empty(count, row_bytes, dtype=torch.uint8, device=device())
    near = as_pool(make_rows(2, row_bytes, 3), "host")
    expected = near.clone()
    move(near, far, [(1, count - 1), (0, 2048)], 3)
    move(far, near, [(count - 1, 0), (2048, 1)], 3)
    assert torch.equal(near[0], expected[1]) and torch.equal(near[1], expected[0])


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


CASES |= {"floats": check_floats, "nothing": check_nothing, "far rows": check_far_rows}


def main() -> None:
    """Run all cases; one line of JSON last: what went wrong, by case."""
    problems = {}
    for name, check in CASES.items():
        try:
            check()
        except Exception:
            problems[name] = traceback.format_exc()
    print(json.dumps(problems))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What went wrong in the interpreter, by case."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-W", "error", __file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    problems: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return problems


@pytest.mark.parametrize("case", CASES)
def test_rows_arrive_byte_for_byte_in_the_interpreter(
    case: str, interpreted: dict[str, str]
) -> None:
    assert case not in interpreted, interpreted[case]


@pytest.mark.parametrize("case", [pytest.param(case, marks=CUDA) for case in CASES])
def test_rows_arrive_byte_for_byte_on_a_gpu(case: str) -> None:
    pytest.importorskip("triton")
    CASES[case]()


def test_words_are_the_widest_that_divide_a_row() -> None:
    kernels = pytest.importorskip("onecast.runtime.kernels", exc_type=ImportError)
    for row_bytes, dtype in (
        (16, torch.int64),
        (12, torch.int32),
        (6, torch.int16),
        (5, torch.uint8),
    ):
        rows = torch.zeros(3, row_bytes, dtype=torch.uint8)
        words = kernels.as_words(rows)
        assert (words.dtype, words.shape) == (dtype, (3, row_bytes // dtype.itemsize))
        assert words.data_ptr() == rows.data_ptr()


@pytest.mark.parametrize("words", [131072, 4098])  # full tiles, and a last one that is not
def test_a_gpu_s_accesses_are_of_16_bytes(
    words: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for a GPU, which takes none; pointers are told to be divisible as pools' are."""
    kernels = pytest.importorskip("onecast.runtime.kernels", exc_type=ImportError)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = dict.fromkeys(("source", "destination"), "*i64") | {"pairs": "*i64"}
    signature |= {"num_tiles": "i32"} | dict.fromkeys(("WORDS", "TILES", "TILE"), "constexpr")
    source = ASTSource(
        fn=kernels._move_rows,
        signature=signature,
        constexprs={"WORDS": words, "TILES": -(-words // 2048), "TILE": 2048},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    compiled = compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.NUM_WARPS}
    )
    accesses = re.findall(r"(ld|st)\.global\S*?((?:\.v\d)?\.b\d+)", compiled.asm["ptx"])
    wide = 2048 * 8 // (kernels.NUM_WARPS * 32 * 16)
    assert Counter(accesses) == {
        ("ld", ".v2.b64"): wide,
        ("st", ".v2.b64"): wide,
        ("ld", ".b64"): 2,
    }


if __name__ == "__main__":
    main()
