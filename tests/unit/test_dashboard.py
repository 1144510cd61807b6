"""deploy/grafana: the dashboard is what the table says, laid out well, and asks only for what is served."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics.dashboard import COLUMNS, dashboard, expressions, main, text
from server.metrics.table import METRICS, Group, Kind, Metric, Panel, Show

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy" / "grafana"
FILE = GRAFANA / "dashboards" / "ryzanstein.json"
DASHBOARD = dashboard()
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ROWS = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]

each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])


def cells(panel: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Return the places of the grid that a panel takes."""
    place = panel["gridPos"]
    columns = range(place["x"], place["x"] + place["w"])
    return itertools.product(columns, range(place["y"], place["y"] + place["h"]))


def test_the_file_is_of_today() -> None:
    command = f"python -m server.metrics.dashboard --update {FILE.relative_to(ROOT)}"
    assert FILE.read_text() == text(), f"run: {command}"


def test_the_command_writes_the_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.metrics.dashboard"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == text()
    assert main(["--update", str(tmp_path / "dashboard.json")]) == 0
    assert json.loads((tmp_path / "dashboard.json").read_text()) == DASHBOARD


def test_every_group_is_a_row_and_every_title_a_panel_below_it() -> None:
    assert [row["title"] for row in ROWS] == [group.value for group in Group]
    titles = {(metric.group.value, metric.panel.title) for metric in METRICS if metric.panel is not None}
    shown, row = set(), ""
    for panel in DASHBOARD["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        else:
            shown.add((row, panel["title"]))
    assert shown == titles
    assert len(titles) == len(PANELS)


def test_no_panel_lies_on_another_and_all_fit() -> None:
    taken = [cell for panel in DASHBOARD["panels"] for cell in cells(panel)]
    assert len(set(taken)) == len(taken)
    assert {x for x, _ in taken} == set(range(COLUMNS))
    assert {y for _, y in taken} == set(range(max(y for _, y in taken) + 1))
    tops = [panel["gridPos"]["y"] for panel in DASHBOARD["panels"]]
    assert tops == sorted(tops)


def test_numbers_of_panels_are_used_once() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@each_panel
def test_a_panel_is_whole(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["type"] in ("timeseries", "stat", "table")
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@each_panel
def test_a_panel_asks_the_chosen_source_for_the_chosen_services(panel: dict[str, Any]) -> None:
    for thing in (panel, *panel["targets"]):
        assert thing["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        selectors = re.findall(r"\b((?:ryzanstein|process)_\w+)\{([^}]*)\}", target["expr"])
        assert selectors
        assert len(selectors) == len(re.findall(r"\b(?:ryzanstein|process)_\w+", target["expr"]))
        for name, selector in selectors:
            assert 'instance=~"$instance"' in selector
            assert ('model_name=~"$model_name"' in selector) == name.startswith("ryzanstein_")


@each_panel
def test_lines_of_a_panel_have_different_names(panel: dict[str, Any]) -> None:
    names = [target["legendFormat"] for target in panel["targets"]]
    assert all(names)
    assert len(set(names)) == len(names)


def test_variables_are_used_and_those_that_are_used_are_there() -> None:
    there = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", text())) - {"__rate_interval", "__range", "__all"}
    assert used == there


EXAMPLES = {
    Show.VALUE: (Kind.GAUGE, "max by (rank) (SERIES{})"),
    Show.RATE: (Kind.COUNTER, "sum by (rank) (rate(SERIES{}[I]))"),
    Show.INCREASE: (Kind.COUNTER, "sum by (rank) (increase(SERIES{}[R]))"),
    Show.MEAN: (Kind.HISTOGRAM, "sum by (rank) (rate(SERIES_sum{}[I])) / sum by (rank) (rate(SERIES_count{}[I]))"),
    Show.TIME_SHARE: (Kind.HISTOGRAM, "avg by (rank) (sum by (instance, rank) (rate(SERIES_sum{}[I])))"),
    Show.TABLE: (Kind.INFO, "SERIES{}"),
}


def asked(kind: Kind, panel: Panel) -> list[str]:
    """Return the expressions of a metric's panel, without what makes them long."""
    metric = Metric("ryzanstein_x", kind, "things", "Help.", Group.HTTP, buckets=(1.0,) * (kind is Kind.HISTOGRAM))
    short = {"ryzanstein_x": "SERIES", 'model_name=~"$model_name", instance=~"$instance"': ""}
    short |= {"$__rate_interval": "I", "$__range": "R"}
    found = [expression for expression, _ in expressions(metric, panel)]
    for long, brief in short.items():
        found = [expression.replace(long, brief) for expression in found]
    return found


@pytest.mark.parametrize("show", EXAMPLES)
def test_what_is_shown_decides_what_is_asked(show: Show) -> None:
    kind, expected = EXAMPLES[show]
    assert asked(kind, Panel("title", show, by=("rank",), aggregate="max")) == [expected]


def test_what_has_a_whole_in_each_instance_is_not_summed_over_instances() -> None:
    """Two replicas would have twice the time, and a rank 0 of theirs twice the memory."""
    shares = [panel for panel in PANELS if "Share of the time" in panel["title"] or "the time goes" in panel["title"]]
    memory = [panel for panel in PANELS if panel["title"] == "Memory, by rank and kind"]
    assert (len(shares), len(memory)) == (3, 1)
    for panel in shares + memory:
        assert [target["expr"].startswith("avg by (") for target in panel["targets"]] == [True]


def test_quantiles_are_those_of_all_buckets() -> None:
    assert asked(Kind.HISTOGRAM, Panel("title", Show.QUANTILES, by=("rank",))) == [
        f"histogram_quantile({quantile}, sum by (rank, le) (rate(SERIES_bucket{{}}[I])))"
        for quantile in (0.5, 0.95, 0.99)
    ]


def test_a_quotient_is_of_rates_for_counters_and_of_values_for_gauges() -> None:
    panel = Panel("title", Show.QUOTIENT, over="ryzanstein_x")
    assert asked(Kind.COUNTER, panel) == ["sum(rate(SERIES{}[I])) / sum(rate(SERIES{}[I]))"]
    assert asked(Kind.GAUGE, panel) == ["sum(SERIES{}) / sum(SERIES{})"]


def test_the_rate_of_a_histogram_is_that_of_its_count() -> None:
    assert asked(Kind.HISTOGRAM, Panel("title", Show.RATE)) == ["sum(rate(SERIES_count{}[I]))"]


def test_units_are_those_of_what_is_drawn() -> None:
    units = {panel["title"]: panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS}
    assert units["Time to first token"] == "s"
    assert units["Tokens a second"] == "suffix: tokens/s"
    assert units["KV cache in use"] == "percentunit"
    assert units["Bus bandwidth"] == units["Bytes of collectives"] == "Bps"
    assert units["CPUs used by the server"] == "percentunit"
    assert units["Memory of the server"] == "bytes"
    assert units["Running and waiting"] == "short"  # sequences and requests


def provisioned(kind: str) -> dict[str, Any]:
    """Return the only item of one of Grafana's provisioning files."""
    (path,) = (GRAFANA / "provisioning" / kind).iterdir()
    contents = yaml.safe_load(path.read_text())
    assert contents.pop("apiVersion") == 1
    ((item,),) = contents.values()
    assert isinstance(item, dict)
    return item


def test_grafana_is_given_the_source_and_the_folder_of_the_compose_file() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    source = provisioned("datasources")
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts[f"./{FILE.parent.relative_to(ROOT)}"] == provisioned("dashboards")["options"]["path"]
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
