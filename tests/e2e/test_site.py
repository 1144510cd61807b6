"""The documentation site: it builds without a warning, no link is dead, and it asks no other site for anything."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

pytest.importorskip("mkdocs", reason="the docs extra is not installed (make install)")


class Links(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.targets.append(values["href"])
        elif tag == "link" and values.get("rel") != "canonical":
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    plan = subprocess.run(["make", "--dry-run", "docs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "mkdocs build --strict" in plan
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {page: Links(page.read_text()) for page in site.rglob("*.html")}


def target_of(link: str, page: Path) -> tuple[Path, str]:
    """Return the file that a link leads to, and the anchor there."""
    parts = urlsplit(link)
    target = Path(os.path.normpath(page.parent / unquote(parts.path))) if parts.path else page
    return target / "index.html" if target.is_dir() else target, unquote(parts.fragment)


def dead_links(pages: dict[Path, Links]) -> Iterator[str]:
    for page, links in pages.items():
        for link in links.targets:
            if page.name == "404.html" or re.match(r"https?:|mailto:", link):
                continue
            target, anchor = target_of(link, page)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                yield f"{page.parent.name}: {link}"


def test_no_link_and_no_anchor_leads_nowhere(pages: dict[Path, Links]) -> None:
    assert len(pages) > 20
    assert sorted(dead_links(pages)) == []


def test_no_page_loads_anything_from_another_site(site: Path, pages: dict[Path, Links]) -> None:
    assert [link for links in pages.values() for link in links.loaded if re.match(r"(https?:)?//", link)] == []
    styles = [sheet.read_text() for sheet in site.rglob("*.css")]
    assert styles
    assert [
        url for style in styles for url in re.findall(r"(?:@import|url\()\s*['\"]?((?:https?:)?//[^'\")]+)", style)
    ] == []


def test_the_first_page_is_the_readme(site: Path) -> None:
    title = (ROOT / "README.md").read_text().splitlines()[0].removeprefix("# ")
    assert f">{title}<" in (site / "index.html").read_text()


def test_each_option_stands_in_the_reference_with_its_default_and_help(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "api/config/index.html").read_text())
    assert "max_num_seqs: int = 64" in page
    assert "Sequences that may be in one step." in page
    assert "drain_timeout: float = 30.0" in page


@pytest.mark.parametrize("package", ["parallel", "scheduler", "kvcache"])
def test_each_module_of_a_public_package_is_in_the_reference(package: str) -> None:
    page = (DOCS / "api" / f"{package}.md").read_text()
    modules = {path.stem for path in (ROOT / "engine" / package).glob("*.py")} - {"__init__"}
    assert modules == set(re.findall(rf"::: engine\.{package}\.(\w+)", page))


def test_a_comment_behind_a_field_is_its_description(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "api/messages/index.html").read_text())
    assert "Outputs: they count as such for penalties, limits and positions." in page
