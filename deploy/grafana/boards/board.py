"""What all boards have in common: variables, links to each other, and how a board is put together.

Owns ids and versions, which stay the same from one generation to the next: a file that Grafana
reads again must be the same dashboard.
"""

from typing import Any

from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from .panels import DATASOURCE

TAG = "onecast"
REFRESH = "5s"


def board(uid: str, title: str, description: str, *labels: str) -> dashboards.Dashboard:
    """An empty board. `labels`: those of collectives that it can be narrowed by, beside job,
    instance and rank."""
    built = (
        dashboards.Dashboard(f"onecast / {title}")
        .uid(f"onecast-{uid}")
        .description(" ".join(description.split()))
        .tags([TAG])
        .timezone("browser")
        .time("now-15m", "now")
        .refresh(REFRESH)
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(
            dashboards.DashboardLink("onecast")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
        .annotation(_alerts())
        .with_variable(
            dashboards.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
        )
        .with_variable(_variable("job", "onecast_up"))
        .with_variable(_variable("instance", 'onecast_up{job=~"$job"}'))
        .with_variable(_variable("rank", 'onecast_up{job=~"$job",instance=~"$instance"}'))
    )
    for label in labels:
        within = 'job=~"$job",instance=~"$instance"'
        series = f"onecast_collective_calls_total{{{within}}}"
        built = built.with_variable(_variable(label, series))
    return built


def _alerts() -> dashboards.AnnotationQuery:
    """Alerts that fire, as marks on all panels."""
    return (
        dashboards.AnnotationQuery()
        .name("Alerts")
        .datasource(DATASOURCE)
        .enable(True)
        .icon_color("red")
        .expr('ALERTS{alertname=~"Onecast.*",alertstate="firing",instance=~"$instance"}')
    )


def _variable(label: str, series: str) -> dashboards.QueryVariable:
    """The values that a label of a series has; all of them until somebody chooses."""
    query: dict[str, object] = {
        "qryType": 1,
        "query": f"label_values({series},{label})",
        "refId": f"variable-{label}",
    }
    numbers = label == "rank"
    sort = models.VariableSort.NUMERICAL_ASC if numbers else models.VariableSort.ALPHABETICAL_ASC
    return (
        dashboards.QueryVariable(label)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(sort)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(text=["All"], value=["$__all"], selected=True))
    )


def row(title: str) -> dashboards.Row:
    return dashboards.Row(title)


def as_json(built: dashboards.Dashboard) -> str:
    """The board as Grafana reads it, its panels numbered from 1."""
    model = built.build()
    for number, panel in enumerate(model.panels or [], 1):
        panel.id_val = number
    return JSONEncoder(sort_keys=True, indent=1).encode(model) + "\n"


def put(built: dashboards.Dashboard, *parts: Any) -> dashboards.Dashboard:
    """Rows and panels, in the order in which they are read."""
    for part in parts:
        built = built.with_row(part) if isinstance(part, dashboards.Row) else built.with_panel(part)
    return built
