"""Which tensors go into which file: as many as the limit allows, with header and fillers, and no byte more."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint.layout import Place, fill_files
from engine.checkpoint.tensor_writer import TensorFileWriter, file_size

SIZES = st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=3), max_size=20)


def named(sizes: list[list[int]]) -> list[list[Place]]:
    return [[(f"{i}.{j}", torch.uint8, (size,)) for j, size in enumerate(group)] for i, group in enumerate(sizes)]


@given(sizes=SIZES, limit=st.integers(1, 2000), alignment=st.sampled_from((1, 64)))
def test_no_file_is_larger_than_asked_for_and_none_smaller_than_it_must(
    sizes: list[list[int]], limit: int, alignment: int
) -> None:
    groups = named(sizes)
    counts = fill_files(groups, limit, alignment)
    assert sum(counts) == len(groups)
    for count in counts:
        mine, groups = groups[:count], groups[count:]
        assert count <= 1 or file_size([place for group in mine for place in group], alignment) <= limit
        if groups:
            assert file_size([place for group in (*mine, groups[0]) for place in group], alignment) > limit


@pytest.mark.parametrize("alignment", [1, 64])
def test_a_files_size_is_known_beforehand(tmp_path: Path, alignment: int) -> None:
    places: list[Place] = [("a", torch.float16, (3, 7)), ("b", torch.float32, ()), ("c", torch.uint8, (0,))]
    with TensorFileWriter(tmp_path / "file", places, alignment=alignment) as writer:
        for name, dtype, shape in places:
            writer.write(name, torch.zeros(shape, dtype=dtype))
    assert (tmp_path / "file").stat().st_size == writer.size == file_size(places, alignment)
