"""A service's first start writes its model as it is split, and every later one maps that."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import random_llama
from tests.integration.test_shard_cache import BIG_ENOUGH, WRITE_SECONDS
from tests.leftovers import Leftovers
from tests.service_process import ServiceProcess, wait_until
from tests.tokenizers import llama_3

GREEDY = {"prompt": "The kettle sings", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_3().write(random_llama(tmp_path_factory.mktemp("model") / "llama", 0, **BIG_ENOUGH))


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    with Leftovers() as leftovers:
        yield leftovers


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.glob("llama-tp2-float32-*") if (path / "metadata.json").is_file()]


def serve(model: Path, cache: Path, *arguments: str) -> ServiceProcess:
    return ServiceProcess(str(model), "-tp", "2", "--shard-cache-dir", str(cache), *arguments)


def test_later_starts_map_what_the_first_wrote_and_say_the_same(model: Path, tmp_path: Path) -> None:
    with serve(model, tmp_path) as first:
        text = first.complete(**GREEDY)["text"]
        wait_until(lambda: len(entries(tmp_path)) == 1, WRITE_SECONDS)
    (entry,) = entries(tmp_path)
    assert "(shard cache)" not in first.stderr
    with serve(model, tmp_path) as second:
        assert f"  weights   {entry} (shard cache)" in second.stderr
        assert second.complete(**GREEDY)["text"] == text
        mapped = Path(f"/proc/{second.rank_pids()[1]}/maps").read_text()
        assert f"{entry}/weights_rank1.safetensors" in mapped
    truncated = entry / "weights_rank0.safetensors"
    os.truncate(truncated, truncated.stat().st_size // 2)
    command = [sys.executable, "-P", "-m", "server", "serve", str(model), "-tp", "2", "--port", "0"]
    failed = subprocess.run(
        [*command, "--shard-cache-dir", str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert failed.returncode == 1  # a supervisor may start it again
    assert "weights_rank0.safetensors" in failed.stderr
    assert "it was of the shard cache, and is removed: start again" in failed.stderr
    assert entries(tmp_path) == []


def test_int8_matrices_are_kept_as_they_were_rounded(model: Path, tmp_path: Path) -> None:
    with serve(model, tmp_path, "--quantization", "int8") as first:
        text = first.complete(**GREEDY)["text"]
        wait_until(lambda: any(tmp_path.glob("llama-tp2-float32-int8-*/metadata.json")), WRITE_SECONDS)
    (entry,) = tmp_path.glob("llama-tp2-float32-int8-*")
    with serve(model, tmp_path, "--quantization", "int8") as second:
        assert f"  weights   {entry} (shard cache)" in second.stderr
        assert second.complete(**GREEDY)["text"] == text


@pytest.mark.slow
def test_switched_off_nothing_is_written_and_nothing_mapped(model: Path, tmp_path: Path) -> None:
    with serve(model, tmp_path) as service:
        text = service.complete(**GREEDY)["text"]
        wait_until(lambda: len(entries(tmp_path)) == 1, WRITE_SECONDS)
    with serve(model, tmp_path, "--no-shard-cache") as service:
        assert service.complete(**GREEDY)["text"] == text
        assert "shard cache" not in service.stderr
    shutil.rmtree(entries(tmp_path)[0])
    with serve(model, tmp_path, "--no-shard-cache") as service:
        service.complete(**GREEDY)
    assert entries(tmp_path) == []


def writers(service: ServiceProcess) -> list[psutil.Process]:
    found = []
    for process in service.descendants():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "engine.checkpoint" in process.cmdline():
                found.append(process)
    return found


@pytest.mark.slow
def test_a_service_killed_while_it_writes_leaves_nothing_running_and_the_next_start_tidies_up(
    model: Path, tmp_path: Path, leftovers: Leftovers
) -> None:
    with serve(model, tmp_path) as service:
        wait_until(lambda: bool(writers(service)), WRITE_SECONDS)
        [writer] = writers(service)
        wait_until(lambda: any(tmp_path.glob(".*.tmp-*")), WRITE_SECONDS)
        writer.suspend()  # else it might have written all before the service is killed
        processes = service.descendants()
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait()
        leftovers.check(processes)
    assert entries(tmp_path) == []
    with serve(model, tmp_path):
        wait_until(lambda: len(entries(tmp_path)) == 1, WRITE_SECONDS)
        assert [path.name for path in tmp_path.glob(".*.tmp-*")] == []
    shutil.rmtree(entries(tmp_path)[0])
