"""What the site shows beyond docs/: the README is its first page, and links to sources lead to pages that show them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {"index.md": ROOT / "README.md", "changelog.md": ROOT / "CHANGELOG.md"}
_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<path>(?![a-z]+:)[^)#\s]+)(?P<anchor>#[^)]*)?\)")
_CELL = re.compile(r"<td>.*?</td>", re.DOTALL)
_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
_LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".yml": "yaml", ".yaml": "yaml", ".json": "json"}
_SOURCE_PAGE = """---
search:
  exclude: true
hide: [toc]
---
# {title}

~~~~~~{language}
{text}
~~~~~~
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, the changelog, and a page for each source file that a page links to."""
    for name, path in PAGES.items():
        files.append(File.generated(config, name, content=path.read_text()))
    for target in sorted(set(_linked_files(files))):
        files.append(File.generated(config, _source_page(target), content=_show(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Let links that leave docs/ lead to the pages of the site that stand for them."""
    name = page.file.src_uri
    return markdown if name.startswith("source/") else _LINK.sub(lambda link: _on_the_site(link, name), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Let names in tables be broken after an underscore or a slash, rather than anywhere or nowhere."""
    return _CELL.sub(lambda cell: _CODE.sub(lambda code: re.sub("([_/])", r"\1<wbr>", code[0]), cell[0]), html)


def _linked_files(files: Files) -> Iterator[Path]:
    for file in files.documentation_pages():
        for link in _LINK.finditer(file.content_string):
            target = _target(link["path"], file.src_uri)
            if target.is_file() and _page_of(target) == _source_page(target):
                yield target


def _target(path: str, name: str) -> Path:
    """Return the file that a link on the page `name` means."""
    folder = PAGES.get(name, DOCS / name).parent
    return Path(os.path.normpath(folder / path))


def _page_of(target: Path) -> str:
    """Return the page that shows a file."""
    for name, path in PAGES.items():
        if path == target:
            return name
    return target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) else _source_page(target)


def _source_page(target: Path) -> str:
    return f"source/{target.relative_to(ROOT).as_posix()}.md"


def _show(target: Path) -> str:
    """Return a page that shows a source file, and is in nobody's search results."""
    language = _LANGUAGES.get(target.suffix, "make" if target.name == "Makefile" else "text")
    title = target.relative_to(ROOT).as_posix()
    return _SOURCE_PAGE.format(title=title, language=language, text=target.read_text())


def _on_the_site(link: re.Match[str], name: str) -> str:
    target = _target(link["path"], name)
    if target.is_dir():
        return link["text"] if link["text"].startswith("`") else f"`{link['text']}`"
    if not target.is_relative_to(ROOT):
        return link[0]
    path = os.path.relpath(_page_of(target), Path(name).parent)
    return f"[{link['text']}]({path}{link['anchor'] or ''})"
