"""The rank that broke a run is named, not those that only noticed or were ended for it."""

import json
import signal
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from onecast.runtime.failure import root_cause

GLOO_LOST = "RuntimeError: [pair.cc:537] Read error [127.0.0.1]:4: Connection reset by peer"
GLOO_LATE = "RuntimeError: [unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation"


def ended(tmp_path: Path, rank: int, exitcode: int, message: str | None = None) -> ProcessFailure:
    """As the elastic agent makes it: from a worker's error file, or without one."""
    file = tmp_path / f"error-{rank}.json"
    if message is not None:
        extra = {"timestamp": str(int(time.time()))}
        file.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    return ProcessFailure(rank, 1000 + rank, exitcode, str(file))


KILL, TERM, ABORT = -signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT


@pytest.mark.parametrize(
    ("rank_0", "rank_1", "cause", "resumable"),
    [
        ((1, GLOO_LOST), (KILL, None), "rank 1 (pid 1001) was killed by SIGKILL", True),
        ((TERM, None), (KILL, None), "rank 1 (pid 1001) was killed by SIGKILL", True),
        ((1, GLOO_LOST), (TERM, None), "rank 1 (pid 1001) was killed by SIGTERM", True),
        ((1, "PeerLost: rank 1 is lost"), (ABORT, None), "rank 1 (pid 1001) was killed by", True),
        ((TERM, None), (1, "ValueError: 7 is above 5"), "7 is above 5", False),
        ((TERM, None), (1, "OSError: disk"), "rank 1 (pid 1001) failed: OSError: disk", True),
        ((1, GLOO_LATE), (KILL, None), "rank 1 did not answer", True),
        ((130, None), (TERM, None), "rank 0 (pid 1000) was stopped by SIGINT", True),
        ((TERM, None), (1, "FloatingPointError: NaN"), "FloatingPointError", False),
        ((1, GLOO_LOST), (1, "PeerLost: rank 0 is lost"), "rank 0 (pid 1000) failed", True),
    ],
)
def test_the_root_cause_is_named(
    tmp_path: Path,
    rank_0: tuple[int, str | None],
    rank_1: tuple[int, str | None],
    cause: str,
    resumable: bool,
) -> None:
    failures = {0: ended(tmp_path, 0, *rank_0), 1: ended(tmp_path, 1, *rank_1)}
    found, can_resume = root_cause(failures)
    assert cause in found
    assert can_resume is resumable
