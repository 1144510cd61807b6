"""The version is told in one place, and is that of the newest release in the changelog."""

import re
import tomllib
from importlib.metadata import version

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tests.service_process import ROOT

HEADING = re.compile(r"## (?P<version>\d+\.\d+\.\d+)(?: \(\d{4}-\d\d-\d\d\))?")


def headings(changelog: str) -> list[str]:
    """Return the versions of a changelog from the newest to the oldest; "Unreleased" may only be the first heading."""
    lines = [line for line in changelog.splitlines() if line.startswith("## ")]
    if lines and lines[0] == "## Unreleased":
        del lines[0]
    found = [HEADING.fullmatch(line) for line in lines]
    assert all(found), f"not like `## 1.2.3` or `## 1.2.3 (2026-01-31)`: {lines}"
    return [each["version"] for each in found if each is not None]


def declared_version() -> str:
    """Return the version that pyproject.toml declares."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared: str = project["version"]
    return declared


def test_the_newest_release_of_the_changelog_is_the_version_of_the_package() -> None:
    versions = headings((ROOT / "CHANGELOG.md").read_text())
    assert versions[0] == declared_version()
    assert versions == sorted(set(versions), key=Version, reverse=True)


def test_what_is_installed_is_of_the_declared_version() -> None:
    assert version("ryzanstein") == declared_version(), "`make install` makes it so"


def test_no_source_file_repeats_the_version() -> None:
    sources = [path for package in ("engine", "server") for path in (ROOT / package).rglob("*.py")]
    quoted = re.compile(rf"""["']{re.escape(declared_version())}["']""")
    assert [path for path in sources if quoted.search(path.read_text())] == []


@pytest.mark.parametrize(
    "changelog",
    ["## 0.1.0\n## Unreleased\n", "## Unreleased\n## Unreleased\n", "## Unreleased\n## 0.2\n", "## v0.2.0\n"],
)
def test_a_heading_that_is_no_version_is_found(changelog: str) -> None:
    with pytest.raises(AssertionError, match="not like"):
        headings(changelog)


def test_the_images_of_the_manifests_are_of_the_version() -> None:
    found = {}
    for path in (ROOT / "deploy/kubernetes").rglob("kustomization.yaml"):
        for image in yaml.safe_load(path.read_text()).get("images", ()):
            found[path.parent.name] = image["newTag"]
    assert found == {"model": declared_version(), "cpu": declared_version(), "gpu": f"{declared_version()}-cuda"}


@pytest.mark.parametrize(("name", "next_version"), [("uvicorn", "0.55.0"), ("huggingface-hub", "3.0.0")])
def test_what_is_used_beyond_its_documentation_is_not_taken_in_any_version(name: str, next_version: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [each for each in map(Requirement, project["dependencies"]) if each.name == name]
    assert version(name) in wanted.specifier
    assert next_version not in wanted.specifier
