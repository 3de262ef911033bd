"""The sidecar: exact counts while the ranks run, and gone with its files when they are."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prometheus_client.openmetrics.parser as openmetrics
import pytest
from prometheus_client import parser as text_format

from onecast.comm.testing import run_ranks
from onecast.telemetry import (
    Session,
    TelemetrySettings,
    make_run_dir,
    start_session,
)
from onecast.telemetry.sidecar_record import SidecarRecord


def get(url: str, accept: str = "") -> str:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def samples(text: str, parse: Any = text_format.text_string_to_metric_families) -> dict[Any, float]:
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def alone(**changes: Any) -> Session:
    """A session of a single rank in this process."""
    return start_session(
        rank=0,
        local_rank=0,
        world_size=1,
        local_world_size=1,
        engine_id="alone",
        settings=TelemetrySettings(**changes),
    )


def _two_ranks(rank: int, run_dir: str) -> Any:
    import torch
    import torch.distributed as dist

    session = start_session(
        rank=rank,
        local_rank=rank,
        world_size=2,
        local_world_size=2,
        engine_id="engine",
        settings=TelemetrySettings(),
        run_dir=run_dir,
    )
    x = torch.ones(512)  # 2 KiB
    for step in range(20):
        with session.step(step, batch_size=3):
            with session.phase("model.forward"):
                for _ in range(5):
                    dist.all_reduce(x)
            with session.phase("sample"):
                dist.broadcast(x, 0)
        session.probe.published(step, 18_000, 33, 1, 1000, 3000, 8000)
    if rank == 0:
        session.set_value("kv_blocks.device.used", 12)
        session.set_value("kv_blocks_moved.swap_in", 7)
        session.set_value("tokens.generated", 345)
    dist.barrier()
    found = None
    url = session.metrics_url
    assert url is not None
    if rank == 0:
        base = url.removesuffix("/metrics")
        found = {
            "text": get(url),
            "openmetrics": get(url, "application/openmetrics-text; version=1.0.0"),
            "healthz": get(base + "/healthz"),
            "report": json.loads(get(base + "/report")),
            "asked": session.report(timeout_s=5),
        }
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(base + "/else")
    else:  # any rank may ask
        found = {"url": url, "asked": session.report()}
    dist.barrier()
    final = session.close()
    assert session.close() == final
    return found, final


def test_two_ranks_are_counted_exactly_and_nothing_stays_behind() -> None:
    run_dir = make_run_dir()
    (found, final), (other, none) = run_ranks(_two_ranks, 2, run_dir)
    assert none is None, "local rank 0 alone waits for the end"
    assert not os.path.exists(run_dir)

    plain = samples(found["text"])
    openmetric = samples(found["openmetrics"], openmetrics.text_string_to_metric_families)
    for rank in "01":
        series = (("group", "default_pg"), ("op", "all_reduce"), ("rank", rank), ("size", "4KiB"))
        duration = (("clock", "host"), *series[:1], ("mode", "eager"), *series[1:])
        name = "onecast_collective_duration_seconds"
        for text in (plain, openmetric):
            assert text[f"{name}_count", *duration] == 100
            bucket = (*duration[:2], ("le", "+Inf"), *duration[2:])
            assert text[f"{name}_bucket", *bucket] == 100
            assert text["onecast_collective_payload_bytes_total", *series] == 100 * 2048
            assert text["onecast_collective_bus_bytes_total", *series] == 100 * 2048  # n = 2
            assert text["onecast_collective_sequence", *series[:3]] == 119  # of the group
            assert text["onecast_step_duration_seconds_count", ("rank", rank)] == 20
            phase = (("phase", "model.forward"), ("rank", rank))
            assert text["onecast_step_phase_seconds_count", *phase] == 20
            frame = (("channel", "step"), ("direction", "published"), ("rank", rank))
            assert text["onecast_frame_metadata_bytes_sum", *frame] == 20 * 33
            assert text["onecast_frame_bytes_count", *frame] == 20
            assert text["onecast_frame_broadcasts_total", *frame] == 20
            part = (("channel", "step"), ("part", "publish"), ("rank", rank))
            assert text["onecast_frame_seconds_sum", *part] == pytest.approx(20 * 5e-6)
            assert text["onecast_up", ("rank", rank)] == 1
            unrecorded = (("group", "default_pg"), ("rank", rank))
            assert text["onecast_collective_unrecorded_total", *unrecorded] == 0
    gauge = ("onecast_kv_blocks", ("pool", "device"), ("rank", "0"), ("state", "used"))
    assert plain[gauge] == 12
    moved = ("onecast_kv_blocks_moved_total", ("direction", "swap_in"), ("rank", "0"))
    assert plain[moved] == 7
    assert ("onecast_kv_blocks_moved_total", ("direction", "copy"), ("rank", "0")) not in plain
    assert plain["onecast_tokens_total", ("kind", "generated"), ("rank", "0")] == 345
    assert not any(value for key, value in plain.items() if "dropped" in key[0])

    assert found["healthz"] == "ok\n"
    for report in (found["report"], found["asked"], other["asked"], final):
        assert report["steps"] == 20 and report["dropped"] == 0 and report["trace_file"] is None
        by_key = {(each["op"], each["rank"]): each for each in report["collectives"]}
        for rank in (0, 1):
            all_reduce = by_key["all_reduce", rank]
            assert (all_reduce["count"], all_reduce["bytes"]) == (100, 100 * 2048)
            assert 0 < all_reduce["p50_s"] <= all_reduce["p99_s"] < 10
    assert final["ranks"] == [0, 1]


KILLED_RANK = """
import sys, time
from onecast.telemetry import TelemetrySettings, start_session
from onecast.telemetry.sidecar_record import SidecarRecord
rank, run_dir = int(sys.argv[1]), sys.argv[2]
session = start_session(rank=rank, local_rank=rank, world_size=2, local_world_size=2, engine_id="e",
                        settings=TelemetrySettings(trace_file=sys.argv[3]), run_dir=run_dir)
ring = session._ring
with session.step(0, 1), session.phase("model.forward"):
    pass
scope = session.step(1, 1)
scope.__enter__()
session.phase("model.forward").__enter__()
print(SidecarRecord.read(run_dir).pid, flush=True)
time.sleep(60)
"""


def _without_a_run_dir(rank: int) -> tuple[str, list[int] | None]:
    import torch
    import torch.distributed as dist

    session = start_session(
        rank=rank,
        local_rank=rank,
        world_size=2,
        local_world_size=2,
        engine_id="engine",
        settings=TelemetrySettings(),
    )
    dist.all_reduce(torch.ones(4))
    final = session.close()
    return session.run_dir, None if final is None else final["ranks"]


def test_ranks_agree_on_a_directory_of_their_own_where_none_is_given() -> None:
    (first, ranks), (second, nothing) = run_ranks(_without_a_run_dir, 2)
    assert first == second
    assert ranks == [0, 1] and nothing is None
    assert not Path(first).exists()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_after_sigkill_of_all_ranks_the_sidecar_writes_what_it_has_and_leaves(
    tmp_path: Path,
) -> None:
    run_dir = make_run_dir()
    trace = tmp_path / "trace.json"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", KILLED_RANK, str(rank), run_dir, str(trace)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        pids = []
        for process in ranks:
            assert process.stdout is not None
            pids.append(int(process.stdout.readline()))
        sidecar = pids[0]
        assert _alive(sidecar)
        assert os.getsid(sidecar) == sidecar, "Ctrl-C at the ranks' terminal must not reach it"
        for process in ranks:
            process.kill()
        wait_until(lambda: not _alive(sidecar), "the sidecar ends after its ranks", 8)
        assert not os.path.exists(run_dir)
        spans = [span for each in json.loads(trace.read_text())["data"] for span in each["spans"]]
        errors = {
            (span["operationName"], tag["value"])
            for span in spans
            for tag in span["tags"]
            if tag["key"] == "error.type"
        }
        assert errors == {
            (name, "never ended") for name in ("engine.step", "worker.step", "model.forward")
        }
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_a_port_in_use_is_a_clear_error_and_leaves_nothing() -> None:
    before = set(os.listdir("/dev/shm"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"metrics port {port} on 127.0.0.1 is already in use"):
            alone(metrics_port=port)
    assert set(os.listdir("/dev/shm")) <= before
    session = alone(metrics_port=port)  # free again at once
    assert session.metrics_url == f"http://127.0.0.1:{port}/metrics"
    session.close()


def test_bad_settings_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="its directory does not exist"):
        alone(trace_file="/nowhere/at/all/trace.json")
    with pytest.raises(ValueError, match=r"cannot listen on 203\.0\.113\.1"):
        alone(metrics_host="203.0.113.1")
    with pytest.raises(ValueError, match="metrics_port is 70000"):
        TelemetrySettings(metrics_port=70000)
    with pytest.raises(ValueError, match="otlp_protocol is 'http/json'"):
        TelemetrySettings(otlp_protocol="http/json")
    with pytest.raises(ValueError, match="is not initialised"):
        start_session(
            rank=0,
            local_rank=0,
            world_size=2,
            local_world_size=2,
            engine_id="e",
            settings=TelemetrySettings(),
        )
    session = alone(metrics_port=None)
    with pytest.raises(ValueError, match=r"'kv' is no telemetry value; the names are kv_blocks"):
        session.set_value("kv", 1)
    session.close()


def test_without_a_port_there_is_no_http_but_a_report() -> None:
    session = alone(metrics_port=None)
    assert session.metrics_url is None
    with session.step(0, 1):
        pass
    assert session.report()["steps"] == 1
    final = session.close()
    assert final is not None and final["steps"] == 1
    assert session.report() == final


def test_sessions_live_side_by_side_and_one_after_the_other() -> None:
    for _ in range(2):
        first, second = alone(), alone()
        assert first.metrics_url != second.metrics_url
        assert first.run_dir != second.run_dir
        with first.step(0, 1):
            pass
        assert first.close() is not None and second.close() is not None
    with pytest.raises(FileNotFoundError):
        os.stat(first.run_dir)


def test_an_exception_inside_a_phase_is_recorded_and_passes() -> None:
    session = alone()
    with pytest.raises(KeyError), session.step(0, 1), session.phase("sample"):
        raise KeyError("x")
    with session.step(1, 1), session.phase("sample"), session.phase("sample"):
        pass
    report = session.report()
    assert [(each["phase"], each["count"]) for each in report["phases"]] == [("sample", 2)]
    assert report["steps"] == 1, "a failed step is no duration"
    session.close()


def test_a_step_that_was_none_is_not_counted_and_a_size_may_come_late(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    session = alone(trace_file=str(trace))
    with session.step(0) as scope:
        scope.set_batch_size(5)
    with session.step(1) as scope:
        with session.phase("step.receive"):
            time.sleep(0.2)  # polls find it open
        scope.discard()
    report = session.close()
    assert report is not None and report["steps"] == 1 and report["phases"] == []
    (only,) = json.loads(trace.read_text())["data"]
    tags = {tag["key"]: tag["value"] for tag in only["spans"][1]["tags"]}
    assert tags == {"onecast.step.id": 0, "onecast.batch.size": 5}


def test_a_session_that_does_not_wait_leaves_the_rest_to_the_sidecar() -> None:
    session = alone()
    run_dir = session.run_dir
    assert run_dir is not None
    record = SidecarRecord.read(run_dir)
    assert record is not None
    assert session.close(wait=False) is None
    wait_until(lambda: not record.alive, "the sidecar ends by itself")
    assert not os.path.exists(run_dir)


def test_settings_come_from_the_environment_in_one_place() -> None:
    def read(**env: str) -> tuple[str | None, str, str]:
        settings = TelemetrySettings.from_env(env)
        return settings.otlp_endpoint, settings.otlp_protocol, settings.service_name

    http, base = "http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT"
    assert read() == (None, http, "onecast")
    assert read(**{base: "http://c:4318/"})[0] == "http://c:4318/v1/traces"
    assert read(**{base: "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})[:2] == (
        "http://c:4317",
        "grpc",
    )
    assert read(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="http://c/x", **{base: "http://d"})[0] == (
        "http://c/x"
    )
    assert read(**{base: "http://c", "OTEL_SDK_DISABLED": "true"})[0] is None
    assert read(**{base: "http://c", "OTEL_TRACES_EXPORTER": "none"})[0] is None
    assert read(OTEL_SERVICE_NAME="svc")[2] == "svc"
    assert TelemetrySettings.from_env({}, trace_file="t").trace_file == "t"
    settings = TelemetrySettings(metrics_port=None, trace_steps=5)
    assert TelemetrySettings.from_json(settings.to_json()) == settings
