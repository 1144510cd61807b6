"""Writes Grafana's dashboard from the table.

python -m server.metrics.dashboard --update deploy/grafana/dashboards/ryzanstein.json
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from server.metrics.generated import write
from server.metrics.table import METRICS, MODEL_NAME, PREFIX, Group, Kind, Metric, Panel, Show

COLUMNS = 24  # of Grafana's grid
WIDTH, HEIGHT = 8, 8  # of a panel, on that grid
QUANTILES = (0.5, 0.95, 0.99)
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
OF_INSTANCES = 'instance=~"$instance"'
OF_MODELS = f'{MODEL_NAME.name}=~"${MODEL_NAME.name}", {OF_INSTANCES}'
INTERVAL, RANGE = "[$__rate_interval]", "[$__range]"
INSTANT = (Show.INCREASE, Show.TABLE)  # what is asked for once, not along the time
TYPES = {Show.INCREASE: "stat", Show.TABLE: "table"}  # others are drawn along the time

# Names of Grafana's units, of what is not a rate, and of what is. Others are named by a suffix.
UNITS = {"seconds": "s", "bytes": "bytes", "ratio": "percentunit", "bytes_per_second": "Bps", "info": "none"}
RATE_UNITS = {"seconds": "percentunit", "bytes": "Bps"}

Json = dict[str, Any]


def dashboard() -> Json:
    """Return the dashboard, as Grafana imports and provisions it."""
    return {
        "uid": "ryzanstein",
        "title": "ryzanstein",
        "description": "All metrics of docs/metrics.md that are worth a look. Written by server.metrics.dashboard.",
        "tags": ["ryzanstein"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one cross hair on all panels
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_alerts()]},
        "templating": {"list": list(_variables())},
        "panels": list(_numbered(_panels())),
    }


def text() -> str:
    """Return the file of the dashboard."""
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


def _alerts() -> Json:
    return {
        "name": "Alerts",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Ryzanstein.+", alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{instance}} {{model_name}}",
        "useValueForTime": False,
    }


def _variables() -> Iterator[Json]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    of_these = f'{{{MODEL_NAME.name}=~"${MODEL_NAME.name}"}}'
    yield _label_variable(MODEL_NAME.name, "Model", f"{PREFIX}engine_ready")
    yield _label_variable("instance", "Instance", f"{PREFIX}engine_ready{of_these}")


def _label_variable(name: str, label: str, series: str) -> Json:
    query = f"label_values({series}, {name})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "refresh": 2,  # when the range of time changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _numbered(panels: Iterator[Json]) -> Iterator[Json]:
    for number, panel in enumerate(panels, 1):
        yield {"id": number, **panel}


def _panels() -> Iterator[Json]:
    """Return rows and their panels, from left to right and down."""
    top = 0
    for group in Group:
        yield {
            "type": "row",
            "title": group.value,
            "collapsed": False,
            "panels": [],
            "gridPos": _place(0, top, COLUMNS, 1),
        }
        top += 1
        titles = _titles(group)
        for index, (title, metrics) in enumerate(titles.items()):
            row, column = divmod(index, COLUMNS // WIDTH)
            yield _panel(title, metrics) | {"gridPos": _place(column * WIDTH, top + row * HEIGHT, WIDTH, HEIGHT)}
        top += -(-len(titles) * WIDTH // COLUMNS) * HEIGHT


def _place(x: int, y: int, width: int, height: int) -> Json:
    return {"x": x, "y": y, "w": width, "h": height}


def _titles(group: Group) -> dict[str, list[tuple[Metric, Panel]]]:
    """Return what is drawn together, by its title."""
    titles: dict[str, list[tuple[Metric, Panel]]] = {}
    for metric in METRICS:
        if metric.group is group and metric.panel is not None:
            titles.setdefault(metric.panel.title, []).append((metric, metric.panel))
    return titles


def _panel(title: str, drawn: list[tuple[Metric, Panel]]) -> Json:
    show = drawn[0][1].show
    targets = [target for metric, panel in drawn for target in _targets(metric, panel, is_alone=len(drawn) == 1)]
    units = {_unit(metric, panel.show) for metric, panel in drawn}
    kind = TYPES.get(show, "timeseries")
    return {
        "type": kind,
        "title": title,
        "description": _description(drawn),
        "datasource": DATASOURCE,
        "fieldConfig": {
            "defaults": {"unit": units.pop() if len(units) == 1 else "short", "min": 0, "custom": _style(kind)},
            "overrides": [],
        },
        "options": _options(kind),
        "targets": [{"refId": chr(ord("A") + index), **target} for index, target in enumerate(targets)],
        "transformations": [_LABELS_ALONE] if show is Show.TABLE else [],
    }


def _description(drawn: list[tuple[Metric, Panel]]) -> str:
    return "\n\n".join(f"`{metric.name}`: {metric.help}" for metric, _ in drawn)


def _style(kind: str) -> Json:
    return {"fillOpacity": 8, "showPoints": "auto", "lineWidth": 1} if kind == "timeseries" else {}


def _options(kind: str) -> Json:
    last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    options: dict[str, Json] = {
        "timeseries": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "stat": {"reduceOptions": last, "textMode": "value_and_name", "colorMode": "none", "graphMode": "none"},
        "table": {"showHeader": True},
    }
    return options[kind]


_LABELS_ALONE = {
    "id": "organize",
    "options": {"excludeByName": dict.fromkeys(("Time", "Value", "__name__", "job"), True)},
}


def _targets(metric: Metric, panel: Panel, *, is_alone: bool) -> Iterator[Json]:
    labels = " ".join(f"{{{{{name}}}}}" for name in panel.by)
    name = "" if is_alone and labels else metric.name.removeprefix(PREFIX).removesuffix("_total").replace("_", " ")
    for expression, part in expressions(metric, panel):
        yield {
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": expression,
            "legendFormat": " ".join(filter(None, (part if is_alone and part else name, labels))),
            "instant": panel.show in INSTANT,
            "range": panel.show not in INSTANT,
            "format": "table" if panel.show is Show.TABLE else "time_series",
        }


def expressions(metric: Metric, panel: Panel) -> Iterator[tuple[str, str]]:
    """Return what is asked of Prometheus for a panel, with Grafana's variables, each with its part's name if any."""
    if panel.show is Show.QUANTILES:
        buckets = _rate(f"{metric.name}_bucket", (*panel.by, "le"))
        for quantile in QUANTILES:
            yield f"histogram_quantile({quantile}, {buckets})", f"p{quantile * 100:g}"
    else:
        yield _expression(metric, panel), ""


def _expression(metric: Metric, panel: Panel) -> str:
    by, name = panel.by, metric.name
    match panel.show:
        case Show.VALUE:
            return _over(panel.aggregate, by, _selected(name))
        case Show.RATE:
            return _rate(_part(metric, "_count"), by)
        case Show.INCREASE:
            return _over("sum", by, f"increase({_selected(_part(metric, '_count'))}{RANGE})")
        case Show.MEAN:
            return f"{_rate(f'{name}_sum', by)} / {_rate(f'{name}_count', by)}"
        case Show.TIME_SHARE:
            return _over("avg", by, _rate(f"{name}_sum", ("instance", *by)))
        case Show.TABLE:
            return _selected(name)
        case _:
            of = _rate if metric.kind is Kind.COUNTER else _sum
            return f"{of(name, by)} / {of(panel.over, by)}"


def _part(metric: Metric, part: str) -> str:
    """Return the series of a histogram, or the only one of another."""
    return f"{metric.name}{part}" if metric.kind is Kind.HISTOGRAM else metric.name


def _selected(name: str) -> str:
    return f"{name}{{{OF_MODELS if name.startswith(PREFIX) else OF_INSTANCES}}}"


def _rate(name: str, by: tuple[str, ...]) -> str:
    return _over("sum", by, f"rate({_selected(name)}{INTERVAL})")


def _sum(name: str, by: tuple[str, ...]) -> str:
    return _over("sum", by, _selected(name))


def _over(aggregate: str, by: tuple[str, ...], vector: str) -> str:
    return f"{aggregate} by ({', '.join(by)}) ({vector})" if by else f"{aggregate}({vector})"


def _unit(metric: Metric, show: Show) -> str:
    """Return Grafana's name of the unit of what is drawn."""
    if show in (Show.TIME_SHARE, Show.QUOTIENT):
        return "percentunit"
    if show is Show.RATE and metric.kind is Kind.HISTOGRAM:
        return "suffix: /s"
    if show is Show.RATE:
        return RATE_UNITS.get(metric.unit, f"suffix: {metric.unit}/s")
    return UNITS.get(metric.unit, f"suffix: {metric.unit}")


def main(arguments: list[str]) -> int:
    """Write the dashboard to standard output, or into a file; return the exit code."""
    return write("-m server.metrics.dashboard", "Write Grafana's dashboard.", text(), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
