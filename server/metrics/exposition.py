"""Metrics as Prometheus reads them: its text format 0.0.4, and OpenMetrics 1.0.0 for those who ask for it.

Sources: https://prometheus.io/docs/instrumenting/exposition_formats/ and
https://github.com/prometheus/OpenMetrics/blob/v1.0.0/specification/OpenMetrics.md. All of a series' lines but their
numbers is written once, when it is first shown: a page is read every few seconds by a Prometheus, and twenty times a
second by a gateway, while streams wait.
"""

from collections.abc import Iterable, Mapping

from server.metrics.series import BUCKET, COUNT, SUM, Family, Series
from server.metrics.table import Kind, Metric

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
TOTAL, INFO = "_total", "_info"


class Shown:
    """A family of series under one name.

    Args:
        family: the series.
        name: as it is served; for counters with `_total`, for information with `_info`.
        labels: that every series has beside its own.
    """

    def __init__(self, family: Family[Series], name: str, labels: Mapping[str, str]) -> None:
        self._family = family
        self._name = name
        self._labels = labels
        self._text_head, self._openmetrics_head = _heads(name, family.metric)
        self._templates: dict[tuple[str, ...], str] = {}  # by the labels' values: the lines, with %s for their numbers

    def write(self, lines: list[str], *, openmetrics: bool) -> None:
        """Append the family's lines."""
        lines.append(self._openmetrics_head if openmetrics else self._text_head)
        for values, series in self._family:
            template = self._templates.get(values)
            if template is None:
                template = self._templates[values] = self._template(values)
            lines.append(template % series.read())

    def _template(self, values: tuple[str, ...]) -> str:
        names = (f"{self._name}{sample}" for sample in self._samples(values))
        return "".join(f"{name.replace('%', '%%')} %s\n" for name in names)

    def _samples(self, values: tuple[str, ...]) -> list[str]:
        """Return what follows the name in each line of a series, but for the number."""
        metric = self._family.metric
        labels = dict(zip((label.name for label in metric.labels), values, strict=True)) | dict(self._labels)
        if metric.kind is not Kind.HISTOGRAM:
            return [_in_braces(labels)]
        bounds = [*(str(float(bound)) for bound in metric.buckets), "+Inf"]
        buckets = [f"{BUCKET}{_in_braces(labels | {'le': bound})}" for bound in bounds]
        return [*buckets, f"{COUNT}{_in_braces(labels)}", f"{SUM}{_in_braces(labels)}"]


def write(families: Iterable[Shown], accept: str) -> tuple[bytes, str]:
    """Return all families in the format that the `Accept` header asks for, and its content type."""
    openmetrics = any(part.partition(";")[0].strip() == "application/openmetrics-text" for part in accept.split(","))
    lines: list[str] = []
    for family in families:
        family.write(lines, openmetrics=openmetrics)
    if openmetrics:
        lines.append("# EOF\n")
    return "".join(lines).encode(), OPENMETRICS_TYPE if openmetrics else TEXT_TYPE


def _heads(name: str, metric: Metric) -> tuple[str, str]:
    """Return what goes before a family's samples, as text and as OpenMetrics."""
    suffix = {Kind.COUNTER: TOTAL, Kind.INFO: INFO}.get(metric.kind, "")
    family = name.removesuffix(suffix)
    text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
    kind = Kind.GAUGE if metric.kind is Kind.INFO else metric.kind
    unit = f"# UNIT {family} {metric.unit}\n" if family.endswith(f"_{metric.unit}") else ""
    escaped = text.replace('"', r"\"")
    return (
        f"# HELP {name} {text}\n# TYPE {name} {kind}\n",
        f"# HELP {family} {escaped}\n# TYPE {family} {metric.kind}\n{unit}",
    )


def _in_braces(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items())) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
