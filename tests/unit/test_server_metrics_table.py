"""The table of metrics defines what is served, and keeps the field's rules for names."""

import itertools

import pytest
from prometheus_client import Metric as Family

from server.metrics.metrics import Metrics
from server.metrics.table import METRICS, PREFIX, Kind, Metric, Show

PHYSICAL_UNITS = ("seconds", "bytes", "ratio")
NAMED_BY_VLLM = ("ryzanstein_kv_cache_usage_perc",)  # a ratio


@pytest.fixture(scope="module")
def families() -> dict[str, Family]:
    return {family.name: family for family in Metrics().registry.collect()}


def family_name(metric: Metric) -> str:
    return metric.name.removesuffix("_total") if metric.kind is Kind.COUNTER else metric.name


def test_every_line_is_served_and_nothing_else(families: dict[str, Family]) -> None:
    assert set(families) == {family_name(metric) for metric in METRICS}
    for metric in METRICS:
        assert families[family_name(metric)].type == metric.kind
        assert families[family_name(metric)].documentation == metric.help


def test_names_are_used_once() -> None:
    names = [name for metric in METRICS for name in (metric.name, *metric.vllm)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_name_ends_in_its_unit(metric: Metric) -> None:
    assert metric.name.startswith(PREFIX)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    if metric.name not in NAMED_BY_VLLM:
        ends = [unit for unit in PHYSICAL_UNITS if family_name(metric).endswith(f"_{unit}")]
        assert ends == [unit for unit in PHYSICAL_UNITS if metric.unit == unit]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_line_is_whole(metric: Metric) -> None:
    assert metric.help.endswith(".")
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    if metric.panel is not None:
        assert set(metric.panel.by) <= {label.name for label in metric.labels}
        assert bool(metric.panel.over) == (metric.panel.show is Show.QUOTIENT)
        assert metric.panel.over in {"", *(other.name for other in METRICS)}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_series_whose_labels_are_known_exist_from_the_start(metric: Metric, families: dict[str, Family]) -> None:
    samples = families[family_name(metric)].samples
    served = {tuple(sample.labels[label.name] for label in metric.labels) for sample in samples}
    expected = set(itertools.product(*(label.values for label in metric.labels)))
    assert served == expected
