"""`onecast bench blocks`: it runs, every method moves what it says, and figures come from rows."""

import itertools
import json
import math
import random

import pytest
import torch

from onecast.runtime.bench import blocks, blocks_moves, blocks_report
from onecast.runtime.bench.blocks_moves import (
    CONTIGUOUS,
    COPY,
    MEMCPY,
    ONECAST,
    OPS,
    PATTERNS,
    PER_LAYER,
    PER_LAYER_NUMPY,
    SCATTERED,
    SWAPS,
    Cell,
    Headline,
    Model,
    Plan,
    Pools,
)
from onecast.runtime.bench.figures import holds
from onecast.runtime.kv_cache import CacheSpec

SMALL = Model("small", CacheSpec(32, 1, 8, torch.bfloat16))
TINY = Plan(
    models=(SMALL, Model("other", CacheSpec(2, 2, 4, torch.float32))),
    counts=(1, 4),
    pool_bytes=1 << 20,
    cell_s=0.0,
    least_rounds=3,
    launches=2,
    headline=Headline("small", 4),
)
TARGETS = {
    "swap_cpu_vs_memcpy": ">= 0.8",
    "copy_cpu_vs_memcpy": ">= 0.8",
    "swap_vs_per_layer_copies": ">= 3",
    "swap_vs_per_layer_numpy": "reported",
    "swap_cpu_vs_memcpy_lowest": "reported",
    "copy_cpu_vs_memcpy_lowest": "reported",
}


def run(path):
    assert blocks.main(["--quick", "--json", str(path)]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "QUICK", TINY)
        return run(tmp_path_factory.mktemp("bench") / "report.json")


def check(report, plan):
    """Rows for every cell and method, figures with their targets, each computed from rows."""
    rows = {
        (row["model"], row["blocks"], row["op"], row["pattern"], row["method"]): row
        for row in report["rows"]
    }
    expected = set()
    for model in plan.models:
        for count in plan.counts:
            for op in OPS:
                for pattern in PATTERNS:
                    methods = {ONECAST, MEMCPY, COPY}
                    if op != "copy" and pattern == SCATTERED:
                        methods |= {PER_LAYER, PER_LAYER_NUMPY}
                    expected |= {(model.name, count, op, pattern, one) for one in methods}
    assert set(rows) == expected
    for row in rows.values():
        assert row["metric"] == "us" and 0 < row["median"] <= row["p99"]
        assert row["n"] >= plan.launches * plan.least_rounds
        assert row["gb_per_s"] == pytest.approx(
            row["blocks"] * row["block_bytes"] / row["median"] / 1000
        )
        if row["method"] in (MEMCPY, ONECAST):
            assert row["of_memcpy" if row["method"] == MEMCPY else "onecast_gain"] == 1

    model, count = plan.headline
    swaps = [(model, count, op, SCATTERED) for op in SWAPS]
    values = {
        "swap_cpu_vs_memcpy": min(rows[*swap, ONECAST]["of_memcpy"] for swap in swaps),
        "copy_cpu_vs_memcpy": rows[model, count, "copy", SCATTERED, ONECAST]["of_memcpy"],
        "swap_vs_per_layer_copies": min(rows[*swap, PER_LAYER]["onecast_gain"] for swap in swaps),
        "swap_vs_per_layer_numpy": min(
            rows[*swap, PER_LAYER_NUMPY]["onecast_gain"] for swap in swaps
        ),
    }
    for kind, ops in (("swap", SWAPS), ("copy", ("copy",))):
        values[f"{kind}_cpu_vs_memcpy_lowest"] = min(
            row["of_memcpy"] for key, row in rows.items() if key[2] in ops and key[4] == ONECAST
        )
    ratios = {ratio["name"]: ratio for ratio in report["ratios"]}
    assert {name: ratio["value"] for name, ratio in ratios.items()} == values
    assert {name: ratio["target"] for name, ratio in ratios.items()} == TARGETS
    for ratio in ratios.values():
        assert ratio["holds"] is holds(ratio["value"], ratio["target"])
        low, high = ratio["spread"]
        assert 0 < low <= ratio["value"] <= high and math.isfinite(high)
    assert report["bench"] == "blocks" and "torch" in report["machine"]


def test_every_row_is_measured_and_every_figure_comes_from_rows(report):
    check(report, TINY)
    sizes = {row["model"]: row["block_bytes"] for row in report["rows"]}
    assert sizes == {"small": 32 * 2 * 16 * 8 * 2, "other": 2 * 2 * 16 * 2 * 4 * 4}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("op", OPS)
def test_every_method_moves_as_many_bytes_as_it_says(op, pattern):
    pools = Pools(SMALL.spec, 40)
    source, destination = pools.sides(op)
    for method in blocks_moves.methods_of(op, pattern):
        noise = torch.randint(1, 256, source.flat.shape, dtype=torch.uint8)
        source.flat.copy_(noise)
        if destination is not source:
            destination.flat.zero_()
        before = destination.flat.clone()
        pools.prepare(method, op, pattern, 4, random.Random(3))()
        changed = destination.flat != before
        moved = int(changed.sum())
        expected = 4 * SMALL.block_bytes
        assert expected * 0.98 <= moved <= expected, method  # noise may meet an equal byte
        if destination is not source:
            assert moved == expected
            assert torch.equal(source.flat, noise), method
        if method in (ONECAST, PER_LAYER, PER_LAYER_NUMPY):
            layout = (1 if method == ONECAST else 2 * 32, 40, -1)
            expected_at, found = noise.view(layout), destination.flat.view(layout)
            for a, b in pools.places(pattern, 4, random.Random(3)):
                assert torch.equal(found[:, b], expected_at[:, a]), method
        pieces = changed.view(-1, SMALL.block_bytes // (2 * 32)).any(1)
        assert int(pieces.sum()) == 4 * 2 * 32, method


def test_methods_draw_places_alike_and_never_a_block_twice():
    pools, chance = Pools(SMALL.spec, 40), random.Random(0)
    for pattern in PATTERNS:
        seen = set()
        for _ in range(200):
            places = pools.places(pattern, 4, chance)
            assert len({block for pair in places for block in pair}) == 8
            seen |= set(places)
            if pattern == CONTIGUOUS:
                assert all(b[0] - a[0] == b[1] - a[1] == 1 for a, b in itertools.pairwise(places))
        assert {a for a, _ in seen} == {b for _, b in seen} == set(range(40))


def test_figures_are_medians_of_rounds_with_the_spread_of_launches(capsys):
    def cell(op, blocks=4):
        return Cell("small", 1000, op, SCATTERED, blocks)

    def times(onecast, memcpy, per_layer, numpy):
        return {
            ONECAST: onecast, MEMCPY: memcpy, COPY: memcpy, PER_LAYER: per_layer,
            PER_LAYER_NUMPY: numpy,
        }  # fmt: skip

    swap_out = times([100, 100, 1000], [90, 100, 100], [500, 400, 9000], [150, 150, 150])
    swap_in = times([200, 200], [100, 100], [900, 900], [200, 200])
    copy = {name: [100, 100] for name in (ONECAST, MEMCPY, COPY)}
    one = {cell("swap_out"): swap_out, cell("swap_in"): swap_in, cell("copy"): copy}
    fast = {**one, cell("swap_in"): times([100], [100], [700], [100])}
    rows = blocks_report.make_rows([one, fast])
    assert rows[0]["median"] == 0.1 and rows[0]["n"] == 6 and rows[0]["gb_per_s"] == 40.0
    ratios = {r["name"]: r for r in blocks_report.make_ratios([one, fast], Headline("small", 4))}
    assert ratios["swap_cpu_vs_memcpy"]["value"] == 0.5  # 0.5, 0.5, 1 of swap_in
    assert ratios["swap_cpu_vs_memcpy"]["spread"] == [0.5, 1]
    assert ratios["swap_cpu_vs_memcpy"]["holds"] is False
    assert ratios["swap_vs_per_layer_copies"]["value"] == 4.5
    assert ratios["swap_vs_per_layer_copies"]["holds"] is True
    assert ratios["copy_cpu_vs_memcpy"]["value"] == 1
    assert "4 scattered swap_in, small" in ratios["swap_cpu_vs_memcpy_lowest"]["of"]


def test_a_target_is_held_at_its_very_value():
    assert holds(0.8, ">= 0.8") and holds(5.0, "<= 5") and holds(1, "= 1")
    assert not holds(0.79, ">= 0.8") and not holds(5.01, "<= 5") and not holds(1.0, "< 1")
    assert holds(3.0, "reported") is None


def test_the_tables_fit_100_columns_and_nothing_is_cut(report, capsys):
    """With as many counts and as large numbers as a full run may have."""
    large = {"gb_per_s": 123.4, "of_memcpy": 1.23, "onecast_gain": 12.34}
    rows = [{**row, **large} for row in report["rows"] if row["blocks"] == 1]
    rows = [{**row, "blocks": count} for count in (1, 4, 16, 64, 256) for row in rows]
    blocks_report.print_report({**report, "rows": rows})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for name in TARGETS:
        assert name in text
    assert "…" not in text
    assert "small, blocks of 16 KiB" in text


@pytest.mark.slow
def test_the_quick_run_measures_real_sizes(tmp_path):
    check(run(tmp_path / "report.json"), blocks.QUICK)
