"""The guide says what is so: its commands reproduce what it describes, its knobs mend it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jaeger_upload import problems, read_upload
from prometheus_server import RULES, tool

from onecast.runtime.cli import main
from onecast.telemetry.catalogue import CATALOGUE

TUNING = Path(__file__).parent.parent / "deploy" / "tuning"
GUIDE = TUNING / "README.md"
RUNBOOK = re.compile(r"deploy/tuning/README\.md#([a-z-]+)")

sys.path.insert(0, str(TUNING))

import reproduce  # noqa: E402
from situations import SITUATIONS, Outcome, Situation, carry_out  # noqa: E402
from situations.table import number_with_unit, table  # noqa: E402


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _sections() -> dict[str, str]:
    """The text under each heading of the guide, by the anchor that pages make of the heading."""
    parts = re.split(r"^## (.+)$", GUIDE.read_text(), flags=re.MULTILINE)[1:]
    anchors = [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in parts[::2]]
    return dict(zip(anchors, parts[1::2], strict=True))


@pytest.mark.parametrize("name", SITUATIONS)
def test_each_situation_has_a_section_with_its_command_alert_and_questions(name: str) -> None:
    situation, section = SITUATIONS[name](), _sections()[name]
    assert f"deploy/tuning/reproduce.py {name}\n" in section
    assert f"`{situation.alert}`" in section
    for asked in situation.asked:
        assert f"| {asked.what} " in section, "the table is not what the command prints"
    for case in situation.cases:
        assert case.setting in section
    for shown in situation.shown:
        assert f"`{shown.name}`" in section


def test_runbooks_of_alerts_are_sections_of_the_guide() -> None:
    anchors = set(RUNBOOK.findall(RULES.read_text()))
    assert anchors <= _sections().keys()


def test_what_is_kept_may_lie_where_the_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    monkeypatch.setattr(reproduce, "_reproduce", lambda name, folder: folders.append(folder))
    monkeypatch.setattr(sys, "argv", ["reproduce.py", next(iter(SITUATIONS)), "--keep", "a/b"])
    monkeypatch.chdir(tmp_path)
    assert reproduce.main() == 0
    assert folders == [tmp_path / "a" / "b"], "programs are started elsewhere"
    assert folders[0].is_dir()


def _texts() -> str:
    sources = (TUNING / "situations").glob("*.py")
    return GUIDE.read_text() + "".join(source.read_text() for source in sources)


def test_every_series_and_rule_that_is_named_exists() -> None:
    suffixes = ("_bucket", "_sum", "_count")
    known = {
        name for one in CATALOGUE.values() for name in (one.name, *(one.name + s for s in suffixes))
    }
    recorded = {rule["record"] for rule in _rules() if "record" in rule}
    text = _texts()
    assert set(re.findall(r"\bonecast_[a-z_]+[a-z]", text)) <= known
    assert set(re.findall(r"\bonecast:[a-z_]+:[a-z0-9_]+", text)) <= recorded


def test_the_alert_of_each_situation_is_shipped() -> None:
    alerts = {rule["alert"] for rule in _rules() if "alert" in rule}
    assert {build().alert for build in SITUATIONS.values()} <= alerts


def test_every_query_of_the_guide_is_promql(tmp_path: Path) -> None:
    blocks = re.findall(r"(?:^ {4}.*\n)+", GUIDE.read_text(), flags=re.MULTILINE)
    queries = [block for block in blocks if "onecast_" in block]
    rules = [{"record": f"guide:{number}", "expr": query} for number, query in enumerate(queries)]
    assert len(rules) == 4
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "guide", "rules": rules}]}))
    subprocess.run([tool("promtool"), "check", "rules", str(path)], check=True)


def test_every_option_that_the_guide_names_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    known |= {
        "--keep",
        "--agree",
        "--cpu-bind",
        "--hang",
        "--max-restarts",
        "--step",
    }  # not generate's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", GUIDE.read_text())) <= known


def test_numbers_have_three_digits_and_units_that_fit() -> None:
    said = [
        number_with_unit(*of) for of in ((None, "s"), (0.0123, "s"), (2.5e-5, "s"), (3.21, "s"))
    ]
    assert said == ["-", "12.3 ms", "25 us", "3.21 s"]
    said = [
        number_with_unit(*of) for of in ((0.721, "share"), (52936, "B"), (713, "B"), (1266, ""))
    ]
    assert said == ["72.1%", "52.9 kB", "713 B", "1,266"]


def _tried(
    situation: Situation, folder: Path
) -> tuple[dict[str, float | None], dict[str, float | None], Outcome, Outcome]:
    """What the first and the last case came to: answers by question, outcomes."""
    tool("prometheus")
    cases = (situation.cases[0], situation.cases[-1])
    outcomes = carry_out(replace(situation, cases=cases), folder)
    assert table(replace(situation, cases=cases), outcomes).count("\n") > len(situation.asked)
    whats = [asked.what for asked in situation.asked]
    answers = [dict(zip(whats, outcome.values, strict=True)) for outcome in outcomes]
    return answers[0], answers[1], outcomes[0], outcomes[1]


def _number(value: float | None) -> float:
    assert value is not None, "Prometheus has no data"
    return value


slow: Callable[..., Any] = pytest.mark.slow
alone = pytest.mark.usefixtures("nothing_left_behind")


@slow
@alone
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 3, reason="two ranks and a neighbour: 3 CPUs")
def test_a_rank_without_a_core_of_its_own_is_waited_for(tmp_path: Path) -> None:
    before, after, *_ = _tried(SITUATIONS["straggling-rank"](requests=24), tmp_path)

    def excess(answers: dict[str, float | None]) -> float:
        waits = [_number(answers[f"of a step rank {rank} waits for the other"]) for rank in (0, 1)]
        return waits[0] - waits[1]

    assert excess(before) > 0
    assert excess(before) > excess(after)


@slow
@alone
def test_large_blocks_and_shared_memory_make_the_broadcast_small(tmp_path: Path) -> None:
    before, after, first, last = _tried(SITUATIONS["broadcast-too-large"](requests=16), tmp_path)
    assert _number(before["bytes of a frame"]) > 4 * _number(after["bytes of a frame"])
    assert _number(before["broadcasts of a step"]) > 5
    assert after["broadcasts of a step"] == 0
    share = "of a step that rank 0 spends sending"
    assert _number(before[share]) > _number(after[share])
    for outcome in (first, last):
        assert outcome.spans.count("step.publish", 0) == outcome.spans.count("step.receive", 1) > 0


@slow
@alone
def test_blocks_for_all_end_the_swapping(tmp_path: Path) -> None:
    before, after, first, last = _tried(SITUATIONS["swap-thrashing"](requests=48), tmp_path)
    assert _number(before["blocks swapped out"]) > 0
    assert after["blocks swapped out"] == 0
    assert _number(before["preemptions"]) > 0 == after["preemptions"]
    # Of a gauge, only what a scrape happens to see: one that never saw a swapped sequence says 0.
    assert _number(before["sequences off the device, on average"]) >= 0
    assert _number(before["steps"]) > 2 * _number(after["steps"])
    assert {"kv.swap_out", "kv.swap_in"} <= first.spans.names()
    assert not {"kv.swap_out", "kv.swap_in"} & last.spans.names()


@slow
@alone
def test_larger_chunks_take_fewer_steps(tmp_path: Path) -> None:
    before, after, *_ = _tried(SITUATIONS["too-small-chunks"](requests=96), tmp_path)
    a_step = "tokens of prompts a step computes"
    assert 0 < _number(before[a_step]) <= 32 < _number(after[a_step])
    assert _number(before["steps"]) > 4 * _number(after["steps"])


@slow
@alone
def test_a_desync_is_told_of_traced_and_gone_when_ranks_agree(tmp_path: Path) -> None:
    before, after, first, last = _tried(SITUATIONS["desync-hang"](timeout_s=4.0), tmp_path)
    assert (before["desyncs"], after["desyncs"]) == (1, 0)
    assert first.alert is not None and first.alert[0] == "firing"
    assert last.alert is None
    assert first.ended.status != 0 and last.ended.status == 0
    assert "ranks disagree on #97 of default_pg: rank 0 called all_reduce" in first.ended.output
    assert "ranks disagree" not in last.ended.output
    hung = _number(first.spans.longest_s("all_reduce", 0))
    assert hung > 2, "it was in the collective until the group's timeout"
    traces = read_upload((tmp_path / "before" / "trace.json").read_bytes())
    assert traces and not [problem for trace in traces for problem in problems(trace)]
