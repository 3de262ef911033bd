"""The dashboards are what their code says, and every panel shows something of a real run."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import completion, finish, generate_args, start, write_batch
from prometheus_server import DEPLOY, Prometheus, free_port, prometheus, wait_for
from serve_runs import ask as ask_server
from serve_runs import completion_body, serving

from onecast.telemetry.catalogue import CATALOGUE

pytest.importorskip("grafana_foundation_sdk", reason="of the extra `dev`: generates the dashboards")
GRAFANA = DEPLOY / "grafana"
sys.path[:0] = [str(GRAFANA), str(DEPLOY / "screenshots")]

from boards import BOARDS, as_json  # noqa: E402
from boards.asking import Span, ask, interpolate, panels_of, variables_of  # noqa: E402
from boards.promql import select  # noqa: E402
from grafana_foundation_sdk.cog.encoder import JSONEncoder  # noqa: E402
from grafana_foundation_sdk.cog.plugins import register_default_plugins  # noqa: E402
from grafana_foundation_sdk.models.dashboard import Dashboard  # noqa: E402

PIECES = ("_bucket", "_sum", "_count")


def committed(name: str) -> dict[str, Any]:
    board: dict[str, Any] = json.loads((GRAFANA / "dashboards" / f"{name}.json").read_text())
    return board


def drawn(board: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels that show something: rows do not."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("name", BOARDS)
def test_the_committed_file_is_what_the_code_generates(name: str) -> None:
    path = GRAFANA / "dashboards" / f"{name}.json"
    assert path.read_text() == as_json(BOARDS[name]()), "run deploy/grafana/generate.py"


def test_no_other_file_lies_beside_the_generated_ones() -> None:
    found = {path.stem for path in (GRAFANA / "dashboards").iterdir()}
    assert found == BOARDS.keys()


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_survives_being_read_and_written_by_grafanas_schema(name: str) -> None:
    register_default_plugins()
    board = committed(name)
    read = Dashboard.from_json(board)
    assert json.loads(JSONEncoder().encode(read)) == board


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_has_a_unit_and_says_what_to_do_when_it_looks_bad(name: str) -> None:
    board = committed(name)
    for panel in drawn(board):
        title = panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], title
        assert len(panel["description"]) > 60, title
        assert re.search(r"[.:;,] ", panel["description"]), title  # more than what is shown
        assert panel["datasource"]["uid"] == "${datasource}", title
        assert panel["targets"], title
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    described = [panel["description"] for panel in drawn(board)]
    assert len(set(described)) == len(described)


@pytest.mark.parametrize("name", BOARDS)
def test_panels_lie_side_by_side_and_fill_their_rows(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in committed(name)["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert 0 <= x < 24
                assert (x, y) not in taken, f"{panel['title']} over {taken[x, y]}"
                taken[x, y] = panel["title"]
    for y in {y for _, y in taken}:
        across = sum((x, y) in taken for x in range(24))
        repeated = (
            across == 12 and name == "collectives"
        )  # by operation: fills up as Grafana repeats
        assert across == 24 or repeated, f"a hole beside {taken[0, y]}"


def test_links_lead_from_each_board_to_all_others() -> None:
    for name in BOARDS:
        board = committed(name)
        (link,) = board["links"]
        assert link["type"] == "dashboards" and set(link["tags"]) <= set(board["tags"])
        assert link["keepTime"] and link["includeVars"]
    assert len({committed(name)["uid"] for name in BOARDS}) == len(BOARDS)


@pytest.mark.parametrize("name", BOARDS)
def test_every_series_that_a_board_asks_for_is_in_the_catalogue(name: str) -> None:
    known = {
        series + piece
        for series, metric in CATALOGUE.items()
        for piece in (PIECES if metric.kind == "histogram" else ("",))
    }
    board = committed(name)
    asked = [target["expr"] for panel in drawn(board) for target in panel["targets"]]
    asked += [
        one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query"
    ]
    for expr in asked:
        found = set(re.findall(r"\bonecast_\w+", expr))
        assert found and found <= known, expr


def test_a_series_or_label_that_is_not_there_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="no series 'onecast_steps_total'"):
        select("onecast_steps_total")
    with pytest.raises(ValueError, match="no label 'op'"):
        select("onecast_step_duration_seconds_sum", op="all_reduce")
    assert select("onecast_hangs_total") == 'onecast_hangs_total{job=~"$job",instance=~"$instance"}'


def test_variables_are_filled_in_as_grafana_does() -> None:
    chosen = {"rank": ["0", "1"], "op": ["a.b"]}
    assert interpolate('x{rank=~"$rank"}', chosen) == 'x{rank=~"(0|1)"}'
    assert interpolate('x{op=~"${op}"}', chosen) == 'x{op=~"a\\\\.b"}'
    assert interpolate('label_replace(x, "a", "$1", "b", "(.*)")', chosen).count("$1") == 1
    builtin = Span(0, 60, 1, 5).builtin()
    assert interpolate("[$__rate_interval]", {}, builtin) == "[20000ms]"
    with pytest.raises(ValueError, match=r"no variable \$group"):
        interpolate("$group", chosen)


def test_exemplars_lead_to_the_data_source_of_traces() -> None:
    sources = yaml.safe_load((GRAFANA / "provisioning/datasources/onecast.yml").read_text())
    by_type = {source["type"]: source for source in sources["datasources"]}
    (leads,) = by_type["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert leads["datasourceUid"] == by_type["jaeger"]["uid"]
    assert leads["name"] == "trace_id"  # the label that /metrics writes, seen below
    providers = yaml.safe_load((GRAFANA / "provisioning/dashboards/onecast.yml").read_text())
    assert [one["type"] for one in providers["providers"]] == ["file"]


def test_kustomize_makes_a_map_of_every_board() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not here")
    built = subprocess.run([kubectl, "kustomize", GRAFANA], capture_output=True, check=True)
    maps = list(yaml.safe_load_all(built.stdout))
    texts = {name: text for one in maps for name, text in one["data"].items()}
    assert texts == {f"{name}.json": as_json(build()) for name, build in BOARDS.items()}
    assert all(one["metadata"]["labels"]["grafana_dashboard"] == "1" for one in maps)
    assert max(map(len, texts.values())) < 250_000  # kubectl apply keeps a copy in an annotation


class _Observed:
    """Prometheus after a run that it scraped, the times of the run, and its traces."""

    def __init__(self, server: Prometheus, span: Span, traces: set[str]) -> None:
        self.get, self.span, self.traces = server.get, span, traces

    def without_data(self, board: dict[str, Any]) -> list[str]:
        """Titles of panels with a query that finds no number."""
        found = []
        variables = variables_of(board, self.get, self.span)
        for panel, chosen in panels_of(board, variables):
            if panel["type"] == "row":
                continue
            for answer in ask(panel, chosen, self.get, self.span):
                values = [v for _, series in answer.series for _, v in series]
                if not any(map(math.isfinite, values)):
                    found.append(f"{panel['title']}: {answer.expr}")
        return found


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Observed]:
    """A batch on two ranks with swaps, copies, hits of the prefix cache, and steps by broadcast,
    and then a server, whose metrics come at the same address."""
    folder, port = tmp_path_factory.mktemp("grafana"), free_port()
    shared = "And it came to pass in those days, that the king of the land said unto them, " * 2
    lines = [
        completion(
            f"r{i}",
            (shared if i % 2 else "") + "And the king said " * (1 + i % 7),
            max_tokens=8 + 12 * (i % 5),
            n=1 + i % 2,
            temperature=0.8,
        )
        for i in range(120)
    ]
    traces = folder / "batch.trace.json", folder / "server.trace.json"
    options = ("--num-blocks=56", "--num-host-blocks=32", f"--trace={traces[0]}")
    args = generate_args(
        write_batch(folder / "in.jsonl", lines), folder / "out.jsonl", *options,
        "--channel=process-group", f"--metrics-port={port}",
    )  # fmt: skip
    with prometheus(folder, f"127.0.0.1:{port}") as server:
        wait_for(lambda: server.get("query", query="up")["result"], "Prometheus tries to scrape")
        began_s = time.time()
        status, _, err = finish(start(*args))
        assert status == 0, err
        with serving(f"--metrics-port={port}", f"--trace={traces[1]}") as one:
            for body in (b"{", *[completion_body()] * 3):
                ask_server(one.url, "/v1/completions", body)
                time.sleep(1)
        up = server.get(
            "query_range",
            query="min(onecast_up) == 1",
            start=str(began_s),
            end=str(time.time()),
            step="0.2",
        )["result"]
        lived = [float(t) for t, _ in up[0]["values"]]
        span = Span(lived[0], lived[-1], step_s=0.5, scrape_s=0.5)
        entries = [entry for trace in traces for entry in json.loads(trace.read_text())["data"]]
        spans = [one for entry in entries for one in entry["spans"]]
        yield _Observed(server, span, {one["traceID"] for one in spans})


@pytest.mark.slow
@pytest.mark.parametrize("name", BOARDS)
def test_every_query_of_every_panel_finds_data_of_a_real_run(
    observed: _Observed, name: str
) -> None:
    assert observed.without_data(committed(name)) == []


@pytest.mark.slow
def test_a_panel_that_asks_for_nothing_is_noticed(observed: _Observed) -> None:
    board = committed("step-broadcast")
    text = json.dumps(board).replace('part=\\"wait\\"', 'part=\\"weight\\"')
    assert {title.partition(":")[0] for title in observed.without_data(json.loads(text))} == {
        "Workers",
        "Workers' wait for the frame",
    }


@pytest.mark.slow
def test_the_variables_offer_what_the_run_had(observed: _Observed) -> None:
    found = variables_of(committed("collectives"), observed.get, observed.span)
    assert found["job"] == ["onecast"] and found["rank"] == ["0", "1"]
    assert {"all_reduce", "broadcast"} <= set(found["op"])
    assert {"tp", "control"} <= set(found["group"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["overview", "collectives", "step-broadcast"])
def test_the_points_on_a_panel_lead_to_traces_of_that_run(observed: _Observed, name: str) -> None:
    board = committed(name)
    variables = variables_of(board, observed.get, observed.span)
    seen: dict[str, int] = {}
    for panel, chosen in panels_of(board, variables):
        if not any(target.get("exemplar") for target in panel.get("targets", [])):
            continue
        for answer in ask(panel, chosen, observed.get, observed.span):
            seen[panel["title"]] = seen.get(panel["title"], 0) + len(answer.exemplars)
            assert {labels["trace_id"] for _, _, labels in answer.exemplars} <= observed.traces
    seen.pop("Latency of all_gather", None)  # of the run's first second: none may have been kept
    assert seen and all(seen.values()), seen


@pytest.mark.slow
def test_every_panel_can_be_drawn(observed: _Observed, tmp_path: Path) -> None:
    dashboards = pytest.importorskip("dashboards", reason="playwright draws the pictures")
    for program in ("npm", "chromium"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not here")
    shown = {name: dashboards.show(name, observed.get, observed.span) for name in BOARDS}
    assert dashboards.draw(shown, tmp_path, 1600) == []
    assert {path.name for path in tmp_path.iterdir()} == {f"dashboard_{n}.png" for n in BOARDS}
