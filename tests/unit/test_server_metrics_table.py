"""The table of metrics defines what is served, and keeps the field's rules for names."""

import itertools
from collections import Counter

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from server.metrics.metrics import Metrics
from server.metrics.table import BY_NAME, METRICS, PREFIX, VLLM_METRICS, VLLM_PREFIX, Group, Kind, Metric, Show

PHYSICAL_UNITS = ("seconds", "bytes", "ratio", "bytes_per_second")
NAMED_BY_VLLM = ("ryzanstein_kv_cache_usage_perc",)  # a ratio


@pytest.fixture(scope="module")
def families() -> dict[str, Family]:
    page = Metrics().render("")[0].decode()
    return {family.name: family for family in text_string_to_metric_families(page)}


def family_name(metric: Metric) -> str:
    return metric.name.removesuffix("_total") if metric.kind is Kind.COUNTER else metric.name


def test_every_line_is_served_and_nothing_else(families: dict[str, Family]) -> None:
    assert set(families) == {family_name(metric) for metric in METRICS}
    for metric in METRICS:
        assert families[family_name(metric)].type == ("gauge" if metric.kind is Kind.INFO else metric.kind)
        assert families[family_name(metric)].documentation == metric.help


def test_names_are_used_once_but_for_gauges_that_vllm_has_in_one() -> None:
    assert len(BY_NAME) == len(METRICS) + len(VLLM_METRICS)
    shared = Counter(name for metric in METRICS for name in metric.vllm)
    for metric in METRICS:
        assert all(name.startswith(VLLM_PREFIX) for name in metric.vllm)
        if any(shared[name] > 1 for name in metric.vllm):
            assert metric.kind is Kind.GAUGE
            assert not metric.labels


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_name_ends_in_its_unit(metric: Metric) -> None:
    assert metric.name.startswith(PREFIX) == (metric.group is not Group.PROCESS)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert metric.name.endswith("_info") == (metric.kind is Kind.INFO)
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
