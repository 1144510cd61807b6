"""The lines that docs/architecture.md draws: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH_FREE = ("engine.protocol", "engine.scheduler", "engine.kvcache", "engine.orchestrator", "server")


def modules(package: str) -> list[Path]:
    folder = ROOT / package.replace(".", "/")
    return sorted(folder.rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def offenders(package: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    def belongs(name: str, packages: tuple[str, ...]) -> bool:
        return any(name == package or name.startswith(f"{package}.") for package in packages)

    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in sorted(imported_names(path))
        if belongs(name, forbidden) and not belongs(name, allowed)
    ]


@pytest.mark.parametrize("package", TORCH_FREE)
def test_no_torch_where_starting_fast_matters(package: str) -> None:
    assert offenders(package, ("torch", "transformers")) == []


@pytest.mark.parametrize("package", TORCH_FREE)
def test_importing_everything_there_does_not_bring_torch_in(package: str) -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules(package)]
    imports = "\n".join(f"import {name}" for name in names if not name.endswith("__main__"))
    program = f"{imports}\nimport sys\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "False"


def test_the_server_knows_only_the_engines_protocol() -> None:
    assert offenders("server", ("engine",), allowed=("engine.protocol",)) == []


def test_the_text_side_knows_neither_http_nor_the_engine() -> None:
    assert offenders("server.text", ("server", "engine", "fastapi", "starlette"), allowed=("server.text",)) == []


def test_the_engine_does_not_know_the_server() -> None:
    assert offenders("engine", ("server", "fastapi", "starlette", "uvicorn", "tokenizers")) == [
        "engine/embedded/train.py imports tokenizers"  # the script that made the embedded model
    ]


def test_transformers_is_a_test_dependency_only() -> None:
    assert offenders("engine", ("transformers",)) == []


@pytest.mark.parametrize("package", ["engine.protocol", "engine.scheduler", "engine.kvcache", "engine.parallel"])
def test_data_flows_one_way(package: str) -> None:
    """What is below knows nothing of the loops and processes above it."""
    assert offenders(package, ("engine.worker", "engine.orchestrator")) == []


def test_there_is_no_pickle() -> None:
    assert offenders("engine", ("pickle",)) + offenders("server", ("pickle",)) == []
