"""Writes docs/metrics.md from the table: `python -m server.metrics.page --update docs/metrics.md`."""

import sys
from collections.abc import Iterator

from server.metrics.generated import write
from server.metrics.table import (
    METRICS,
    MODEL_NAME,
    PREFIX,
    VLLM_METRICS,
    VLLM_PREFIX,
    Group,
    Kind,
    Label,
    Metric,
)

HEAD = f"""# Metrics

`GET /metrics` shows these, in Prometheus' text format and, to those who ask for it as Prometheus does, in OpenMetrics.
Every series whose name begins with `{PREFIX}` has the label `{MODEL_NAME.name}`, {MODEL_NAME.help}, beside those named
here. [guide.md](guide.md#read-the-metrics) says what to ask of them. Counters are kept by the server and survive a
rank; statistics of the ranks arrive about once a second while there is work, and each 15 seconds otherwise.

This page is written by `python -m server.metrics.page --update docs/metrics.md`, from
[table.py](../server/metrics/table.py).
"""

VLLM_HEAD = f"""## Under vLLM's names

With `--vllm-metric-names` the following are served, too, with the same labels and `engine="0"`. Those marked * are
what the endpoint picker of Kubernetes' gateway API inference extension reads of a model server by default. Requests
that wait, and the time that they do, are of the server's queue and the engine's together: vLLM has one, in its engine,
and here most wait in the server, which a picker should see. `promtool check metrics` objects to the colons.

| {VLLM_PREFIX.removesuffix(":")}'s name | Ours |
|---|---|
"""

# Of the model server protocol, version 1 of the extension; the older name of the third is for the releases before.
READ_BY_PICKER = (
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:lora_requests_info",
    "vllm:cache_config_info",
)


def page() -> str:
    """Return the page."""
    return "\n".join([HEAD, *(_section(group) for group in Group), VLLM_HEAD + "\n".join(_aliases()) + "\n"])


def _section(group: Group) -> str:
    metrics = [metric for metric in METRICS if metric.group is group]
    rows = "\n".join(_row(metric) for metric in metrics)
    details = "".join(f"\n{line}\n" for line in _details(metrics))
    return (
        f"## {group.value}\n\n| Name | Kind | Unit | Labels | What it says |\n|---|---|---|---|---|\n{rows}\n{details}"
    )


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label.name}`" for label in metric.labels)
    unit = "" if metric.kind is Kind.INFO else metric.unit.replace("_per_second", " a second")
    return f"| `{metric.name}` | {metric.kind} | {unit} | {labels} | {metric.help} |"


def _details(metrics: list[Metric]) -> Iterator[str]:
    """Return what is said of labels and buckets below a table: each once."""
    labels: dict[Label, list[str]] = {}
    buckets: dict[tuple[float, ...], list[str]] = {}
    for metric in metrics:
        for label in metric.labels:
            labels.setdefault(label, []).append(metric.name)
        if metric.buckets:
            buckets.setdefault(metric.buckets, []).append(metric.name)
    if labels:
        yield "\n".join(f"- {_label(label, names, labels)}" for label, names in labels.items())
    if buckets:
        yield "\n".join(
            f"- Buckets of {_names(names)}: up to {', '.join(f'{bound:g}' for bound in bounds)}."
            for bounds, names in buckets.items()
        )


def _label(label: Label, names: list[str], labels: dict[Label, list[str]]) -> str:
    is_shared = sum(other.name == label.name for other in labels) > 1
    where = f" of {_names(names)}" if is_shared else ""
    values = ", ".join(f"`{value}`" for value in label.values or label.some)
    return f"`{label.name}`{where}: {label.help}{f': {values}' if values else ''}."


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _aliases() -> Iterator[str]:
    by_name: dict[str, list[str]] = {}
    for metric in METRICS:
        for name in metric.vllm:
            by_name.setdefault(name, []).append(f"`{metric.name}`")
    for name, ours in by_name.items():
        yield f"| `{name}`{_mark(name)} | {' + '.join(ours)} |"
    for metric in VLLM_METRICS:
        labels = ", ".join(f'`{label.name}="{label.values[0]}"`' for label in metric.labels)
        yield f"| `{metric.name}`{_mark(metric.name)} | {metric.help} Labels: {labels}. |"


def _mark(name: str) -> str:
    return " *" if name in READ_BY_PICKER else ""


def main(arguments: list[str]) -> int:
    """Write the page to standard output, or into a file; return the exit code."""
    return write("-m server.metrics.page", "Write the page of all metrics.", page(), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
