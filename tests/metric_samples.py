"""Reads what /metrics says. Series have the model's name, too, which is the same everywhere and is left out here."""

import re

from prometheus_client.parser import text_string_to_metric_families

from server.metrics.metrics import Metrics

_MODEL_NAME = re.compile(r'(,?)model_name="(?:[^"\\]|\\.)*"(,?)')


def sample_lines(page: str) -> list[str]:
    """Return the lines of samples, as if there were no label for the model's name."""
    lines = [_MODEL_NAME.sub(lambda found: found[1] and found[2], line) for line in page.splitlines()]
    return [line.replace("{}", "", 1) for line in lines if not line.startswith("#")]


def value_of(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Return one sample of `metrics`; None where it is not there."""
    page = "\n".join(sample_lines(metrics.render("")[0].decode()))
    samples = [sample for family in text_string_to_metric_families(page + "\n") for sample in family.samples]
    return next((sample.value for sample in samples if (sample.name, sample.labels) == (name, labels)), None)
