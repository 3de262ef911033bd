"""The live page in a real Chromium, served by the sidecar's own server from real rings."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_nodes import WrittenNode, serving

from onecast.telemetry.page import PAGE

CHROMIUM = next(filter(os.path.exists, ["/usr/bin/chromium"]), None) or shutil.which("chromium")
WIDTHS = (1280, 390)
# What a program may call things, and what a page must never take for markup.
HOSTILE = {
    "op": "<img src=x onerror=\"document.title='owned'\">",
    "group": "</script><script>document.title='owned'</script>\tunique",
    "phase": "\u202eltr\u0007'\"&amp;<b>" + "long " * 12,
    "dtype": "<svg/onload=alert(1)>",
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Open:
    """A page that is open, with all that it asked for and complained of."""

    def __init__(self, browser: Any, url: str, width: int = 1280, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console",
            lambda message: (
                self.complaints.append(message.text)
                if message.type in ("error", "warning")
                else None
            ),
        )
        self.page.goto(url)

    def timeline(self) -> dict[str, int]:
        data = self.page.evaluate("({...document.getElementById('timeline').dataset})")
        return {key: int(value) for key, value in data.items()}

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 10) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
            self.page.wait_for_timeout(30)

    def until_step(self, step: int) -> "Open":
        self.until(lambda: self.timeline().get("step") == step, f"step {step} in the timeline")
        return self

    def text(self, selector: str) -> str:
        return str(self.page.text_content(selector))

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Open]]:
    pages: list[Open] = []

    def open_page(*arguments: Any, **options: Any) -> Open:
        pages.append(Open(browser, *arguments, **options))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


@pytest.fixture
def written(tmp_path: Path) -> WrittenNode:
    return WrittenNode(tmp_path).write_steps(12)


@pytest.fixture
def url(written: WrittenNode) -> Iterator[str]:
    with serving(written) as address:
        yield address


def test_the_page_is_one_document_that_needs_no_other() -> None:
    text = PAGE.decode()
    assert text.count("<script>") == text.count("</script>") == 1
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\(""", text)
    assert not re.search(r"\.innerHTML\s*=|insertAdjacentHTML|document\.write|eval\(", text)


def test_the_timeline_has_a_lane_a_rank_and_a_bar_a_collective(
    opened: Callable[..., Open], url: str
) -> None:
    page = opened(url).until_step(11)
    shown = page.timeline()
    assert (shown["lanes"], shown["bars"], shown["drawn"]) == (4, 80, 80)
    # In the middle of the transfer of each of its collectives a lane has the colour of a bar.
    counts = page.page.evaluate(
        """() => {
            const { canvas, pen } = timeline, ratio = devicePixelRatio;
            const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
            return timeline.step.lanes.map((lane) => {
                const row = Math.round((lane.top + lane.barHeight / 2) * ratio) * canvas.width;
                const at = (ns) => (row + Math.round(timeline.x(ns) * ratio)) * 4;
                const differs = (ns) => [0, 1, 2].some((part) =>
                    Math.abs(data[at(ns) + part] - data[at(100000) + part]) > 60);
                return lane.bars.filter((bar) => differs(bar.end - 50000)).length;
            });
        }"""
    )
    assert counts == [20, 20, 20, 20]
    assert page.page.locator("#strip [role=option]").count() == 12
    assert page.complaints == []
    assert {request.rsplit("/", 1)[0] for request in page.requests} == {url}


def test_it_shows_what_happens_next_by_itself(
    opened: Callable[..., Open], written: WrittenNode, url: str
) -> None:
    page = opened(url).until_step(11)
    written.write_steps(3)
    page.until_step(14)
    page.until(lambda: "15" in page.text("#figures"), "15 steps in the figures")
    page.page.click("#pause")
    asked = len(page.requests)
    written.write_steps(1)
    page.page.wait_for_timeout(1200)
    assert len(page.requests) <= asked + 1, "paused, it asks no more"
    assert page.timeline()["step"] == 14
    page.page.click("#pause")
    page.until_step(15)


def test_hidden_it_asks_for_nothing(opened: Callable[..., Open], url: str) -> None:
    page = opened(url).until_step(11)
    page.page.evaluate(
        """() => { Object.defineProperty(document, "hidden", { value: true, configurable: true });
                   document.dispatchEvent(new Event("visibilitychange")); }"""
    )
    page.page.wait_for_timeout(300)
    asked = len(page.requests)
    page.page.wait_for_timeout(1500)
    assert len(page.requests) == asked
    page.page.evaluate(
        """() => { delete document.hidden;
                   document.dispatchEvent(new Event("visibilitychange")); }"""
    )
    page.until(lambda: len(page.requests) > asked, "a request, once it is seen again")


def test_it_says_that_the_sidecar_is_gone_and_that_it_is_back(
    opened: Callable[..., Open], url: str
) -> None:
    page = opened(url).until_step(11)
    assert page.text("#status") == "Live"
    page.context.set_offline(True)
    page.until(lambda: "does not answer" in page.text("#status"), "the status to say so", 15)
    assert page.timeline()["bars"] == 80, "what was last known stays"
    page.context.set_offline(False)
    page.until(lambda: page.text("#status") == "Live", "the status to say so", 15)


def test_the_straggler_is_named_in_the_tables_and_at_the_bar(
    opened: Callable[..., Open], url: str
) -> None:
    page = opened(url).until_step(11)
    late = page.text("#stragglers tr[data-key='2']")
    assert "▲" in late, late
    page.page.focus("#timeline")
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("ArrowRight")
    detail = page.text("#detail")
    assert re.fullmatch(
        r"all_gather · group tp of 4 · #222 · 16 KiB bfloat16 · rank 0 at 6\d\d µs: "
        r"waited [34]\d\d µs, transfer 100 µs · rank 2 came last, 4\d\d µs after rank [013]",
        detail,
    ), detail
    assert page.text("#said") == detail, "and it is said"


def test_every_choice_can_be_made_with_the_keyboard_alone(
    opened: Callable[..., Open], written: WrittenNode, url: str
) -> None:
    page = opened(url).until_step(11)
    press = page.page.keyboard.press
    reached = []
    for _ in range(40):
        press("Tab")
        reached.append(
            page.page.evaluate(
                """() => { const e = document.activeElement, s = getComputedStyle(e);
                     return [e.id || e.tagName,
                             s.outlineStyle !== "none" && parseFloat(s.outlineWidth) > 1]; }"""
            )
        )
        if reached[-1][0] == "BODY":
            break
    names = [name for name, _ in reached]
    wanted = [
        "pause",
        "strip",
        "older",
        "newer",
        "follow",
        "zoom-out",
        "zoom-in",
        "whole",
        "timeline",
    ]
    assert [name for name in names if name in wanted] == wanted, "in the order of the page, no trap"
    assert names[-1] == "BODY", "and out again"
    assert all(visible for name, visible in reached if name != "BODY"), reached

    page.page.focus("#strip")
    press("ArrowLeft")
    assert page.timeline()["step"] == 10
    assert page.page.get_attribute("#strip", "aria-activedescendant") == "step-10"
    assert page.page.get_attribute("#follow", "aria-pressed") == "false"
    press("Home")
    assert page.timeline()["step"] == 0
    written.write_steps(1)
    page.until(lambda: page.page.locator("#step-12").count() == 1, "the new step in the strip")
    assert page.timeline()["step"] == 0, "who has chosen a step keeps it"

    page.page.focus("#timeline")
    press("]")
    assert page.timeline()["step"] == 1
    press("ArrowRight")
    press("ArrowDown")
    assert "rank 1 at" in page.text("#detail")
    press("End")
    assert "#40 " in page.text("#detail")
    whole = page.timeline()
    press("+")
    press("+")
    near = page.timeline()
    assert (near["to"] - near["from"]) * 4 == pytest.approx(whole["to"] - whole["from"], rel=0.01)
    assert 0 < near["drawn"] < whole["drawn"]
    press("Home")
    assert page.timeline()["from"] < 700_000, "the choice is brought into view"
    press("0")
    assert page.timeline()["to"] == whole["to"]
    press("Escape")
    assert "Choose a bar" in page.text("#detail")
    page.page.focus("#follow")
    press("Space")
    page.until_step(12)


def test_the_wheel_zooms_where_it_points_and_never_catches_the_page(
    opened: Callable[..., Open], url: str
) -> None:
    page = opened(url).until_step(11)
    box = page.page.locator("#canvas").bounding_box()
    page.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    page.page.mouse.wheel(0, 300)
    page.until(lambda: page.page.evaluate("scrollY") > 0, "the page to scroll")
    whole = page.timeline()
    page.page.evaluate("scrollTo(0, 0)")
    page.page.keyboard.down("Control")
    page.page.mouse.wheel(0, -400)
    page.page.keyboard.up("Control")
    page.until(lambda: page.timeline()["to"] < whole["to"], "the timeline to zoom")
    near = page.timeline()
    middle = (near["from"] + near["to"]) / 2
    assert middle == pytest.approx(whole["to"] / 2, rel=0.1)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + box["width"] / 2 + 200, box["y"] + 60, steps=4)
    page.page.mouse.up()
    assert page.timeline()["from"] < near["from"], "dragging moves it"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read_by_everybody(
    opened: Callable[..., Open], tmp_path: Path, width: int, scheme: str
) -> None:
    written = WrittenNode(tmp_path, hang_s=0.05).write_steps(3)
    written.enter(0)
    time.sleep(0.1)
    written.node.poll()
    with serving(written) as address:
        page = opened(address, width, color_scheme=scheme, reduced_motion="reduce").until_step(2)
        page.page.click("#as-table summary")
        page.page.focus("#timeline")
        page.page.keyboard.press("ArrowRight")
        page.page.wait_for_selector("#hanging:not([hidden])")
        assert page.page.evaluate("document.documentElement.scrollWidth") == width
        # Bars, too, stand out from what they lie on: 3 to 1 (WCAG 1.4.11).
        ratios = page.page.evaluate(_CONTRASTS)
        assert all(ratio >= 3 for ratio in ratios.values()), ratios
        moving = page.page.evaluate(
            """() => [...document.querySelectorAll("*")].filter((e) => {
                const s = getComputedStyle(e);
                return parseFloat(s.transitionDuration) > 0 || s.animationName !== "none";
            }).length"""
        )
        assert moving == 0, "asked for no motion, it has none"
        assert page.complaints == []
        axe = pytest.importorskip("axe_playwright_python.sync_playwright")
        found = axe.Axe().run(page.page)
        assert found.violations_count == 0, found.generate_report()


_CONTRASTS = """() => {
    const style = getComputedStyle(document.documentElement);
    const parts = (name) => {
        const hex = style.getPropertyValue(name).trim().slice(1);
        return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255);
    };
    const light = (name, faint) => { // faint: as bars that are not chosen, 45% on the lane
        const under = parts("--lane");
        const [r, g, b] = parts(name)
            .map((c, i) => (faint ? 0.45 * c + 0.55 * under[i] : c))
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const found = {};
    for (const name of ["focus", "bad", 0, 1, 2, 3, 4, 5, 6, 7].map((n) => (n >= 0 ? `op${n}` : n)))
        found[name] = ratio(light("--" + name), light("--lane"));
    const texts = [["text", "phase-a"], ["text", "phase-b"], ["dim", "card"], ["dim", "back"]];
    for (let i = 0; i < 8; i += 1) texts.push(["on-bar", `op${i}`]);
    for (const [text, back] of texts) // text needs 4.5
        found[text + " on " + back] = ratio(light("--" + text), light("--" + back)) / 1.5;
    for (let i = 0; i < 8; i += 1)
        found[`text on faint op${i}`] = ratio(light("--text"), light(`--op${i}`, true)) / 1.5;
    return found;
}"""


def test_the_timeline_is_there_in_words_and_as_a_table(
    opened: Callable[..., Open], url: str
) -> None:
    page = opened(url).until_step(11)
    assert re.match(
        r"Step 11 took 8\.\d\d ms on 4 ranks, with 20 collectives\. The longest wait was 4\d\d µs: "
        r"rank [013] in .?\w+.? number \d+ of .?tp.?, for rank 2\. ",
        page.text("#summary"),
    ), page.text("#summary")
    assert page.page.get_attribute("#timeline", "aria-describedby") == "summary keys"
    page.page.click("#as-table summary")
    rows = page.page.locator("#table-rows tr")
    page.until(lambda: rows.count() == 20, "a row a collective")
    cells = rows.nth(1).locator("th, td").all_text_contents()
    assert cells[1:7] == ["all_gather", "tp", "222", "16 KiB", "4", "rank 2"]
    outline = page.page.evaluate(
        """() => [...document.querySelectorAll("h1, h2")].filter((h) => h.checkVisibility())
                .map((h) => h.tagName + " " + h.textContent)"""
    )
    assert outline == [
        "H1 onecast live",
        "H2 Timeline",
        "H2 Latency by operation and size",
        "H2 Where the step\u2019s time goes",
        "H2 Stragglers by rank",
        "H2 In flight now",
        "H2 Health of telemetry",
    ]


def test_only_what_matters_is_announced(opened: Callable[..., Open], url: str) -> None:
    page = opened(url).until_step(11)
    spoken = page.page.evaluate(
        """() => [...document.querySelectorAll("[aria-live], [role=status], [role=alert]")]
                .map((e) => e.id)"""
    )
    assert sorted(spoken) == ["alarm", "said", "status"]
    page.page.evaluate(
        """() => { window.heard = [];
             for (const id of ["alarm", "said", "status"])
                 new MutationObserver(() => heard.push(id)).observe(document.getElementById(id),
                     { childList: true, characterData: true, subtree: true }); }"""
    )
    asked = len(page.requests)
    page.until(lambda: len(page.requests) >= asked + 2, "two updates")
    assert page.page.evaluate("heard") == [], "nothing, as long as all is well"


def test_a_hang_stands_first_and_is_said_once(opened: Callable[..., Open], tmp_path: Path) -> None:
    written = WrittenNode(tmp_path, ranks=2, hang_s=0.05).write_steps(2)
    ticket = written.enter(0)
    time.sleep(0.1)
    written.node.poll()
    with serving(written) as address:
        page = opened(address).until_step(1)
        page.until(lambda: "rank 0 waits in all_reduce #41" in page.text("#hangs"), "the hang")
        assert page.page.title().startswith("▲ hang")
        said = page.text("#alarm")
        time.sleep(0.6)
        written.node.poll()  # its age has changed, not what hangs
        page.until(lambda: page.text("#hangs") not in said, "the age to go on")
        assert page.text("#alarm") == said
        in_flight = page.text("#in-flight tr[data-key='0 0']")
        assert "all_reduce #41" in in_flight
        meta = written.meta(written.writers[1], "all_reduce", "tp\tunique-tp")
        now = time.perf_counter_ns()
        written.writers[1].record(now - 1000, now, meta, 41, 16384, 0)
        written.writers[0].end(ticket)
        time.sleep(0.6)
        written.node.poll()
        page.page.wait_for_selector("#hanging", state="hidden")
        assert page.page.title() == "onecast live"


def test_names_that_a_program_gave_stay_text(opened: Callable[..., Open], tmp_path: Path) -> None:
    written = WrittenNode(tmp_path, ranks=2)
    written.write_steps(2, ops=[HOSTILE["op"], "مرحبا all_reduce"], group=HOSTILE["group"],
                        phase=HOSTILE["phase"], dtype=HOSTILE["dtype"])  # fmt: skip
    written.enter(0, op=HOSTILE["op"], group=HOSTILE["group"])
    written.node.poll()
    with serving(written) as address:
        for width in WIDTHS:
            page = opened(address, width).until_step(1)
            page.page.focus("#timeline")
            page.page.keyboard.press("ArrowRight")
            page.page.click("#as-table summary")
            assert HOSTILE["op"] in page.text("#detail")
            assert HOSTILE["dtype"] in page.text("#detail")
            assert HOSTILE["group"].split("\t")[0] in page.text("#latency tbody")
            assert HOSTILE["op"] in page.text("#in-flight tbody")
            assert page.page.title() == "onecast live"
            assert (
                page.page.locator("img, svg:not(.hist), b b, script:not(body > script)").count()
                == 0
            )
            assert page.page.evaluate("document.documentElement.scrollWidth") == width
            _hover_the_first_phase(page)
            assert "\\u202eltr\\u0007'\"&amp;<b>" in page.text("#detail")
            assert page.complaints == []


def _hover_the_first_phase(page: Open) -> None:
    place = page.page.evaluate(
        """() => { const lane = timeline.step.lanes[0];
             const box = timeline.canvas.getBoundingClientRect();
             const x = timeline.x(lane.phases[0].begin + 200000);
             return [box.left + x, box.top + lane.top + lane.barHeight + 6]; }"""
    )
    page.page.mouse.move(*place)


def test_a_node_without_ranks_or_steps_says_so(opened: Callable[..., Open], tmp_path: Path) -> None:
    written = WrittenNode(tmp_path, ranks=1, trace_one_in=0)
    with serving(written) as address:
        page = opened(address)
        page.until(lambda: "No rank has appeared" in page.text("#empty"), "the timeline to say so")
        written.node.poll()
        page.until(lambda: "No step is kept" in page.text("#empty"), "the timeline to say so")
        page.until(
            lambda: "No collective has ended" in page.text("#latency"), "the table to say so"
        )
        assert page.complaints == []
        assert json.dumps(page.timeline()) == "{}"
