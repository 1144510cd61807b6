"""Directories that are there whole or not at all."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.checkpoint.atomic import NewDirectory, remove_directory, remove_leftovers, unwritable
from engine.protocol.errors import TransientError, is_mistake
from tests.disks import mounted_disk

WRITE_AND_WAIT = """
import sys, time
from pathlib import Path
from engine.checkpoint.atomic import NewDirectory
with NewDirectory(Path(sys.argv[1])) as new:
    (new.path / "part").write_text("half")
    print("writing", flush=True)
    time.sleep(300)
"""

READ_ALL_THE_TIME = """
from pathlib import Path
print("reading", flush=True)
seen = []
while not Path("stop").exists():
    seen.append(int(Path("it/file").read_text()))
assert seen == sorted(seen)
print(*sorted(set(seen)))
"""


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write(destination: Path, text: str, *, replace: bool = False) -> None:
    with NewDirectory(destination, replace=replace) as new:
        (new.path / "file").write_text(text)


def write_half(destination: Path, error: type[BaseException]) -> None:
    with NewDirectory(destination, replace=True) as new:
        (new.path / "file").write_text("half")
        raise error


@contextlib.contextmanager
def writer_of(destination: Path) -> "Iterator[subprocess.Popen[str]]":
    """Another process that is writing `destination`."""
    with subprocess.Popen([sys.executable, "-c", WRITE_AND_WAIT, destination], stdout=subprocess.PIPE, text=True) as it:
        try:
            assert it.stdout is not None
            assert it.stdout.readline() == "writing\n"
            yield it
        finally:
            it.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "small", "256k") as path:
        yield path


def test_it_appears_at_the_end_with_what_was_written(tmp_path: Path) -> None:
    with NewDirectory(tmp_path / "new") as new:
        (new.path / "file").write_text("content")
        (new.path / "inner").mkdir()
        (new.path / "inner/file").write_text("more")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new/file").read_text() == "content"
    assert (tmp_path / "new/inner/file").read_text() == "more"
    assert names_in(tmp_path) == ["new"]


def test_it_is_as_open_to_others_as_any_directory(tmp_path: Path) -> None:
    write(tmp_path / "new", "")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_has_changed_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "it", "old")
    with pytest.raises(error):
        write_half(tmp_path / "it", error)
    assert (tmp_path / "it/file").read_text() == "old"
    assert names_in(tmp_path) == ["it"]


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()  # empty: a plain rename would take its place
    with pytest.raises(ValueError, match=f"^{tmp_path}/it: is there already$"):
        write(tmp_path / "it", "new")
    assert names_in(tmp_path / "it") == []


def test_a_broken_link_is_there_already(tmp_path: Path) -> None:
    (tmp_path / "it").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"it: is there already$"):
        write(tmp_path / "it", "new")


def test_what_came_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it: is there already$"), NewDirectory(tmp_path / "it"):
        (tmp_path / "it").mkdir()
    assert names_in(tmp_path) == ["it"]


def test_a_directory_is_replaced_on_demand(tmp_path: Path) -> None:
    write(tmp_path / "it", "old")
    (tmp_path / "it/stale").write_text("gone")
    write(tmp_path / "it", "new", replace=True)
    assert (tmp_path / "it/file").read_text() == "new"
    assert names_in(tmp_path / "it") == ["file"]
    assert names_in(tmp_path) == ["it"]


def test_replacing_what_is_not_there_makes_it(tmp_path: Path) -> None:
    write(tmp_path / "it", "new", replace=True)
    assert (tmp_path / "it/file").read_text() == "new"


def test_a_reader_finds_the_old_or_the_new_one_at_any_moment(tmp_path: Path) -> None:
    write(tmp_path / "it", "0")
    with subprocess.Popen(
        [sys.executable, "-c", READ_ALL_THE_TIME], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        for number in range(1, 200):
            write(tmp_path / "it", str(number), replace=True)
        (tmp_path / "stop").touch()
        seen = reader.stdout.readline().split()
    assert reader.returncode == 0
    assert len(set(seen)) > 1


def test_a_file_is_not_replaced_by_a_directory(tmp_path: Path) -> None:
    (tmp_path / "it").write_text("mine")
    with pytest.raises(ValueError, match=r"it: is there already, and is no directory$"):
        write(tmp_path / "it", "new", replace=True)
    assert (tmp_path / "it").read_text() == "mine"


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path}/none/it: cannot be written: No such file or directory$"):
        write(tmp_path / "none/it", "new")


def test_a_name_that_is_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be written: File name too long$"):
        write(tmp_path / ("x" * 250), "new")


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    write(small_disk / "it", "old")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(ValueError, match=r"it: cannot be written: Read-only file system$"):
        write(small_disk / "it", "new", replace=True)
    assert (small_disk / "it/file").read_text() == "old"


def test_a_full_disk_is_named_and_left_as_it_was(small_disk: Path) -> None:
    write(small_disk / "it", "old")
    free = os.statvfs(small_disk).f_bavail
    with pytest.raises(ValueError, match=r"it: cannot be written: No space left on device$"):
        write(small_disk / "it", "x" * 2**20, replace=True)
    assert (small_disk / "it/file").read_text() == "old"
    assert names_in(small_disk) == ["it"]
    assert os.statvfs(small_disk).f_bavail == free


def test_a_limit_of_the_size_of_files_is_named(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"it: cannot be written: File too large$"):
            write(tmp_path / "it", "x" * 8192)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert names_in(tmp_path) == []


def test_an_error_that_is_not_of_writing_passes_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), NewDirectory(tmp_path / "it"):
        raise FileNotFoundError(errno.ENOENT, "what was to be read")
    assert names_in(tmp_path) == []


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path) -> None:
    with writer_of(tmp_path / "it") as writer:
        writer.kill()
        writer.wait()
    assert len(names_in(tmp_path)) == 1
    write(tmp_path / "other", "new")
    assert names_in(tmp_path) == ["other"]


def test_what_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    with writer_of(tmp_path / "it"):
        remove_leftovers(tmp_path)
        (holder,) = tmp_path.iterdir()
        assert (holder / "it/part").read_text() == "half"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_may_do_better_at_another_try(number: int, tmp_path: Path) -> None:
    error = unwritable(tmp_path, OSError(number, os.strerror(number)))
    assert isinstance(error, TransientError)
    assert is_mistake(unwritable(tmp_path, OSError(errno.ENOSPC, "full")))


def test_a_holder_whose_writer_came_no_further_than_making_it_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".it.tmp-1-00000000").mkdir()
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == []


def test_what_only_looks_like_a_leftover_stays(tmp_path: Path) -> None:
    (tmp_path / ".it.tmp-1-00000000").mkdir()
    (tmp_path / ".it.tmp-1-00000000/mine").touch()  # and no lock
    (tmp_path / ".it.tmp-1-11111111").touch()
    (tmp_path / ".it.tmp-1-22222222").symlink_to(tmp_path / ".it.tmp-1-00000000")
    (tmp_path / ".it.tmp-removed-1").mkdir()
    before = names_in(tmp_path)
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == before
    assert names_in(tmp_path / ".it.tmp-1-00000000") == ["mine"]


def test_leftovers_of_no_directory_are_none(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "none")


def test_removing_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "it", "old")
    remove_directory(tmp_path / "it")
    assert names_in(tmp_path) == []


def test_removing_what_is_not_there_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        remove_directory(tmp_path / "it")
    assert names_in(tmp_path) == []
