"""What is served is read by Prometheus' own parsers as what its own client library would have served."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics
from prometheus_client import Metric as ReadFamily
from prometheus_client import generate_latest as text_of
from prometheus_client.metrics import enable_created_metrics
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_of
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from engine.protocol.messages import HistogramDelta
from server.metrics import exposition
from server.metrics.exposition import OPENMETRICS_TYPE, TEXT_TYPE, Shown
from server.metrics.metrics import Metrics
from server.metrics.series import Distribution, Family, Value
from server.metrics.table import METRICS, VLLM_METRICS, Group, Kind, Label, Metric

PROMETHEUS = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,*/*;q=0.1"
ODD = 'a"b\\c\nd,e}é 5%s %% '
HELP = 'Says "so", and \\ too.\nOn two lines.'
BOUNDS = (0.00001, 0.1, 1.0, 1e5)


def line(kind: Kind, name: str, *labels: str, unit: str = "things", buckets: tuple[float, ...] = ()) -> Metric:
    return Metric(name, kind, unit, HELP, Group.ENGINE, tuple(Label(name, "") for name in labels), buckets)


def ours() -> list[Shown]:
    counter = Family(line(Kind.COUNTER, "x_things_total", "label", "other"), Value)
    counter.labels(ODD, "1").inc()
    counter.labels("plain", "2").inc(2.5)
    gauge = Family(line(Kind.GAUGE, "x_bytes", unit="bytes"), Value)
    gauge.labels().set(1e17)
    empty = Family(line(Kind.GAUGE, "x_nothing", "label"), Value)
    metric = line(Kind.HISTOGRAM, "x_wait_seconds", "label", unit="seconds", buckets=BOUNDS)
    histogram = Family(metric, lambda: Distribution(metric.buckets))
    for value in (0.1, 0.11, 5e7):
        histogram.labels(ODD).observe(value)
    info = Family(line(Kind.INFO, "x_build_info", "version"), Value)
    info.labels("1.2").set(1)
    return [Shown(family, family.metric.name, {}) for family in (counter, gauge, empty, histogram, info)]


def theirs() -> CollectorRegistry:
    registry = CollectorRegistry()
    counter = Counter("x_things", HELP, ("label", "other"), unit="things", registry=registry)
    counter.labels(ODD, "1").inc()
    counter.labels("plain", "2").inc(2.5)
    Gauge("x_bytes", HELP, unit="bytes", registry=registry).set(1e17)
    Gauge("x_nothing", HELP, ("label",), registry=registry)
    histogram = Histogram("x_wait_seconds", HELP, ("label",), unit="seconds", buckets=BOUNDS, registry=registry)
    for value in (0.1, 0.11, 5e7):
        histogram.labels(ODD).observe(value)
    Info("x_build", HELP, registry=registry).info({"version": "1.2"})
    return registry


@pytest.fixture
def library() -> Any:
    """Prometheus' client library, without the times at which series began."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    yield theirs()
    enable_created_metrics()  # type: ignore[no-untyped-call]


def test_the_text_format_is_that_of_the_client_library(library: CollectorRegistry) -> None:
    body, content_type = exposition.write(ours(), "text/plain")
    assert content_type == TEXT_TYPE
    assert list(read_text(body.decode())) == list(read_text(text_of(library).decode()))


def test_openmetrics_is_that_of_the_client_library(library: CollectorRegistry) -> None:
    body, content_type = exposition.write(ours(), PROMETHEUS)
    assert content_type == OPENMETRICS_TYPE
    read: Any = read_openmetrics
    expected: Any = openmetrics_of
    assert list(read(body.decode())) == list(read(expected(library).decode()))


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", TEXT_TYPE),
        ("*/*", TEXT_TYPE),
        ("text/html,application/xhtml+xml", TEXT_TYPE),
        ("text/plain;version=0.0.4", TEXT_TYPE),
        ("application/openmetrics-text", OPENMETRICS_TYPE),
        ("text/plain;q=0.5, application/openmetrics-text; version=1.0.0", OPENMETRICS_TYPE),
        (PROMETHEUS, OPENMETRICS_TYPE),
    ],
)
def test_who_asks_for_openmetrics_gets_it(accept: str, expected: str) -> None:
    assert exposition.write(ours(), accept)[1] == expected


def test_a_value_at_a_bound_belongs_to_it() -> None:
    series = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 2.0, 2.5):
        series.observe(value)
    assert series.read() == (2, 3, 4, 4, 6.0)
    series.add(HistogramDelta([1, 0, 2], 10.0))
    assert series.read() == (3, 4, 7, 7, 16.0)


def test_counts_over_other_bounds_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Distribution((1.0, 2.0)).add(HistogramDelta([1, 0], 1.0))


def test_a_series_must_have_all_labels() -> None:
    with pytest.raises(ValueError, match="x_things_total has 2 labels, not 1"):
        Family(line(Kind.COUNTER, "x_things_total", "a", "b"), Value).labels("a")


def read(metrics: Metrics) -> dict[str, ReadFamily]:
    return {family.name: family for family in read_text(metrics.render("")[0].decode())}


def test_vllms_names_are_served_when_they_are_asked_for() -> None:
    plain, both = read(Metrics("m")), read(Metrics("m", vllm_names=True))
    expected = {name.removesuffix("_total") for metric in METRICS for name in metric.vllm}
    expected |= {metric.name for metric in VLLM_METRICS}
    assert set(both) - set(plain) == expected
    assert set(plain) <= set(both)


def test_under_vllms_names_are_the_same_samples() -> None:
    metrics = Metrics("m", vllm_names=True)
    metrics.finished.labels("stop").inc(3)
    metrics.time_to_first_token.observe(0.25)
    families = read(metrics)
    for metric in METRICS:
        for name in (name.removesuffix("_total") for name in metric.vllm if name != "vllm:num_requests_waiting"):
            mine, same = families[metric.name.removesuffix("_total")], families[name]
            assert same.type == mine.type
            assert [(sample.name.removeprefix("vllm:"), sample.value) for sample in same.samples] == [
                (sample.name.replace(mine.name, name).removeprefix("vllm:"), sample.value) for sample in mine.samples
            ]
            for sample, other in zip(same.samples, mine.samples, strict=True):
                assert sample.labels == {**other.labels, "engine": "0"}
                assert sample.labels["model_name"] == "m"


def test_to_a_gateway_what_waits_in_the_server_waits_too() -> None:
    metrics = Metrics(vllm_names=True)
    metrics.queued_requests.set_function(lambda: 5)
    metrics.num_unsent = lambda: 2
    (sample,) = read(metrics)["vllm:num_requests_waiting"].samples
    assert sample.value == 7


def test_to_a_gateway_there_are_no_adapters() -> None:
    (sample,) = read(Metrics(vllm_names=True))["vllm:lora_requests_info"].samples
    assert sample.labels == {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert sample.value > 1.7e9  # a time: of several such series the picker takes the latest
