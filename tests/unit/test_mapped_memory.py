"""engine.checkpoint.mapped_memory: what is mapped comes into memory in the background, and holds nothing up."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.bench.touch import map_file
from engine.checkpoint.mapped_memory import CHUNK_BYTES, LOWEST_PRIORITY, PAGE, PROBES, MappedMemory, share_probes

SIZE = 3 * CHUNK_BYTES + 4321


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    return path


def test_prefetching_brings_all_of_it_in_piece_by_piece(file: Path) -> None:
    pieces: list[int] = []
    memory = MappedMemory([(str(file), map_file(file))])
    memory.prefetch(pieces.append).join()
    assert sum(pieces) == memory.num_bytes >= SIZE
    assert max(pieces) == CHUNK_BYTES
    assert memory.resident_share() == 1.0


def test_prefetching_gives_way_to_other_threads(file: Path) -> None:
    priorities: set[int] = set()
    memory = MappedMemory([(str(file), map_file(file))])
    memory.prefetch(lambda _: priorities.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))).join()
    assert priorities == {LOWEST_PRIORITY}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < LOWEST_PRIORITY


def test_a_process_that_ends_while_it_prefetches_ends_in_order(file: Path) -> None:
    os.truncate(file, 8 * 2**30)  # a hole: more than can be brought in while the process ends
    program = (
        "import sys, pathlib\n"
        "from engine.bench.touch import map_file\n"
        "from engine.checkpoint.mapped_memory import MappedMemory\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "MappedMemory([(str(path), map_file(path))]).prefetch(lambda count: print(count, flush=True))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout.splitlines()) < 8 * 2**30 // CHUNK_BYTES


@pytest.mark.parametrize("lengths", [[1 << 35], [1 << 29] * 70, [PAGE] * 2000, [PAGE, 1 << 35], [3 * PAGE]])
def test_the_resident_share_asks_about_as_many_pages_of_many_files_as_of_one(lengths: list[int]) -> None:
    probes = share_probes(lengths)
    assert sum(probes) <= PROBES + len(lengths)
    assert sum(probes) >= min(PROBES - len(lengths), sum(lengths) // PAGE)
    assert all(1 <= count <= length // PAGE for count, length in zip(probes, lengths, strict=True))


def test_of_many_files_the_resident_share_counts_each_by_its_size(tmp_path: Path) -> None:
    contents = []
    for index, pages in enumerate([300, 100, 100]):
        path = tmp_path / str(index)
        path.touch()
        os.truncate(path, pages * PAGE)  # a hole: nothing of it is in memory before it is read
        contents.append((str(path), map_file(path)))
    assert MappedMemory(contents).resident_share() == 0.0
    contents[1][1].sum()
    assert MappedMemory(contents).resident_share() == pytest.approx(0.2)
    contents[0][1].sum()
    assert MappedMemory(contents).resident_share() == pytest.approx(0.8)
