"""Takes the pictures of the Grafana dashboards, from data of a real run and a real Prometheus.

    .venv/bin/python deploy/screenshots/dashboards.py [--requests N] [--keep FILE | --from FILE]

The boards are the files that Grafana reads, their queries are asked as Grafana asks them, and what
comes back is drawn by uPlot, the library that Grafana draws with, in Chromium; there is no Grafana
here. Needs prometheus, Chromium, playwright, and npm for uPlot.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_BOARDS = _HERE.parent / "grafana" / "dashboards"
_TOOLS = _ROOT / "build" / "tools"
_UPLOT = "1.6.32"
_POINTS = 400

sys.path[:0] = [str(_HERE), str(_HERE.parent / "grafana")]  # PYTHONSAFEPATH leaves them out

import observed_run  # noqa: E402
from boards.asking import Answer, Span, ask, panels_of, variables_of  # noqa: E402

ORDER = ("overview", "collectives", "step-broadcast", "kv-cache", "requests")


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the pictures of the Grafana dashboards.")
    parser.add_argument("--requests", type=int, default=1200, help="of each of the three runs")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=_HERE)
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--keep", type=Path, help="write what Prometheus answered to this file, too")
    kept.add_argument("--from", dest="kept", type=Path, help="draw what --keep wrote; no run")
    options = parser.parse_args()
    if options.kept:
        shown = json.loads(options.kept.read_text())
    else:
        shown = _observe(options.requests, options.tp)
    if options.keep:
        options.keep.write_text(json.dumps(shown))
    for title in draw(shown, options.out, options.width):
        print(f"nothing to show: {title}", file=sys.stderr)


def _observe(requests: int, tp: int) -> dict[str, Any]:
    """What each board shows of one run, by its name."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), observed_run.free_port()
        with observed_run.prometheus(folder, f"127.0.0.1:{port}") as address:
            began_s, ended_s = observed_run.run(folder, port, requests, tp)
            get = observed_run.getter(address)
            first_s, last_s = observed_run.lived(get, began_s, ended_s, tp)
            step_s = max(observed_run.SCRAPE_S, math.ceil((last_s - first_s) / _POINTS))
            span = Span(first_s, last_s, step_s, observed_run.SCRAPE_S)
            return {name: show(name, get, span) for name in ORDER}


def show(name: str, get: Any, span: Span) -> dict[str, Any]:
    """A board with the data of its panels, as the page takes it."""
    board = json.loads((_BOARDS / f"{name}.json").read_text())
    variables = variables_of(board, get, span)
    shown = dict.fromkeys(variables, "All")
    if "op" in variables:  # a heat map each: of those that a run does more than a few times
        variables["op"] = _frequent(get, span)
        shown["op"] = " + ".join(variables["op"])
    panels = [
        {**panel, "answers": []}
        if panel["type"] == "row"
        else {**panel, "answers": [_plain(one) for one in ask(panel, chosen, get, span)]}
        for panel, chosen in panels_of(board, variables)
    ]
    return {
        "title": board["title"],
        "variables": list(shown.items()),
        "from": span.start_s,
        "to": span.end_s,
        "step": span.step_s,
        "panels": panels,
    }


def _frequent(get: Any, span: Span) -> list[str]:
    calls = f"increase(onecast_collective_calls_total[{int(span.end_s - span.start_s)}s])"
    asked = f"sum by (op) ({calls}) > 100"
    found = get("query", query=asked, time=str(span.end_s))["result"]
    return sorted(one["metric"]["op"] for one in found)


def _plain(answer: Answer) -> dict[str, Any]:
    """Values that are no numbers are gaps."""
    series = [
        {
            "name": answer.legend(labels),
            "le": labels.get("le"),
            "values": [[t, v if math.isfinite(v) else None] for t, v in values],
        }
        for labels, values in answer.series
    ]
    return {"series": series, "exemplars": [[t, v] for t, v, _ in answer.exemplars]}


def _uplot() -> Path:
    """The folder of uPlot's files; fetched from npm once."""
    found = _TOOLS / "node_modules" / "uplot" / "dist"
    if not (found / "uPlot.iife.min.js").is_file():
        _TOOLS.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-save", "--no-audit", "--no-fund", f"uplot@{_UPLOT}"]
        subprocess.run([*command, "--prefix", str(_TOOLS)], check=True, stdout=subprocess.DEVNULL)
    return found


def draw(shown: dict[str, Any], out: Path, width: int) -> list[str]:
    """One picture per board into `out`; returns the panels that had nothing to show."""
    uplot = _uplot()
    empty: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        for name, board in shown.items():
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.goto((_HERE / "panels.html").as_uri())
            page.add_style_tag(path=uplot / "uPlot.min.css")
            page.add_style_tag(path=_HERE / "panels.css")
            page.add_script_tag(path=uplot / "uPlot.iife.min.js")
            for script in ("units.js", "plots.js", "panels.js"):
                page.add_script_tag(path=_HERE / script)
            page.evaluate("board => drawBoard(board)", board)
            page.wait_for_timeout(200)  # uPlot draws in the next frame
            empty += page.eval_on_selector_all(
                "section:has(.none) h2", "found => found.map((one) => one.textContent)"
            )
            path = out / f"dashboard_{name}.png"
            page.screenshot(path=path, full_page=True)
            page.close()
            print(f"{path}: {path.stat().st_size} bytes")
        browser.close()
    return empty


if __name__ == "__main__":
    main()
