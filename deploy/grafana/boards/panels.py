"""The four kinds of panels that the boards are made of, each with everything a panel must have.

Owns how panels look. None is made without a title, a unit, a description that says what to do when
it looks bad, and a query.
"""

from typing import Any, NamedTuple, TypeVar, cast

from grafana_foundation_sdk.builders import bargauge, common, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_kinds
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

_Panel = TypeVar("_Panel")

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24  # of a row of panels
GREEN, YELLOW, RED = "green", "#EAB839", "red"


# What keeps its colour from panel to panel.
_COLORS = {
    "model.forward": "green",
    "step.publish": "orange",
    "step.receive": "orange",
    "sample": "blue",
    "schedule": "purple",
    "schedule.ahead": "light-purple",
    "commit": "light-blue",
    "kv.swap_in": "yellow",
    "kv.swap_out": "red",
    "kv.copy": "semi-dark-blue",
}


class Query(NamedTuple):
    expr: str
    legend: str = ""


class Limits(NamedTuple):
    """From where on a value is yellow, and red; with `falling`, below which."""

    warn: float
    bad: float
    falling: bool = False


def figure(
    title: str,
    expr: str,
    unit: str,
    description: str,
    *,
    limits: Limits | None = None,
    decimals: int | None = None,
    instant: bool = False,
    width: int = 4,
) -> stat.Panel:
    """One number, the latest, over the line of how it came about."""
    panel = (
        stat.Panel()
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .color_mode(kinds.BigValueColorMode.VALUE)
        .graph_mode(kinds.BigValueGraphMode.NONE if instant else kinds.BigValueGraphMode.AREA)
        .thresholds(_thresholds(limits))
    )
    if decimals is not None:
        panel = panel.decimals(decimals)
    return _complete(panel, title, unit, description, [Query(expr)], width, 4, instant=instant)


def lines(
    title: str,
    queries: list[Query],
    unit: str,
    description: str,
    *,
    stacked: bool = False,
    exemplars: bool = False,
    logarithmic: bool = False,
    limits: Limits | None = None,
    maximum: float | None = None,
    minimum: float | None = 0,
    width: int = 12,
    height: int = 8,
) -> timeseries.Panel:
    """Values over time; with `exemplars`, points that lead to traces lie on them."""
    panel = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(60 if stacked else 0 if logarithmic else 8)
        .show_points(kinds.VisibilityMode.NEVER)
        .legend(_legend(width))
        .tooltip(
            common.VizTooltipOptions()
            .mode(kinds.TooltipDisplayMode.MULTI)
            .sort(kinds.SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL))
    if logarithmic:  # a logarithm has no 0 to begin at
        base = 2 if unit == "bytes" else 10
        scale = common.ScaleDistributionConfig().type(kinds.ScaleDistribution.LOG).log(base)
        panel = panel.scale_distribution(scale)
    elif minimum is not None:
        panel = panel.min(minimum)
    if maximum is not None:
        panel = panel.max(maximum)
    if limits is not None:
        style = common.GraphThresholdsStyleConfig().mode(kinds.GraphThresholdsStyleMode.DASHED)
        panel = panel.thresholds(_thresholds(limits)).thresholds_style(style)
    if any(query.legend == "{{phase}}" for query in queries):
        for name, color in _COLORS.items():
            fixed = {"mode": "fixed", "fixedColor": color}
            panel = panel.override_by_name(name, [models.DynamicConfigValue("color", fixed)])
    return _complete(panel, title, unit, description, queries, width, height, exemplars=exemplars)


def heat(
    title: str,
    expr: str,
    unit: str,
    description: str,
    *,
    exemplars: bool = False,
    repeat: str | None = None,
    scheme: str = "Turbo",
    width: int = 12,
    height: int = 9,
) -> heatmap.Panel:
    """How a histogram's observations spread over its buckets, over time."""
    panel = (
        heatmap.Panel()
        .calculate(False)
        .scale_distribution(common.ScaleDistributionConfig().type(kinds.ScaleDistribution.LINEAR))
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heatmap_kinds.HeatmapColorMode.SCHEME)
            .scheme(scheme)
            .scale(heatmap_kinds.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
        )
        .cell_gap(1)
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(kinds.AxisPlacement.LEFT))
        .exemplars_color("rgba(255,0,255,0.7)")
        .mode(kinds.TooltipDisplayMode.SINGLE)
        .show_y_histogram()
        .show_legend()
    )
    if repeat is not None:
        panel = panel.repeat(repeat).repeat_direction("h").max_per_row(3)
    queries = [Query(expr, "{{le}}")]
    return _complete(
        panel, title, unit, description, queries, width, height, exemplars=exemplars, heat=True
    )


def bars(
    title: str,
    query: Query,
    unit: str,
    description: str,
    *,
    limits: Limits | None = None,
    maximum: float | None = None,
    width: int = 12,
    height: int = 8,
) -> bargauge.Panel:
    """One bar per series, as of now."""
    panel = (
        bargauge.Panel()
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .display_mode(kinds.BarGaugeDisplayMode.GRADIENT)
        .orientation(kinds.VizOrientation.HORIZONTAL)
        .min(0)
        .thresholds(_thresholds(limits))
    )
    if maximum is not None:
        panel = panel.max(maximum)
    return _complete(panel, title, unit, description, [query], width, height, instant=True)


def _legend(width: int) -> common.VizLegendOptions:
    """A table beside the lines where there is room for it, else names below them."""
    legend = common.VizLegendOptions().show_legend(True)
    if width < WIDTH // 2:
        return legend.display_mode(kinds.LegendDisplayMode.LIST).placement(
            kinds.LegendPlacement.BOTTOM
        )
    return (
        legend.display_mode(kinds.LegendDisplayMode.TABLE)
        .placement(kinds.LegendPlacement.RIGHT)
        .calcs(["mean", "max"])
        .sort_by("Max")
        .sort_desc(True)
    )


def _thresholds(limits: Limits | None) -> dashboards.ThresholdsConfig:
    steps = [models.Threshold(value=None, color=GREEN)]
    if limits is not None and limits.falling:
        steps = [
            models.Threshold(value=None, color=RED),
            models.Threshold(value=limits.bad, color=YELLOW),
            models.Threshold(value=limits.warn, color=GREEN),
        ]
    elif limits is not None:
        steps.append(models.Threshold(value=limits.warn, color=YELLOW))
        steps.append(models.Threshold(value=limits.bad, color=RED))
    return dashboards.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _complete(
    made: _Panel,
    title: str,
    unit: str,
    description: str,
    queries: list[Query],
    width: int,
    height: int,
    *,
    exemplars: bool = False,
    instant: bool = False,
    heat: bool = False,
) -> _Panel:
    panel = cast(Any, made)  # the builders share no type that has these methods
    if not (title and unit and description and queries):
        raise ValueError(f"panel {title!r}: title, unit, description and a query are needed")
    for number, query in enumerate(queries):
        target = (
            prometheus.Dataquery()
            .expr(query.expr)
            .legend_format(query.legend or "__auto")
            .ref_id(chr(ord("A") + number))
            .exemplar(exemplars)
            .datasource(DATASOURCE)
        )
        target = target.instant() if instant else target.range()
        panel = panel.with_target(
            target.format(PromQueryFormat.HEATMAP if heat else PromQueryFormat.TIME_SERIES)
        )
    return cast(
        _Panel,
        panel.title(title)
        .unit(unit)
        .description(" ".join(description.split()))
        .datasource(DATASOURCE)
        .span(width)
        .height(height),
    )
