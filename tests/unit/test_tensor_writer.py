"""Files of tensors, written one after the other."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint import tensor_writer
from engine.checkpoint.checksum import file_checksum
from engine.checkpoint.tensor_writer import CHUNK_BYTES, TensorFileWriter


def test_a_file_of_many_chunks_holds_what_was_written(tmp_path: Path) -> None:
    values = torch.arange(3 * CHUNK_BYTES // 4 + 5, dtype=torch.int32)
    small = torch.tensor(3.0)
    with TensorFileWriter(tmp_path / "file", [("a", values.dtype, (len(values),)), ("b", small.dtype, ())]) as writer:
        writer.write("a", values)
        writer.write("b", small)
    stored = load_file(tmp_path / "file")
    assert torch.equal(stored["a"], values)
    assert torch.equal(stored["b"], small)
    assert writer.size == (tmp_path / "file").stat().st_size
    assert writer.checksum == file_checksum(tmp_path / "file")


def test_progress_is_told_of_every_byte_in_small_pieces(tmp_path: Path) -> None:
    told: list[int] = []
    values = torch.zeros(2 * CHUNK_BYTES + 3, dtype=torch.uint8)
    with TensorFileWriter(tmp_path / "file", [("a", values.dtype, (len(values),))], advance=told.append) as writer:
        writer.write("a", values)
    assert sum(told) == writer.size
    assert max(told) == CHUNK_BYTES


def test_what_progress_raises_ends_the_writing(tmp_path: Path) -> None:
    def stop_in_the_middle(_: int) -> None:
        if (tmp_path / "file").stat().st_size > CHUNK_BYTES:
            raise InterruptedError

    values = torch.zeros(3 * CHUNK_BYTES, dtype=torch.uint8)
    writer = TensorFileWriter(tmp_path / "file", [("a", values.dtype, (len(values),))], advance=stop_in_the_middle)
    with pytest.raises(InterruptedError), writer:
        writer.write("a", values)
    assert CHUNK_BYTES < (tmp_path / "file").stat().st_size < 3 * CHUNK_BYTES


def test_large_files_reach_the_disk_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fdatasync = os.fdatasync

    def count(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", count)
    monkeypatch.setattr(tensor_writer, "SYNC_BYTES", 2 * CHUNK_BYTES)
    values = torch.zeros(5 * CHUNK_BYTES, dtype=torch.uint8)
    with TensorFileWriter(tmp_path / "file", [("a", values.dtype, (len(values),))]) as writer:
        writer.write("a", values)
    assert len(synced) == 2
    assert synced[0] < synced[1] < writer.size


def test_a_file_whose_header_does_not_fit_is_closed(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    opened = len(list(Path("/proc/self/fd").iterdir()))
    try:
        with pytest.raises(OSError, match="File too large"), TensorFileWriter(tmp_path / "file", []):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
