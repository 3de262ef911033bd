"""`onecast telemetry run`: the program takes its place, and finds the options in its variables."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from auto_runs import ONECAST_RUN, wait_until

from onecast.telemetry.run_command import AUTOLOAD
from onecast.telemetry.settings import TelemetrySettings

SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ONECAST_RUN, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def variables_of(*arguments: str, **variables: str) -> dict[str, str]:
    result = run(*arguments, "--", sys.executable, "-c", SHOW, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    found: dict[str, str] = json.loads(result.stdout)
    return found


def test_options_arrive_as_settings(tmp_path: Path) -> None:
    found = variables_of(
        "--port", "9123", "--host", "::1", "--trace", "trace.json", "--otlp", "http://c:4318",
        "--one-in", "7", "--hang", "2.5", "--step", "collectives:130", "--ddp-hook",
        OTEL_TRACES_EXPORTER="none",
    )  # fmt: skip
    settings = TelemetrySettings.from_env(found)
    assert (settings.metrics_host, settings.metrics_port) == ("::1", 9123)
    assert settings.trace_file == str(Path.cwd() / "trace.json")
    assert settings.otlp_endpoint == "http://c:4318/v1/traces"
    assert (settings.trace_one_in, settings.hang_s) == (7, 2.5)
    assert (settings.auto_step, settings.ddp_hook) == ("collectives:130", True)


@pytest.mark.parametrize(
    ("options", "endpoint", "protocol"),
    [
        (["--otlp", "http://c:4318/"], "http://c:4318/v1/traces", "http/protobuf"),
        (["--otlp", "http://c/own/path"], "http://c/own/path", "http/protobuf"),
        (["--otlp", "http://c:4317", "--otlp-protocol", "grpc"], "http://c:4317", "grpc"),
    ],
)
def test_an_endpoint_is_meant_for_traces(options: list[str], endpoint: str, protocol: str) -> None:
    settings = TelemetrySettings.from_env(
        variables_of(*options, OTEL_EXPORTER_OTLP_ENDPOINT="http://elsewhere:1")
    )
    assert (settings.otlp_endpoint, settings.otlp_protocol) == (endpoint, protocol)


def test_what_is_not_given_stays_as_the_variables_say() -> None:
    before = {"ONECAST_HANG_S": "5", "PYTHONPATH": "/somewhere:/else"}
    found = variables_of(**before)
    assert found.pop("PYTHONPATH") == f"{AUTOLOAD}:/somewhere:/else"
    changed = {name: text for name, text in found.items() if os.environ.get(name) != text}
    assert changed.items() <= {"ONECAST_HANG_S": "5", "LC_CTYPE": "C.UTF-8"}.items()
    assert variables_of(PYTHONPATH="")["PYTHONPATH"] == AUTOLOAD
    twice = variables_of("--", *ONECAST_RUN, PYTHONPATH="")
    assert twice["PYTHONPATH"] == AUTOLOAD


def test_status_and_output_are_the_programs() -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    result = run(sys.executable, "-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (7, "out\n", "err\n")
    result = run("--", "sh", "-c", "kill -SEGV $$")
    assert result.returncode == -signal.SIGSEGV
    result = run("--", "sh", "-c", "yes | head -1")  # `yes` ends by SIGPIPE, which Python ignores
    assert (result.stdout, result.stderr) == ("y\n", "")


def test_signals_reach_the_program(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'up').touch()\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([*ONECAST_RUN, "--", sys.executable, "-c", code])
    wait_until((tmp_path / "up").exists, "the program to start")
    process.terminate()
    assert process.wait(30) == 5


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, "no program was given"),
        (["--"], 2, "no program was given"),
        (["--", "no-such-program"], 127, "no-such-program: command not found"),
        (["--", "{unrunnable}"], 126, "Exec format error"),
        (["--step", "sometimes", "--", "true"], 2, "--step is 'sometimes'"),
        (["--hang", "-1", "--", "true"], 2, "--hang is -1.0"),
        (["--port", "99999", "--", "true"], 2, "--port is 99999; it must be 0 to 65535"),
        (["--one-in", "-1", "--", "true"], 2, "--one-in is -1; it must be 0 to"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(
    arguments: list[str], status: int, says: str, tmp_path: Path
) -> None:
    unrunnable = tmp_path / "unrunnable"
    unrunnable.write_bytes(b"\x7fELF, but not really")
    unrunnable.chmod(0o755)
    result = run(*(argument.format(unrunnable=unrunnable) for argument in arguments))
    assert result.returncode == status
    assert says in result.stderr and result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_mistaken_variable_is_told_by_its_name() -> None:
    result = run("--", "true", ONECAST_RING_RECORDS="many")
    assert result.returncode == 2 and "ONECAST_RING_RECORDS is 'many'" in result.stderr
