"""Reading and writing safetensors files: mapped or not, whole or in slices, and files that are not what they were."""

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint import tensor_file
from engine.checkpoint.targets import TensorSlice
from engine.checkpoint.tensor_file import TensorFile
from engine.checkpoint.tensor_header import TORCH_DTYPES, is_filler, make_header
from engine.checkpoint.tensor_writer import TensorFileWriter

STRICT_OVERCOMMIT = 2  # proc_sys_vm(5)
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=9).filter(lambda name: not name.startswith("__"))
KINDS = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(TORCH_DTYPES.values())), SHAPES), max_size=6)


def draw_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def write(path: Path, tensors: dict[str, Tensor]) -> str:
    with TensorFileWriter(path, [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return writer.checksum


def same(left: Tensor, right: Tensor) -> bool:
    """Whether type, shape and bytes are the same."""
    return (left.dtype, left.shape) == (right.dtype, right.shape) and bytes_of(left) == bytes_of(right)


def bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@given(KINDS)
def test_what_is_written_opens_with_the_stock_library(kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    tensors = {name: draw_tensor(*kind, seed) for seed, (name, kind) in enumerate(kinds.items())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.safetensors")
        write(path, tensors)
        stock = {name: tensor for name, tensor in load_file(path).items() if not is_filler(name)}
        assert stock.keys() == tensors.keys()
        assert all(same(stock[name], tensor) for name, tensor in tensors.items())
        file = TensorFile(path)
        for name, tensor in tensors.items():
            assert same(file.read(name), tensor)
            assert tensor.numel() == 0 or file.read(name).data_ptr() % 64 == 0
        assert file.names == list(tensors)
        file.close()


@pytest.fixture(params=["ours", "stock"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file, and what it holds. The stock library puts tensors where they fall, behind a header of any length."""
    kinds = [(dtype, shape) for dtype in TORCH_DTYPES.values() for shape in ((5,), (3, 7), (2, 5, 3), (), (0, 4))]
    tensors = {f"{i}": draw_tensor(dtype, shape, i) for i, (dtype, shape) in enumerate(kinds)}
    path = tmp_path / "file.safetensors"
    if request.param == "ours":
        write(path, tensors)
    else:
        save_file(tensors, path)
    return path, tensors


@pytest.mark.parametrize("use_memory_map", [True, False])
def test_every_slice_along_every_dimension_is_what_torch_makes_of_it(
    written: tuple[Path, dict[str, Tensor]], use_memory_map: bool
) -> None:
    path, tensors = written
    file = TensorFile(path, use_memory_map=use_memory_map)
    for name, tensor in tensors.items():
        assert same(file.read(name), tensor)
        for dim, size in enumerate(tensor.shape):
            for start in range(size + 1):
                for stop in range(start, size + 1):
                    wanted = TensorSlice(tuple(tensor.shape), dim, start, stop)
                    assert same(file.read(name, wanted), tensor.narrow(dim, start, stop - start)), (name, wanted)
    file.close()


def test_data_that_is_not_aligned_for_its_type_is_read_from_a_mapped_file(tmp_path: Path) -> None:
    """The format allows any place; the stock library sorts by type, so that only others write such files."""
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[3],"data_offsets":[1,13]}}'
    )
    values = torch.tensor([1.5, -2.5, 3.5])
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" + bytes_of(values))
    assert torch.equal(TensorFile(path).read("b"), values)
    assert torch.equal(TensorFile(path).read("b", TensorSlice((3,), 0, 1, 3)), values[1:])


def test_reads_of_more_than_one_chunk_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 1000)
    values, heard = torch.arange(30_000).view(100, 300), []
    write(tmp_path / "file", {"a": values})
    file = TensorFile(tmp_path / "file", use_memory_map=False, check=lambda: heard.append(1))
    heard.clear()
    assert torch.equal(file.read("a"), values)
    assert len(heard) == 240
    assert torch.equal(file.read("a", TensorSlice((100, 300), 1, 7, 290)), values[:, 7:290])
    file.close()


def bytes_read_by(read: Callable[[], object]) -> int:
    before = _rchar()
    read()
    return _rchar() - before - (_rchar() - _rchar())


def _rchar() -> int:
    with Path("/proc/self/io").open("rb", buffering=0) as file:
        return int(file.read(100).split()[1])


@pytest.mark.parametrize(
    ("wanted", "num_bytes"),
    [
        (TensorSlice((1000, 500)), 2_000_000),
        (TensorSlice((1000, 500), 0, 10, 20), 20_000),
        (TensorSlice((1000, 500), 1, 490, 500), 40_000),
        (TensorSlice((1000, 500), 1, 10, 10), 0),
    ],
)
def test_only_the_bytes_of_a_slice_are_read(tmp_path: Path, wanted: TensorSlice, num_bytes: int) -> None:
    write(tmp_path / "file", {"before": torch.ones(999), "a": torch.ones(1000, 500), "behind": torch.ones(999)})
    file = TensorFile(tmp_path / "file", use_memory_map=False)
    overhead = bytes_read_by(lambda: None)  # of looking
    assert bytes_read_by(lambda: file.read("a", wanted)) - overhead == pytest.approx(num_bytes, abs=20)
    file.close()


# --- files that are not what they should be ---------------------------------------------------------------------------


@pytest.mark.parametrize("use_memory_map", [True, False])
def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(tmp_path: Path, use_memory_map: bool) -> None:
    path = tmp_path / "file.safetensors"
    write(path, {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(2, 3)})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{path}: is no whole safetensors file .*downloaded completely") as caught:
            TensorFile(path, use_memory_map=use_memory_map)
        assert "\n" not in str(caught.value)


@given(st.integers(0), st.integers(0, 255))
@settings(max_examples=300)
def test_a_flipped_byte_of_the_header_is_refused_or_reads_what_is_there(position: int, value: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        write(path, {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(2, 3), "c": torch.ones(5)})
        content = bytearray(path.read_bytes())
        content[position % (len(content) - 100)] = value
        path.write_bytes(content)
        try:
            file = TensorFile(path)
        except ValueError:
            return
        for name in file.names:
            if file.places[name].dtype in TORCH_DTYPES:
                assert file.read(name).nbytes == file.places[name].num_bytes
        file.close()


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "file"
    for size in range(200):
        path.write_bytes(draw.randbytes(size))
        with pytest.raises(ValueError, match="is no whole safetensors file"):
            TensorFile(path)


@pytest.mark.parametrize("use_memory_map", [True, False])
def test_a_file_that_is_not_there_or_cannot_be_opened_is_named(tmp_path: Path, use_memory_map: bool) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/none: cannot be read: No such file or directory"):
        TensorFile(tmp_path / "none", use_memory_map=use_memory_map)
    with pytest.raises(ValueError, match=f"{tmp_path}: cannot be read: Is a directory"):
        TensorFile(tmp_path, use_memory_map=use_memory_map)


def test_a_file_that_has_become_shorter_since_it_was_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, {"a": torch.ones(1000)})
    file = TensorFile(path, use_memory_map=False)
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match=f"{path}: ends at byte 1000; it was longer when it was opened"):
        file.read("a")
    file.close()


def test_a_file_larger_than_all_memory_is_mapped(tmp_path: Path) -> None:
    """Its pages come and go; the system must not set memory aside for writing to all of them."""
    if int(Path("/proc/sys/vm/overcommit_memory").read_text()) == STRICT_OVERCOMMIT:
        pytest.skip("this system sets memory aside for all that is mapped")
    sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    memory = sum(int(sizes[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    path = tmp_path / "file"
    header, places = make_header([("a", "U8", (memory + 2**30,)), ("b", "U8", (3,))], {})
    path.write_bytes(header)
    os.truncate(path, places["b"].start)  # a hole
    with path.open("ab") as content:
        content.write(bytes([1, 2, 3]))
    file = TensorFile(path)
    assert file.read("b").tolist() == [1, 2, 3]
    file.close()


def open_and_close(path: Path) -> None:
    file = TensorFile(path)
    file.close()
    file.close()


def test_refused_and_closed_files_leave_no_descriptor_open(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"bad")
    write(tmp_path / "good", {"a": torch.ones(3)})
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        with pytest.raises(ValueError, match="is no whole"):
            TensorFile(tmp_path / "bad")
        open_and_close(tmp_path / "good")
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_tensor_outlives_its_closed_file_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, {"a": torch.ones(3)})
    content = path.read_bytes()
    file, other = TensorFile(path), TensorFile(path)
    tensor, neighbour = file.read("a"), other.read("a")
    file.close()
    tensor.mul_(2)
    assert torch.equal(tensor, torch.full((3,), 2.0))
    assert torch.equal(neighbour, torch.ones(3))
    assert path.read_bytes() == content
    other.close()


def test_the_checksum_is_that_of_the_files_bytes(tmp_path: Path) -> None:
    import xxhash  # noqa: PLC0415  # the oracle of this test alone

    checksum = write(tmp_path / "file", {"a": torch.arange(1000), "b": torch.ones(())})
    assert checksum == xxhash.xxh3_128((tmp_path / "file").read_bytes()).hexdigest()
