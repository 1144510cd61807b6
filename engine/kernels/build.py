"""Compiles the C++ kernels, one library an instruction set: as a step of the package's build, and by itself.

    python -m engine.kernels.build          # into the source tree, as an editable installation has them

Nothing of this package but the instruction sets is imported: the environment that a package is built in has no torch.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from engine.kernels.instruction_sets import INSTRUCTION_SETS, InstructionSet
from engine.kernels.sources import DIRECTORY, HEADERS, SOURCES, library_name, source_hash

COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # what is fused is written as fma: results must not hang on a compiler's mood
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",  # GCC 12's own headers
    "-Wno-maybe-uninitialized",
)


def compile_kernels(directory: Path, *, warnings_are_errors: bool = False) -> list[Path]:
    """Compile a library for each instruction set into `directory` and return their paths.

    Args:
        directory: made if need be.
        warnings_are_errors: for our tests; other people's compilers warn of other things.

    Raises:
        RuntimeError: if there is no compiler, it fails, or this is no x86-64.
        OSError: if the directory cannot be written.
    """
    if platform.machine() != "x86_64":
        raise RuntimeError(f"the C++ kernels are for x86-64, and this is {platform.machine()}")
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler was found: neither $CXX nor g++ nor c++")
    directory.mkdir(parents=True, exist_ok=True)
    command = [*compiler.split(), *COMMON_FLAGS, *(["-Werror"] if warnings_are_errors else [])]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda item: _compile(command, item, directory), INSTRUCTION_SETS))


def find_compiler() -> str | None:
    """Return the command of a C++ compiler: `$CXX`, or `g++` or `c++`, whichever is there."""
    return os.environ.get("CXX", "").strip() or shutil.which("g++") or shutil.which("c++")


def _compile(compiler: Sequence[str], instruction_set: InstructionSet, directory: Path) -> Path:
    path = directory / library_name(instruction_set.name)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")  # a library in use is replaced, never rewritten
    command = [
        *compiler,
        *instruction_set.compiler_flags,
        f'-DSOURCE_HASH="{source_hash()}"',
        *map(str, SOURCES),
        "-o",
        str(unfinished),
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{compiler[0]} cannot be run: {error.strerror}") from error
    try:
        if result.returncode != 0:
            raise RuntimeError(
                f"{compiler[0]} cannot compile the kernels for {instruction_set.name}:\n{result.stderr[:4000]}"
            )
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


class BuildKernels(build_ext):
    """The package's build step. Where nothing can be compiled it says so, and the package works with torch alone."""

    def run(self) -> None:
        """Compile into the build folder, or into the source tree for an editable installation."""
        directory = (Path.cwd() if self.inplace else Path(self.build_lib)) / "engine" / "kernels"
        try:
            compile_kernels(directory)
        except (RuntimeError, OSError) as error:
            print(f"warning: ryzanstein is built without its C++ kernels: {error}", file=sys.stderr)  # noqa: T201
            _remove_libraries_of_other_sources(directory)

    def get_source_files(self) -> list[str]:
        """Return what a source distribution must have to be built."""
        return [str(path.relative_to(DIRECTORY.parents[1])) for path in (*SOURCES, *HEADERS)]

    def get_outputs(self) -> list[str]:
        """Return what `run` wrote."""
        return [str(path) for path in _libraries(Path(self.build_lib) / "engine" / "kernels")]

    def get_output_mapping(self) -> dict[str, str]:
        """Return nothing: an editable installation has the libraries in the source tree."""
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any Python 3: ctypes loads the libraries, which know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of interpreter, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


def _libraries(directory: Path) -> Iterable[Path]:
    paths = (directory / library_name(item.name) for item in INSTRUCTION_SETS)
    return (path for path in paths if path.exists())


def _remove_libraries_of_other_sources(directory: Path) -> None:
    """Remove what earlier sources left: with a library that does not fit nothing starts, without any torch computes."""
    for path in _libraries(directory):
        if source_hash().encode() not in path.read_bytes():
            path.unlink()


if __name__ == "__main__":
    try:
        compile_kernels(Path(__file__).parent)
    except (RuntimeError, OSError) as error:
        sys.exit(f"ryzanstein: error: {error}")
