"""Weights are in memory for which huge pages were asked."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoint.huge_pages import HUGE_PAGE, ask_for_huge_pages
from engine.checkpoint.mapped_memory import map_privately

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages"
)


def is_advised(tensor: Tensor) -> bool:
    """Whether the mapping that holds the middle of `tensor` carries the flag hg, as /proc/self/smaps tells."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    is_here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            start, stop = (int(text, 16) for text in words[0].split("-"))
            is_here = start <= address < stop
        elif is_here and words[0] == "VmFlags:":
            return "hg" in words
    raise AssertionError(f"{address:x} is not mapped")


def test_a_large_tensor_is_asked_to_be_in_huge_pages() -> None:
    tensor = torch.empty(8 * HUGE_PAGE, dtype=torch.uint8)
    ask_for_huge_pages(tensor)
    assert is_advised(tensor)


def test_a_small_tensor_is_left_where_it_is() -> None:
    tensor = torch.empty(32 * HUGE_PAGE, dtype=torch.uint8)
    ask_for_huge_pages(tensor[: HUGE_PAGE // 2])
    assert not is_advised(tensor[: HUGE_PAGE // 2])


def test_a_mapped_file_is_asked_to_be_in_huge_pages(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * HUGE_PAGE))
    with path.open("rb") as file:
        content = map_privately(file.fileno(), 4 * HUGE_PAGE)
    assert is_advised(content)
    assert not content.any()
