"""docs/capacity.md holds what the formula says, and the formula says of the 1B what was measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.bench.capacity_page import BEGIN, END, MEASURED, predicted_for_1b, tables, with_tables
from engine.protocol.units import format_bytes, format_seconds

PAGE = Path(__file__).parents[2] / "docs" / "capacity.md"


def test_the_page_has_the_tables_of_today() -> None:
    page = PAGE.read_text()
    assert with_tables(page) == page, "run: python -m engine.bench.capacity_page --update docs/capacity.md"


def test_the_page_names_the_figures_that_the_tables_are_made_of() -> None:
    text = " ".join(PAGE.read_text().split())
    assert f"`load()` returned in {format_seconds(MEASURED.load_seconds)}" in text
    assert f"a rank touched {MEASURED.touch_rate / 1e9:.1f} GB/s" in text
    assert f"{MEASURED.disk_rate / 1e9:.1f} GB/s for both ranks" in text
    assert f"was {format_bytes(MEASURED.overhead)} larger" in text


def test_what_was_predicted_of_the_1b_is_what_was_measured() -> None:
    capacity, times = predicted_for_1b()
    assert capacity.file == MEASURED.file_bytes
    assert capacity.weights == MEASURED.weight_bytes
    assert times.warm_cpu == pytest.approx(MEASURED.warm_seconds, rel=0.25)
    assert times.cold_cpu == pytest.approx(MEASURED.cold_seconds, rel=0.5)


def test_every_model_that_was_not_run_is_labelled_so() -> None:
    written = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    sections = re.split(r"^### ", written, flags=re.MULTILINE)[1:]
    for section in sections:
        heading = section.splitlines()[0]
        assert any(f"| {name} |" in section for name in ("7B", "13B", "70B")) == ("(computed, not run)" in heading)
    assert len(sections) == 4


@pytest.mark.slow
def test_the_command_writes_the_tables_into_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    command = [sys.executable, "-m", "engine.bench.capacity_page"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == tables()
    subprocess.run([*command, "--update", str(page)], check=True)
    assert page.read_text() == f"before\n{BEGIN}\n\n{tables()}\n{END}\nafter\n"


def test_a_page_without_a_place_for_them_is_an_error() -> None:
    with pytest.raises(ValueError, match="the page has no"):
        with_tables("nothing")
