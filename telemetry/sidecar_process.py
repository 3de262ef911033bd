"""Starts a sidecar and waits until it listens.

Owns the child's command line and the one line it answers. Knows nothing of what it computes, nor of
who else may have started one: `sidecar_watch` does.

    child -> parent, one JSON object:   {"ready": {...}}     the fields of sidecar.json, or
                                        {"error": text, "kind": "settings", "port", "busy" or null}

After that line the pipe is closed, and the child belongs to nobody: any rank asks it through its
socket (`report_socket`).
"""

import json
import os
import select
import subprocess
import sys
import time
from typing import Any

from .cursors import SidecarBusy
from .errors import TelemetryError
from .settings import TelemetrySettings
from .sidecar_record import SidecarRecord

# A program may have been made to import things at its start (PYTHONPATH with a sitecustomize, as
# opentelemetry-instrument has it): the sidecar is to import none of them, yet to find what the
# program finds. So nothing comes from the environment (-E, -P), and the path is handed over.
_BOOT = """
import sys
sys.path[:] = sys.argv.pop(1).splitlines()
from onecast.telemetry.sidecar import main
sys.exit(main())
"""


class PortInUse(ValueError):
    """Somebody else listens at the metrics port."""


_ERRORS: dict[str | None, type[Exception]] = {
    "settings": ValueError,
    "port": PortInUse,
    "busy": SidecarBusy,
    None: TelemetryError,
}


def start_sidecar(
    run_dir: str,
    local_world_size: int,
    engine_id: str,
    settings: TelemetrySettings,
    after: SidecarRecord | None = None,
) -> tuple[subprocess.Popen[bytes], SidecarRecord]:
    """Call it with the directory's lock held.

    `after`: what a sidecar that takes the place of another needs to know: the port to take again,
    and its counts of restarts.

    Raises ValueError if the settings cannot be (PortInUse is one), SidecarBusy if there is a
    sidecar already, TelemetryError if this one fails to start.
    """
    command = [
        sys.executable, "-E", "-P", "-c", _BOOT,
        "\n".join(_module_path()),
        "--run-dir", run_dir,
        "--local-world-size", str(local_world_size),
        "--engine-id", engine_id,
        "--settings", settings.to_json(),
    ]  # fmt: skip
    if after is not None:
        command += ["--restarts", str(after.restarts), "--in-a-row", str(after.in_a_row)]
        if after.port is not None:
            command += ["--again-at-port", str(after.port)]
    # A session of its own: Ctrl-C at the terminal ends the ranks, and the sidecar writes
    # down what they did, and then ends because they have.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        answer = _read_line(process, settings.start_timeout_s)
        if "error" in answer:
            raise _ERRORS[answer["kind"]](answer["error"])
        return process, SidecarRecord(**answer["ready"])
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        process.stdout.close()


def _module_path() -> list[str]:
    """This process's, but the folder of its script last: that may hold anything."""
    script = "" if sys.flags.safe_path or not sys.path else sys.path[0]
    entries = [each for each in sys.path if each and each != script]
    # What is no path is for an import hook (an editable installation has one).
    absolute = (os.path.abspath(each) if os.path.exists(each) else each for each in entries)
    return [*absolute, *([os.path.abspath(script)] if script else [])]


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> dict[str, Any]:
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    poll = select.poll()  # not select(): a program may have more than 1024 files open
    poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TelemetryError(
                f"the telemetry sidecar (pid {process.pid}) did not start within {timeout_s:.1f} s"
            )
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            raise TelemetryError(
                f"the telemetry sidecar (pid {process.pid}) ended with status "
                f"{process.wait(5)} before it could start"
            )
        line += chunk
    answer = json.loads(line)
    assert isinstance(answer, dict)
    return answer
