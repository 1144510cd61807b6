"""Memory that ranks share: where it comes from, and that nothing is left of it."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engine.communication import segment
from engine.communication.segment import SegmentError
from tests.disks import mounted_disk
from tests.leftovers import SharedMemory


def test_a_segment_has_no_name_and_is_for_this_user_alone() -> None:
    before = SharedMemory()
    descriptor = segment.create(1 << 16)
    state = os.fstat(descriptor)
    before.check()
    assert (state.st_nlink, state.st_mode & 0o777) == (0, 0o600)
    assert state.st_blocks * 512 >= 1 << 16
    os.close(descriptor)


def test_another_process_maps_the_same_memory() -> None:
    descriptor = segment.create(4096)
    memory = segment.map_segment(descriptor, 4096)
    memory[:5] = b"hello"
    place = msgspec.json.encode(segment.place_of(descriptor)).decode()
    program = (
        "import sys, msgspec; from engine.communication import segment;"
        "memory = segment.attach(msgspec.json.decode(sys.argv[1], type=segment.SegmentPlace));"
        "memory[5:11] = b', you!'; print(bytes(memory[:5]).decode())"
    )
    done = subprocess.run([sys.executable, "-c", program, place], capture_output=True, text=True, check=True)
    assert done.stdout == "hello\n"
    assert memory[:11] == b"hello, you!"
    os.close(descriptor)


def test_memory_of_a_process_that_is_gone_cannot_be_had() -> None:
    descriptor = segment.create(4096)
    place = segment.place_of(descriptor)
    os.close(descriptor)
    with pytest.raises(SegmentError, match=f"the memory of process {os.getpid()} cannot be shared"):
        segment.attach(place)
    other = segment.create(4096)
    assert other == descriptor
    with pytest.raises(SegmentError, match="is not there any more"):
        segment.attach(msgspec.structs.replace(place, identity=(0, 0)))
    os.close(other)


def test_too_little_room_is_told_with_both_sizes_and_what_helps(tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "small", "64k") as directory:
        with pytest.raises(SegmentError) as failure:
            segment.create(1 << 20, directory)
        assert os.statvfs(directory).f_bfree == os.statvfs(directory).f_blocks
    assert str(failure.value) == (
        f"{tmp_path}/small has 64.0 KiB of 64.0 KiB left, and the ranks need 1.0 MiB of it: make it larger "
        "(docker run --shm-size, or on Kubernetes an emptyDir of medium Memory)"
    )


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SegmentError, match=f"{tmp_path}/none gives no memory: No such file or directory"):
        segment.create(4096, tmp_path / "none")
