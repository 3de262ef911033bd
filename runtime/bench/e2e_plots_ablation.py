"""The plots of the ablation: broadcasts against bytes, and how far the cost model can be trusted.

Owns their choice and words, and the numbers of each as a table.
"""

import statistics

from .e2e_plots import FUSED, SHM, Figure, Report
from .markup import number, percent, spread, table
from .plots import Cloud, Series, Stack, Value, line_plot, scatter_plot, stack_plot


def ablation(report: Report) -> list[Figure]:
    found = report.get("ablation")
    if not found:
        return []
    figures = [_numbers(found, in_turn=True), _numbers(found, in_turn=False)]
    return [one for one in (*figures, _fit(found), _divided(found)) if one is not None]


def _numbers(found: Report, in_turn: bool) -> Figure | None:
    """Time by number of broadcasts, a series for each size."""
    sizes: dict[float, dict[str, Value]] = {}
    for point in sorted(found["points"], key=lambda one: (one["bytes"], one["broadcasts"])):
        plain = not point["pickled"] and not point["framed"]
        count = point["broadcasts"]
        fits = point["rounds"] == (count if in_turn else 1) or count == 1
        if plain and fits and count:
            sizes.setdefault(point["bytes"] / count, {})[str(count)] = Value(
                point["median_us"], *point["spread"]
            )
    counts = sorted({int(count) for values in sizes.values() for count in values})
    series = [
        Series(_size(size), {str(n): values[str(n)] for n in counts if str(n) in values}, style)
        for style, (size, values) in enumerate(sorted(sizes.items()))
        if len(values) > 1
    ]
    if not series:
        return None
    how = "one after the other" if in_turn else "all at once"
    title = f"Number and size of broadcasts, {how}"
    text = (
        "µs until the last of so many broadcasts of that size has arrived; median, whiskers from "
        "the lowest to the highest launch. Lines that lie upon each other: bytes do not matter."
    )
    svg = line_plot(title, text, series, ("broadcasts", "µs"), is_log=True)
    head = ("size of each", *map(str, counts))
    lines = [
        (s.name, *(_of(s.values[str(n)]) if str(n) in s.values else "" for n in counts))
        for s in series
    ]
    name = "ablation-in-turn" if in_turn else "ablation-at-once"
    return Figure(name, title, text, svg, [table(f"{title}: µs, median (spread)", head, lines)])


def _of(value: Value) -> str:
    return spread(value.median, value[1:])


def _size(nbytes: float) -> str:
    return f"{nbytes / 1024:,.0f} KiB" if nbytes >= 1024 else f"{nbytes:,.0f} B"


def _fit(found: Report) -> Figure:
    """Every point, measured against predicted."""
    kept = {True: "kept from the fit", False: "fitted"}
    clouds = [
        Cloud(
            name,
            [(p["name"], p["predicted_us"], p["median_us"])
             for p in found["points"] if p["held_out"] == held_out],
            style,
        )
        for held_out, name, style in ((False, kept[False], 7), (True, kept[True], 3))
    ]  # fmt: skip
    clouds.append(
        Cloud(
            "whole protocols, not fitted",
            [(f"{p['channel']}, {p['workload']}", p["predicted_us"], p["measured_us"])
             for p in found["protocols"] if p["predicted_us"]],
            1,
        )
    )  # fmt: skip
    clouds = [cloud for cloud in clouds if cloud.points]
    model = found["model"]
    errors = ", ".join(
        f"{percent(model[part]['median_error'])} in the median and "
        f"{percent(model[part]['max_error'])} at most for the {model[part]['points']} points {name}"
        for part, name in (("fit", kept[False]), ("held_out", kept[True]))
        if model.get(part) and model[part]["points"]
    )
    wrong = [p["error"] for p in found["protocols"] if p["error"] is not None]
    if wrong:
        errors += (
            f", {percent(statistics.median(wrong))} and {percent(max(wrong))} for whole protocols"
        )
    text = f"Medians; on the dashed line the model is right. It is off by {errors}."
    svg = scatter_plot(
        "What the cost model says", text, clouds, ("predicted µs", "measured µs"), "µs"
    )
    terms = [(term["name"], number(term["value"]), term["unit"]) for term in model["terms"]]
    points = [
        (p["name"], number(p["broadcasts"]), number(p["rounds"]), f"{p['bytes']:,}",
         spread(p["median_us"], p["spread"]), number(p["predicted_us"]), kept[p["held_out"]])
        for p in found["points"]
    ]  # fmt: skip
    head = ("point", "broadcasts", "rounds", "bytes", "median µs (spread)", "predicted µs", "used")
    return Figure(
        "ablation-fit", "What the cost model says", text, svg,
        [
            table(f"The terms: {model['formula']}", ("term", "value", "unit"), terms),
            table("The points", head, points),
        ],
    )  # fmt: skip


_PARTS = {"fewer broadcasts us": 0, "fewer bytes us": 1, "cheaper encoding us": 2}


def _divided(found: Report) -> Figure | None:
    gains = [one for one in found.get("gain", []) if one["to"] in (FUSED, SHM)]
    if not gains:
        return None
    stacks = [
        Stack(
            f"{one['workload']}, {one['from']} to {one['to']}",
            [(part.removesuffix(" us"), one[part], style) for part, style in _PARTS.items()],
        )
        for one in gains
    ]
    text = (
        "µs that the model gives to each cause; what was measured stands beside it in the table, "
        "and where the two differ the model does not explain all."
    )
    title = "Fewer broadcasts or fewer bytes?"
    svg = stack_plot(title, text, stacks, "µs saved, by the model")
    head = (
        "step, from, to",
        "measured µs",
        "by the model",
        *(p.removesuffix(" us") for p in _PARTS),
    )
    lines = [
        (stack.name, number(one["measured_us"]), number(one["predicted_us"]),
         *(number(one[part]) for part in _PARTS))
        for stack, one in zip(stacks, gains, strict=True)
    ]  # fmt: skip
    return Figure("ablation-gain", title, text, svg, [table(f"{title} µs saved", head, lines)])
