"""A real Prometheus scrapes a real run, reads the shipped rules, and gives exemplars back."""

import contextlib
import json
import re
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from lifetimes import alone, place, sidecar_of
from prometheus_server import DEPLOY, RULES, Prometheus, free_port, prometheus, tool, wait_for

from onecast.comm.testing import run_ranks
from onecast.telemetry import VALUES, TelemetrySettings, make_run_dir, start_session
from onecast.telemetry.catalogue import CATALOGUE, markdown_table
from onecast.telemetry.cuda_graphs import graphs_path
from onecast.telemetry.ring import DEVICE, GRAPH, RingWriter, pack_meta
from onecast.telemetry.spans import trace_id

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

STEPS, REDUCTIONS = 30, 5
ENGINE = 'engine "with" quotes\\'
ROOT = Path(__file__).parent.parent
README = ROOT / "telemetry" / "README.md"
CONFIGS = DEPLOY / "prometheus"
VALUE_NAMES = "|".join(f"onecast_{value.metric}(_total)?" for value in VALUES)
LOCAL = ("prometheus", "http_sd", "compose")  # what Debian's promtool can read
__all__ = ["place"]  # a fixture


def _device_and_graph(ring: RingWriter, run_dir: str, rank: int) -> None:
    """What a GPU would have left in the ring: there is none here."""
    one = {"op": "all_reduce", "group": "tp\t1", "group_size": 2, "dtype": "int8", "bytes": 4096}
    manifest = {"name": "decode", "collectives": [one] * 3}
    graphs_path(run_dir, rank).write_text(json.dumps(manifest) + "\n")
    tp = ring.intern("tp\t1")
    meta = pack_meta(DEVICE, ring.intern("all_reduce"), tp, ring.intern("int8"), 2)
    for number in range(7):
        ring.record(1000, 1000 + 3000, meta, number, 4096, 0)
        ring.record(1000, 1000 + 9000, pack_meta(GRAPH), 0, 0, 0)


COUNT = "sum by (op) (onecast_collective_duration_seconds_count{clock='host'})"


def _issue_everything(session: Any, rank: int, server: Prometheus) -> None:
    small, large = torch.ones(512), torch.ones(1 << 18)  # 2 KiB, 1 MiB
    for step in range(STEPS):
        if step == 1 and rank == 0:  # a rate needs a sample before what it counts
            wait_for(lambda: server.query(COUNT), "Prometheus has scraped the first step")
        with session.step(step, batch_size=3):
            with session.phase("step.publish" if rank == 0 else "step.receive"):
                dist.broadcast(small, 0)
            with session.phase("model.forward"):
                for _ in range(REDUCTIONS):
                    dist.all_reduce(large)
        session.probe.published(step, 18_000, 33, 1, 1000, 3000, 8000)
    for value in VALUES:
        session.set_value(value.name, 5)
    now_ns = time.perf_counter_ns()
    session.requests.finished(0, now_ns - 10**9, now_ns - 10**8, now_ns - 10**7, 9, 4, "stop")
    group = dist.group.WORLD
    assert group is not None
    with contextlib.suppress(NotImplementedError):
        group.allreduce([])


def _observed(rank: int, run_dir: str, trace_file: str, port: int, server: Prometheus) -> Any:
    torch.set_num_threads(1)
    rings: list[RingWriter] = []

    def recorder(ring: RingWriter) -> RingWriter:
        rings.append(ring)
        return ring

    session = start_session(
        rank=rank,
        local_rank=rank,
        world_size=2,
        local_world_size=2,
        engine_id=ENGINE,
        settings=TelemetrySettings(metrics_port=port, trace_file=trace_file),
        run_dir=run_dir,
        recorder=recorder,
    )
    _device_and_graph(rings[0], run_dir, rank)
    _issue_everything(session, rank, server)
    session.sample_coverage()
    seen = None
    if rank == 0:
        seen = _ask(server, f"http://127.0.0.1:{port}/metrics")
    dist.barrier()  # rank 1 has been in it all the while: an age to be seen
    session.close()
    return seen


def _ask(server: Prometheus, url: str) -> dict[str, Any]:
    """Everything that is asserted, as soon as Prometheus has seen the last collective."""
    wait_for(
        lambda: server.query(COUNT).get((("op", "all_reduce"),)) == 2 * STEPS * REDUCTIONS,
        "Prometheus has scraped every collective",
    )
    wait_for(lambda: server.query("onecast_collective_in_flight_age_seconds"), "an age in flight")
    bandwidth = "onecast:collective_bus_bandwidth_bytes_per_second:rate1m"
    wait_for(lambda: len(server.query(bandwidth)) == 4, "the rules are evaluated")
    expressions = {
        "durations": "onecast_collective_duration_seconds_count",
        "waits": "sum by (op, rank) (onecast_collective_arrival_wait_seconds_count)",
        "transfers": "sum by (op, rank) (onecast_collective_transfer_seconds_count)",
        "last": "sum by (op) (onecast_collective_last_arrivals_total)",
        "payload": "onecast_collective_payload_bytes_total",
        "bus": "onecast_collective_bus_bytes_total",
        "bandwidth": bandwidth,
        "plain bandwidth": "onecast_collective_bus_bytes_total"
        " / onecast_collective_transfer_seconds_sum",
        "errors": "onecast_collective_errors_total",
        "unrecorded": "onecast_collective_unrecorded_total",
        "steps": "onecast_step_duration_seconds_count",
        "exposed": "onecast_step_exposed_communication_seconds_count",
        "phases": "onecast_step_phase_seconds_count",
        "frames": "onecast_frame_bytes_sum",
        "requests": "onecast_requests_total",
        "queue": "onecast_request_queue_seconds_sum",
        "graph": "onecast_collective_calls_total{mode='graph'}",
        "device": "onecast_collective_duration_seconds_sum{clock='device'}",
        "build": "onecast_build_info",
        "values": f"label_replace({{__name__=~'{VALUE_NAMES}'}}, 'of', '$1', '__name__', '(.*)')",
    }
    with urllib.request.urlopen(
        urllib.request.Request(url, headers={"Accept": "text/plain"}), timeout=10
    ) as answer:
        page = answer.read().decode()
    return {
        **{name: server.query(expression) for name, expression in expressions.items()},
        "names": set(server.get("label/__name__/values")),
        "metadata": server.get("metadata"),
        "exemplars": server.get(
            "query_exemplars",
            query="onecast_collective_duration_seconds_bucket",
            start=str(time.time() - 3600),
            end=str(time.time() + 60),
        ),
        "rules": server.get("rules"),
        "alerts": server.get("alerts"),
        "targets": server.get("targets"),
        "page": page,
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Prometheus knew of one run of two ranks."""
    folder = tmp_path_factory.mktemp("prometheus")
    port = free_port()
    with prometheus(folder, f"127.0.0.1:{port}") as server:
        trace_file = str(folder / "trace.json")
        found: dict[str, Any] = run_ranks(
            _observed, 2, make_run_dir(), trace_file, port, server, timeout_s=120
        )[0]
        return found


def labels(**pairs: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(pairs.items()))


def test_prometheus_counts_exactly_what_was_issued(seen: dict[str, Any]) -> None:
    for rank in "01":
        for op, size, number, nbytes in (
            ("all_reduce", "1MiB", STEPS * REDUCTIONS, 1 << 20),
            ("broadcast", "4KiB", STEPS, 2048),
        ):
            series = {"op": op, "group": "default_pg", "size": size, "rank": rank}
            duration = labels(**series, clock="host", mode="eager")
            assert seen["durations"][duration] == number
            assert seen["waits"][labels(op=op, rank=rank)] == number
            assert seen["transfers"][labels(op=op, rank=rank)] == number
            assert seen["last"][labels(op=op)] == number
            assert seen["payload"][labels(**series)] == number * nbytes
            assert seen["bus"][labels(**series)] == number * nbytes  # of two ranks: factor 1
            assert seen["bandwidth"][labels(**series)] > 0
            assert seen["plain bandwidth"][labels(**series)] > 0
        assert seen["steps"][labels(rank=rank)] == STEPS
        assert seen["exposed"][labels(rank=rank)] == STEPS
        assert seen["phases"][labels(rank=rank, phase="model.forward")] == STEPS
        frame = labels(rank=rank, channel="step", direction="published")
        assert seen["frames"][frame] == STEPS * 18_000
        assert seen["requests"][labels(rank=rank, finish_reason="stop")] == 1
        assert seen["queue"][labels(rank=rank)] == pytest.approx(0.9)
        graph = {"op": "all_reduce", "group": "tp", "size": "4KiB", "rank": rank}
        assert seen["graph"][labels(**graph, mode="graph")] == 7 * 3
        device = labels(**graph, clock="device", mode="eager")
        assert seen["device"][device] == pytest.approx(7 * 3000e-9)
        error = labels(
            op="all_reduce", group="default_pg", rank=rank, error_type="NotImplementedError"
        )
        assert seen["errors"][error] == 1
        assert seen["unrecorded"][labels(group="default_pg", rank=rank)] == 0
    assert len(seen["values"]) == 2 * len(VALUES) and set(seen["values"].values()) == {5}
    assert [dict(found)["engine"] for found in seen["build"]] == [ENGINE]


def test_prometheus_knows_every_series_by_type_and_meaning(seen: dict[str, Any]) -> None:
    for name, metric in CATALOGUE.items():
        # OpenMetrics leaves _total to the samples of a counter.
        (known,) = seen["metadata"][name.removesuffix("_total")]
        assert (known["type"], known["help"]) == (metric.kind, metric.help)
        shown = f"{name}_count" if metric.kind == "histogram" else name
        if name not in ("onecast_hangs_total", "onecast_desyncs_total"):  # there were none
            assert shown in seen["names"], name
    (target,) = seen["targets"]["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


def test_the_manual_has_every_series_as_it_is() -> None:
    text = README.read_text()
    assert markdown_table() in text
    assert set(re.findall(r"`(onecast_[a-z_]+)`", text)) == CATALOGUE.keys()


def test_exemplars_lead_from_a_bucket_to_the_trace_of_a_step(seen: dict[str, Any]) -> None:
    traces = {f"{trace_id(ENGINE, step):032x}" for step in range(STEPS)}
    found = [exemplar for series in seen["exemplars"] for exemplar in series["exemplars"]]
    assert found
    for exemplar in found:
        assert exemplar["labels"]["trace_id"] in traces
        assert re.fullmatch(r"[0-9a-f]{16}", exemplar["labels"]["span_id"])
    assert {series["seriesLabels"]["op"] for series in seen["exemplars"]} == {
        "all_reduce",
        "broadcast",
    }


def test_the_rules_load_and_find_nothing_wrong_with_a_good_run(seen: dict[str, Any]) -> None:
    rules = [rule for group in seen["rules"]["groups"] for rule in group["rules"]]
    assert len(rules) == RULES.read_text().count("- record:") + RULES.read_text().count("- alert:")
    for rule in rules:
        assert rule["health"] in ("ok", "unknown"), rule["name"]
        assert not rule.get("lastError"), rule
    assert any(rule["health"] == "ok" for rule in rules)
    # Of a run of seconds a rank may look like a straggler: that has to last five minutes.
    firing = [alert for alert in seen["alerts"]["alerts"] if alert["state"] == "firing"]
    assert firing == []


def test_promtool_finds_no_fault_with_the_page(seen: dict[str, Any]) -> None:
    checked = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input=seen["page"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", str(RULES)),
        *(("check", "config", str(CONFIGS / f"{name}.yml")) for name in LOCAL),
        ("test", "rules", str(DEPLOY / "prometheus" / "rules_test.yml")),
    ],
    ids=" ".join,
)
def test_promtool_passes_what_is_shipped(arguments: tuple[str, ...]) -> None:
    checked = subprocess.run(
        [tool("promtool"), *arguments], capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "SUCCESS" in checked.stdout and "FAILED" not in checked.stdout


def test_it_finds_the_nodes_of_a_run_by_asking_one(place: Path, tmp_path: Path) -> None:
    peer = alone()
    peer_address = f"127.0.0.1:{sidecar_of(peer.run_dir).port}"
    asked = alone(metrics_peers=(peer_address,))
    address = f"127.0.0.1:{sidecar_of(asked.run_dir).port}"

    def found(server: Prometheus) -> list[tuple[str, str]]:
        targets = server.get("targets")["activeTargets"]
        return sorted((one["labels"]["instance"], one["health"]) for one in targets)

    try:
        with prometheus(tmp_path, address, discovers=True) as server:
            both = sorted([(address, "up"), (peer_address, "up")])
            wait_for(lambda: found(server) == both, "both nodes are found and scraped")
    finally:
        asked.close()
        peer.close()


def test_the_kubernetes_variant_is_one_apart_from_its_discovery(tmp_path: Path) -> None:
    """Debian's Prometheus is built without Kubernetes: files stand in for its discovery."""
    config = yaml.safe_load((CONFIGS / "kubernetes.yml").read_text())
    assert config["rule_files"] == ["rules.yml"]
    (job,) = config["scrape_configs"]
    (discovery,) = job.pop("kubernetes_sd_configs")
    assert discovery["role"] == "pod"
    (selector,) = discovery["selectors"]
    pods = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "podmonitor.yaml").read_text())
    name, _, value = selector["label"].partition("=")
    assert pods["spec"]["selector"]["matchLabels"][name] == value
    job["file_sd_configs"] = [{"files": [str(tmp_path / "pods.json")]}]
    config["rule_files"] = [str(RULES)]
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    test_promtool_passes_what_is_shipped(("check", "config", str(path)))


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_rule_has_its_numbers_and_every_alert_fires_in_one_of_them() -> None:
    tests = yaml.safe_load((CONFIGS / "rules_test.yml").read_text())["tests"]
    expressions = " ".join(
        one["expr"]
        for test in tests
        for one in test.get("promql_expr_test", [])
        if one["exp_samples"]
    )
    fired = {
        one["alertname"]
        for test in tests
        for one in test.get("alert_rule_test", [])
        if one["exp_alerts"]
    }
    recorded = {rule["record"] for rule in _rules() if "record" in rule}
    assert recorded == set(re.findall(r"onecast:[a-z_]+:[a-z0-9_]+", expressions))
    assert fired == {rule["alert"] for rule in _rules() if "alert" in rule}


def test_every_alert_says_what_it_is_what_to_do_and_where_to_read_on() -> None:
    for rule in _rules():
        if "alert" in rule:
            said = rule["annotations"]
            assert said.keys() == {"summary", "description", "runbook_url"}, rule["alert"]
            assert len(said["description"]) > 80, rule["alert"]
            path, _, anchor = said["runbook_url"].partition("#")
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), flags=re.MULTILINE)
            anchors = {
                re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in headings
            }
            assert not anchor or anchor in anchors, said["runbook_url"]


def test_every_rule_reads_series_that_there_are() -> None:
    known = set(CATALOGUE)
    for name, metric in CATALOGUE.items():
        if metric.kind == "histogram":
            known |= {f"{name}_bucket", f"{name}_count", f"{name}_sum"}
    assert set(re.findall(r"\bonecast_[a-z_]+", RULES.read_text())) <= known
