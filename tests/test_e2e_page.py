"""The page of `onecast bench e2e`: whole in one file, readable by everybody, true to the JSON."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from onecast.runtime.bench import e2e_page, pictures, plot_axes
from onecast.runtime.bench.e2e_page import figures, make_page, write_report
from onecast.runtime.bench.e2e_style import STYLE
from onecast.runtime.bench.figures import make_figure
from onecast.runtime.bench.markup import Markup, element, number

CHROMIUM = next(filter(os.path.exists, ["/usr/bin/chromium"]), None) or shutil.which("chromium")
CHANNELS = {
    "two-broadcasts": (900.0, 5.0),
    "fixed-metadata": (700.0, 4.0),
    "cached-size": (600.0, 4.0),
    "process-group": (120.0, 1.0),
    "shared-memory": (12.0, 0.0),
}
MISSED = "a_figure_of_which_the_name_is_wider_than_a_telephone_is"
TPS, BATCHES = (1, 2, 4), (1, 8, 32, 64, 128)


def stats(median, low=None, high=None):
    low, high = low or median * 0.9, high or median * 1.2
    return {"median": median, "p99": high * 1.5, "n": 30, "spread": [low, high]}


def rows():
    found = []

    def add(tp, batch, channel, metric, rank=None, **values):
        found.append(
            {"tp": tp, "batch": batch, "channel": channel, "rank": rank, "metric": metric, **values}
        )

    for tp in TPS:
        for batch in BATCHES:
            forward = 1500.0 + 60 * batch / tp
            for channel, (us, _) in CHANNELS.items():
                one = (tp, batch, channel)
                step = forward + us
                add(*one, "tokens/s", **stats(batch / step * 1e6))
                add(*one, "tokens/s vs two-broadcasts", **stats((forward + 900) / step))
                add(*one, "step us", **stats(step))
                add(*one, "broadcast us", **stats(us))
                add(*one, "broadcast share", **stats(us / step))
                for rank in range(tp):
                    add(*one, "forward us", rank, **stats(forward))
                    add(*one, "wait us" if rank else "publish us", rank, **stats(us))
    return found


def timeline(channel, us, tp=2, batch=8):
    steps = []
    for number_ in range(3):
        begin = number_ * (us + 1600.0)
        publish = {"phase": "publish", "begin_us": begin + 50, "end_us": begin + 50 + us}
        forward = {"phase": "forward", "begin_us": begin + 60 + us, "end_us": begin + 1560 + us}
        receive = {**publish, "phase": "broadcast"}
        ranks = [{"rank": 0, "phases": [publish, forward]}]
        ranks += [{"rank": r, "phases": [receive, forward]} for r in range(1, tp)]
        steps.append(
            {"step": 17 + number_, "begin_us": begin, "step_us": us + 1600.0, "ranks": ranks,
             "publish_begin_us": begin + 50, "in_hand_us": begin + 50 + us}
        )  # fmt: skip
    return {"tp": tp, "batch": batch, "channel": channel, "steps": steps}


def ablation():
    points = []
    for size in (64, 2048, 16384):
        for count in (1, 2, 4, 8):
            for rounds in {1, count}:
                us = 100.0 * rounds + 50 * (count - rounds) + size * count / 1e4
                points.append(
                    {"name": f"{count} of {size} B", "broadcasts": count, "rounds": rounds,
                     "bytes": size * count, "pickled": 0, "framed": 0, "median_us": us,
                     "p99_us": 2 * us, "n": 75, "spread": [us * 0.9, us * 1.1],
                     "held_out": count == 4, "predicted_us": us * 1.05}
                )  # fmt: skip
    protocols = [
        {"channel": channel, "workload": "W1", "broadcasts": count, "rounds": 1, "bytes": 500,
         "metadata_bytes": 39, "tensors": 3, "measured_us": us, "spread": [us * 0.8, us * 1.3],
         "n": 75, "predicted_us": us * 0.9, "error": 0.1}
        for channel, (us, count) in CHANNELS.items()
    ]  # fmt: skip
    error = {"median_error": 0.05, "max_error": 0.2, "points": 12}
    terms = [{"name": "round", "unit": "us per round", "value": 101.5, "per": "rounds"}]
    model = {"terms": terms, "formula": "the sum of it all", "fit": error, "held_out": error}
    gain = {"workload": "W1", "from": "two-broadcasts", "to": "process-group",
            "measured_us": 780.0, "predicted_us": 700.0, "fewer broadcasts us": 650.0,
            "fewer bytes us": -1.0, "cheaper encoding us": 51.0}  # fmt: skip
    return {"ranks": 2, "backend": "gloo", "points": points, "protocols": protocols,
            "model": model, "gain": [gain]}  # fmt: skip


def peers():
    rates = [
        {"peer": peer, "how": how, "batch": 32, "processes": 1, "threads": cores, "cores": cores,
         "tokens_per_s": stats(rate), "equal": {"sequences": 31, "of": 32, "first_difference": 7}}
        for peer, how, cores, rate in (
            ("onecast", "TP 1", 1, 4800.0), ("transformers", "generate", 2, 3100.0),
        )
    ]  # fmt: skip
    queues = [
        {"peer": peer, "beside": "sglang", "how": how, "one_way_us": stats(us)}
        for peer, how, us in (("onecast", "shared-memory", 11.0), ("sglang", "tensors", 561.0))
    ]
    why = "vllm is not installed (pip install vllm)"
    return {"rows": rates + queues, "ratios": [], "skipped": [{"peer": "vllm", "how": None,
            "why": why}], "versions": {"transformers": "5.23.0"}, "definitions": {}}  # fmt: skip


def make_report():
    ours = {channel: us / 1e3 for channel, (us, _) in CHANNELS.items()}
    return json.loads(json.dumps({
        "bench": "e2e", "command": "onecast bench e2e --tp 1,2,4 --report 'a folder'",
        "machine": "x86_64, 4 cores, load 0.1 before",
        "hardware": {"cpu": "A CPU <of some make>", "cores": 4, "memory_bytes": 2**34, "gpus": []},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "model": {"name": "demo checkpoint", "path": "/" + "a-long-folder/" * 12, "synthetic": None,
                  "parameters": 2885888, "dtype": "float32", "device": "cpu"},
        "workload": {"prompt_tokens": [24, 40], "drawn_tokens": 48},
        "plan": {"tp": TPS, "batches": BATCHES, "launches": 3},
        "channels": {name: f"what {name} is" for name in CHANNELS},
        "definitions": {"tokens/s": "tokens over time"},
        "rows": rows(), "ablation": ablation(), "peers": peers(),
        "timelines": [timeline(name, us) for name, (us, _) in CHANNELS.items()],
        "original": {"rows": [
            {"what": "time of the block message, ms", "before": 0.388, "after": 0.128,
             "ours": ours},
            {"what": "metadata of the block message, bytes", "before": 260, "after": 107,
             "ours": {"process-group": 39, "shared-memory": 39}},
            {"what": "metadata of a further tensor, bytes", "before": 120, "after": 52,
             "ours": {"process-group": 2.25}}]},
        "ratios": [make_figure("e2e_fused_vs_two_broadcast_tp2", ">= 1.3", 1.42, [1.35, 1.6]),
                   make_figure(MISSED, "<= 0.02", 0.031, [0.03, 0.04]),
                   make_figure("cost_model_median_error", "reported", 0.05, [0.05, 0.05])],
    }))  # fmt: skip


@pytest.fixture(scope="module")
def report():
    return make_report()


def plain(page):
    """The text of a page, its tags gone."""
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))


# ---- what it says


def test_it_is_one_file_that_asks_for_nothing(report):
    page = make_page(report)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert set(re.findall(r'(?:src|href)="([^#][^"]*)"', page)) == {"data:,"}
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def test_the_original_change_stands_beside_ours(report):
    text = plain(make_page(report))
    assert "time of the block message, ms 0.388 0.128 0.900 (0.720 to 1.17)" in text
    assert "0.120 (0.096 to 0.156) 0.012 (0.0096 to 0.016)" in text, "measured, with the spread"
    assert "times as fast as before 1x 3.03x 1x 1.29x 1.50x 7.50x 75x" in text
    assert "metadata of the block message, bytes 260 107" in text
    assert "metadata of a further tensor, bytes 120 52" in text


def test_a_target_that_is_missed_is_shown_as_missed(report):
    page = make_page(report)
    assert f"1 of 2 targets are met. Missed: {MISSED}." in plain(page)
    assert page.count('<td class="bad">missed</td>') == 1
    assert "e2e_fused_vs_two_broadcast_tp2 1.42 1.35 to 1.60 &gt;= 1.3 met" in plain(page)


def test_every_plot_has_its_numbers_as_text_and_says_what_spread_it_shows(report):
    found = {figure.name: figure for figure in figures(report)}
    assert [*found] == [
        "original", *(f"tokens-tp{tp}" for tp in TPS), *(f"gain-tp{tp}" for tp in TPS),
        "timeline-two-broadcasts", "timeline-process-group", "timeline-shared-memory",
        *(f"share-tp{tp}" for tp in TPS),
        "ablation-in-turn", "ablation-at-once", "ablation-fit", "ablation-gain", "peers", "queues",
    ]  # fmt: skip
    for figure in found.values():
        assert 'class="mark' in figure.svg, figure.name
        assert "median" in figure.text.lower() or figure.name == "ablation-gain", figure.name
    page = plain(make_page(report))
    assert "process-group 7.1% (6.4% to 8.6%) 5.7%" in page, "share by batch, TP 1"
    assert "rank 1, forward 1,740 (1,566 to 2,088)" in page
    assert "onecast, TP 1, 1 core 1 x 1 4,800 (4,320 to 5,760) 30 31 of 32" in page
    assert "vllm: vllm is not installed (pip install vllm)." in page


def test_the_hardware_and_the_command_that_made_it_are_there(report):
    text = plain(make_page(report))
    assert "onecast bench e2e --tp 1,2,4 --report &#x27;a folder&#x27;" in text
    assert "memory 16.0 GiB" in text and "torch 2.13.0" in text
    assert "A CPU &lt;of some make&gt;" in text


@pytest.mark.parametrize("left_out", [*make_report(), "everything"])
def test_a_part_that_was_not_measured_is_not_shown(report, left_out):
    kept = {} if left_out == "everything" else {k: v for k, v in report.items() if k != left_out}
    text = plain(make_page(kept))
    assert "Does one broadcast a step matter end to end?" in text
    titles = {"ablation": "Fewer bytes or fewer broadcasts", "peers": "Beside others",
              "original": "The original change", "timelines": "A step before and after",
              "ratios": "Figures and targets"}  # fmt: skip
    for part, title in titles.items():
        assert (title in text) == (part in kept), title


def test_one_channel_one_batch_one_turn_are_enough(report):
    one = [
        {**row, "spread": [row["median"]] * 2, "n": 1}
        for row in report["rows"]
        if (row["tp"], row["batch"], row["channel"]) == (1, 64, "shared-memory")
    ]
    shown = {"rows": one, "channels": {"shared-memory": "x"}, "ratios": []}
    page = make_page(shown)
    assert "tokens-tp1" in page and "nan" not in page.lower()


# ---- how it is drawn


def test_text_becomes_markup_only_where_it_is_meant_to():
    shown = element("p", "<b>", element("i", "&"), class_='"')
    assert shown == '<p class="&quot;">&lt;b&gt;<i>&amp;</i></p>'
    assert isinstance(shown, Markup)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00512, "0.0051"), (0.0351, "0.035"), (1.304, "1.30"), (39.0, "39"),
     (12.34, "12.3"), (4321.9, "4,322"), (-1.44, "-1.44")],
)  # fmt: skip
def test_numbers_have_as_many_digits_as_a_reader_compares(value, text):
    assert number(value) == text


@pytest.mark.parametrize("values", [[3.0], [0.0], [0.4, 17.0], [99.0, 1200.0], [0.011, 0.6], [1e6]])
def test_scales_hold_their_values_between_round_ticks(values):
    scale = plot_axes.linear(values, 0, 100)
    assert scale.low == 0 and scale.high >= max(values) and len(scale.ticks) >= 2
    assert all(0 <= scale(value) <= 100 for value in values)
    assert plot_axes.linear([*values, 7.0], 0, 100, exact=True)(max(*values, 7.0)) == 100
    if min(values) > 0:
        scale = plot_axes.logarithmic(values, 0, 100)
        assert scale.low <= min(values) * 1.001 and scale.high >= max(values) * 0.999
        assert [scale(scale.low), scale(scale.high)] == [0, 100] and 2 <= len(scale.ticks) <= 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_mark_and_text_stands_out_from_the_card(scheme):
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")[:2]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", light if scheme == "light" else dark))
    ratios = {name: contrast(colours[name], colours["card"]) for name in colours}
    assert all(ratios[f"s{n}"] >= 3 for n in range(8)), ratios
    assert all(ratios[name] >= 4.5 for name in ("text", "dim", "accent", "bad")), ratios


def contrast(one, other):
    """By WCAG 2: of two colours like #1b1f24."""

    def lightness(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05

    darker, lighter = sorted((lightness(one), lightness(other)))
    return lighter / darker


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "e2e.html"
    path.write_text(make_page(report), encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_it_opens_fits_and_can_be_read_by_everybody(browser, address, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    complaints, requests = [], []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    plots = page.evaluate(_PLOTS)
    assert len(plots) == 19
    for name, marks, seen, cut, text_height in plots:
        assert marks > 0 and seen == marks, name
        assert not cut, (name, cut)
        assert text_height >= 9, f"{name}: text of {text_height} pixels"
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert complaints == []
    assert {url for url in requests if not url.startswith("data:")} == {address}
    context.close()


# Of each plot: its name, its marks, those of them that lie in it and have a size, texts that do not
# lie in it, and the height of its smallest text.
_PLOTS = """() => [...document.querySelectorAll("figure svg")].map((svg) => {
    const box = svg.getBoundingClientRect();
    const inside = (e) => {
        const one = e.getBoundingClientRect();
        return one.width > 0 && one.height > 0 && one.left >= box.left - 1 && one.top >= box.top - 1
            && one.right <= box.right + 1 && one.bottom <= box.bottom + 1;
    };
    const marks = [...svg.querySelectorAll(".mark")];
    const texts = [...svg.querySelectorAll("text")];
    return [svg.closest("figure").id, marks.length, marks.filter(inside).length,
            texts.filter((e) => !inside(e)).map((e) => e.textContent).join("; "),
            Math.min(...texts.map((e) => e.getBoundingClientRect().height))];
})"""


def test_all_of_it_can_be_reached_with_the_keyboard(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto(address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    names = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => { const e = document.activeElement;
                 return [e.tagName, parseFloat(getComputedStyle(e).outlineWidth)]; }"""
        )
        if name == "BODY":
            break
        names.add(name)
        assert outline >= 2, name
    assert name == "BODY", "and out again"
    assert names == {"A", "SUMMARY", "DIV"}, "links, what can be opened, tables that scroll"
    page.focus("summary")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('details').open")
    page.close()


# ---- on the disk


def test_without_chromium_there_is_the_page_and_a_line_about_pictures(
    report, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(pictures, "find_chromium", lambda: None)
    page = write_report(report, tmp_path / "new" / "folder")
    assert page.read_text(encoding="utf-8") == make_page(report)
    assert [path.name for path in page.parent.iterdir()] == ["e2e.html"]
    assert "Chromium is not installed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_pictures_are_of_the_plots(report, tmp_path, monkeypatch):
    monkeypatch.setattr(e2e_page, "figures", lambda report: figures(report)[:1])
    write_report(report, tmp_path)
    content = Path(tmp_path, "original.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width == 2 * 584 and 600 < height < 2000
