"""/metrics of a real service under load: Prometheus' own checks of it, and what it says of the service."""

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from server.metrics.page import READ_BY_PICKER
from server.metrics.table import METRICS, Group
from tests.service_process import ServiceProcess, wait_until

SEQUENCES, TOKENS = 12, 8


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    with ServiceProcess("-tp", "2", "--served-model-name", "a model", "--vllm-metric-names") as service:
        load(service)
        yield service


def load(service: ServiceProcess) -> None:
    """Have it answer, stream, refuse, and be asked for what is not there."""
    url, body = f"{service.url}/v1/completions", {"prompt": "import ", "max_tokens": TOKENS, "ignore_eos": True}
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(SEQUENCES) as pool:
        bodies = [{**body, "stream": bool(index % 2)} for index in range(SEQUENCES)]
        answers = list(pool.map(lambda body: client.post(url, json=body), bodies))
        assert {answer.status_code for answer in answers} == {200}
        assert client.post(url, json={"prompt": 5}).status_code == 400
        assert client.get(f"{service.url}/nowhere").status_code == 404
    service.wait_until_idle()
    wait_until(lambda: service.metric("ryzanstein_engine_steps_total") >= TOKENS, 30)


def page(service: ServiceProcess, accept: str) -> str:
    answer = httpx.get(f"{service.url}/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith(accept)
    return answer.text


@pytest.fixture(scope="module")
def families(service: ServiceProcess) -> dict[str, Family]:
    return {family.name: family for family in text_string_to_metric_families(page(service, "text/plain"))}


def test_promtool_finds_nothing_to_say_but_of_vllms_colons(service: ServiceProcess) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("there is no promtool: apt-get install prometheus")
    command = ["promtool", "check", "metrics"]
    text = page(service, "text/plain")
    found = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    complaints = (found.stdout + found.stderr).splitlines()
    assert [line for line in complaints if "should not contain ':'" not in line] == []
    assert all(line.startswith("vllm:") for line in complaints)
    ours = text[: text.index("# HELP vllm:")]
    clean = subprocess.run(command, input=ours, capture_output=True, text=True, timeout=60, check=False)
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "", "")


def test_openmetrics_is_valid_and_says_the_same(service: ServiceProcess, families: dict[str, Family]) -> None:
    read: Any = read_openmetrics
    found = {family.name: family for family in read(page(service, "application/openmetrics-text"))}
    assert {name.removesuffix("_info") for name in families} == {name.removesuffix("_info") for name in found}
    latency = "ryzanstein_e2e_request_latency_seconds"
    assert found[latency].samples == families[latency].samples


def test_every_series_of_ours_has_the_models_name(families: dict[str, Family]) -> None:
    samples = [sample for family in families.values() for sample in family.samples]
    ours = [sample for sample in samples if sample.name.startswith("ryzanstein_")]
    assert {sample.labels.get("model_name") for sample in ours} == {"a model"}
    assert not any("model_name" in sample.labels for sample in samples if sample.name.startswith("process_"))


def test_latencies_and_lengths_are_those_of_the_load(service: ServiceProcess) -> None:
    for name in ("time_to_first_token", "request_prefill_time", "request_decode_time", "e2e_request_latency"):
        assert service.metric(f"ryzanstein_{name}_seconds_count") == SEQUENCES
    assert service.metric("ryzanstein_inter_token_latency_seconds_count") == SEQUENCES * (TOKENS - 1)
    assert service.metric("ryzanstein_request_generation_tokens_sum") == SEQUENCES * TOKENS
    parts = [service.metric(f"ryzanstein_request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode")]
    assert 0 < sum(parts) < service.metric("ryzanstein_e2e_request_latency_seconds_sum")


def test_responses_are_counted(service: ServiceProcess) -> None:
    completions = 'code="200",method="POST",route="/v1/completions"'
    assert service.metric("ryzanstein_http_responses_total", completions) == SEQUENCES
    assert service.metric("ryzanstein_http_responses_total", 'code="400"') == 1
    assert service.metric("ryzanstein_http_responses_total", 'code="404",method="GET",route="unknown"') == 1


def test_what_runs_is_told(families: dict[str, Family]) -> None:
    (engine,) = families["ryzanstein_engine_info"].samples
    assert engine.labels["tensor_parallel_size"] == "2"
    assert engine.labels["device"] == "cpu"
    assert engine.labels["dtype"] == "bfloat16"  # the embedded model's
    assert engine.labels["kernels"]
    assert engine.labels["version"]
    (cache,) = families["ryzanstein_cache_config_info"].samples
    assert cache.labels["block_size"] == "16"
    assert int(cache.labels["num_gpu_blocks"]) == families["ryzanstein_kv_cache_blocks"].samples[0].value


def test_what_the_endpoint_picker_reads_is_there(families: dict[str, Family]) -> None:
    for name in READ_BY_PICKER:
        assert len(families[name].samples) == 1, name  # it takes the only one of those without times
    assert families["vllm:num_requests_waiting"].type == "gauge"
    (cache,) = families["vllm:cache_config_info"].samples
    assert int(cache.labels["block_size"]) > 0
    assert int(cache.labels["num_gpu_blocks"]) > 0


def test_the_servers_process_is_told(service: ServiceProcess, families: dict[str, Family]) -> None:
    values = {
        metric.name: families[metric.name.removesuffix("_total")].samples[0].value
        for metric in METRICS
        if metric.group is Group.PROCESS
    }
    assert values["process_resident_memory_bytes"] > 10 << 20
    assert 0 < values["process_open_fds"] < values["process_max_fds"]
    assert values["process_cpu_seconds_total"] > 0
    assert values["process_start_time_seconds"] == pytest.approx(
        psutil.Process(service.process.pid).create_time(), abs=2
    )
