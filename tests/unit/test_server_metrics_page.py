"""docs/metrics.md is what the table says."""

import subprocess
import sys
from pathlib import Path

from server.metrics.page import READ_BY_PICKER, main, page
from server.metrics.table import METRICS, VLLM_METRICS

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_is_of_today() -> None:
    assert PAGE.read_text() == page(), "run: python -m server.metrics.page --update docs/metrics.md"


def test_every_metric_has_a_row() -> None:
    text = page()
    for metric in METRICS:
        assert text.count(f"\n| `{metric.name}` |") == 1
        assert metric.help in text


def test_what_the_endpoint_picker_reads_is_served_under_vllms_names() -> None:
    names = {name for metric in METRICS for name in metric.vllm} | {metric.name for metric in VLLM_METRICS}
    assert set(READ_BY_PICKER) <= names
    assert page().count(" * |") == len(READ_BY_PICKER)


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.metrics.page"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == page()
    assert main(["--update", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text() == page()
