"""Downloads from a hub on loopback, by the process that a service uses."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path

import psutil
import pytest

from engine.protocol.config import EMBEDDED_MODEL
from engine.protocol.errors import TransientError, is_mistake
from server.model_source import hub as hub_module
from server.model_source.config import ModelSourceConfig
from server.model_source.fetch import PART_SUFFIX
from server.model_source.hub import HUB_PROCESS, NotDownloadedError, describe, download, find
from server.model_source.hub_messages import HubDescribed
from tests.hub import Hub, Repository, files_of
from tests.service_process import wait_until

MODEL = files_of(EMBEDDED_MODEL)
SMALL = {name: content for name, content in MODEL.items() if name != "model.safetensors"}
BIG = os.urandom(24 << 20)  # a download is written in pieces of 10 MiB


def nothing(_: Path) -> None:
    """Check nothing."""


def shards() -> dict[str, bytes]:
    """Two files that an index names, and one that nothing names."""
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    named = {name: os.urandom(200_000) for name in weight_map.values()}
    index = json.dumps({"weight_map": weight_map}).encode()
    return {**SMALL, "model.safetensors.index.json": index, **named, "model-00003-of-00002.safetensors": b"old"}


def distributed() -> dict[str, bytes]:
    files = [{"name": f"weights_rank{rank}.safetensors"} for rank in range(2)]
    metadata = json.dumps({"config": json.loads(SMALL["config.json"]), "files": files}).encode()
    ranks = {file["name"]: os.urandom(1000) for file in files}
    return {"metadata.json": metadata, "tokenizer.json": SMALL["tokenizer.json"], **ranks, "weights_rank2.pt": b"no"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    besides = {
        "pytorch_model.bin": b"p" * 200_000,
        "consolidated.safetensors": b"c",
        "original/model.safetensors": b"o",
    }
    repositories = {
        "org/model": Repository({"main": {**MODEL, **besides}, "v1": {**MODEL, "README.md": b"old"}}),
        "org/gated": Repository({"main": MODEL}, token="right"),
        "org/private": Repository({"main": MODEL}, token="right", is_private=True),
        "org/shards": Repository({"main": shards()}),
        "org/distributed": Repository({"main": distributed()}),
        "org/pickles": Repository({"main": {**SMALL, "pytorch_model.bin": b"p"}}),
        "org/dataset": Repository({"main": {"train.csv": b"1,2"}}),
        "org/incomplete": Repository({"main": {**shards(), "model-00002-of-00002.safetensors": b""}}),
        "org/big": Repository({"main": {**SMALL, "model.safetensors": BIG}}),
    }
    del repositories["org/incomplete"].revisions["main"]["model-00002-of-00002.safetensors"]
    with Hub(repositories) as hub:
        yield hub


@pytest.fixture(autouse=True)
def cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine; what is started in the test asks the hub on loopback."""
    for name, value in hub.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "hub"


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_model_is_downloaded_without_pickles_and_duplicates(cache: Path) -> None:
    directory = download("org/model", ModelSourceConfig(), nothing)
    assert names(directory) == names(EMBEDDED_MODEL)
    assert {name: (directory / name).read_bytes() for name in MODEL} == MODEL
    assert directory.is_relative_to(cache)


def test_a_sharded_model_is_what_its_index_names() -> None:
    directory = download("org/shards", ModelSourceConfig(), nothing)
    assert [name for name in names(directory) if name.endswith(".safetensors")] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_distributed_checkpoint_is_what_its_metadata_names() -> None:
    directory = download("org/distributed", ModelSourceConfig(), nothing)
    assert names(directory) == [
        "metadata.json",
        "tokenizer.json",
        "weights_rank0.safetensors",
        "weights_rank1.safetensors",
    ]


def test_the_model_is_checked_before_its_weights_are_downloaded(hub: Hub) -> None:
    def refuse(directory: Path) -> None:
        assert (directory / "tokenizer.json").is_file()
        raise ValueError("cannot be split")

    hub.bytes_per_second = 1e6
    with pytest.raises(ValueError, match="cannot be split"):
        download("org/big", ModelSourceConfig(), refuse)
    assert hub.sent < len(BIG) / 2


def test_a_revision_is_a_branch_a_tag_or_a_commit() -> None:
    main = download("org/model", ModelSourceConfig(), nothing)
    tagged = download("org/model", ModelSourceConfig(revision="v1"), nothing)
    assert main.name != tagged.name
    assert download("org/model", ModelSourceConfig(revision=main.name), nothing) == main
    assert find("org/model", ModelSourceConfig(revision="v1")) == tagged
    assert find("org/model", ModelSourceConfig(revision=main.name)) == main


def test_another_directory_can_be_told(cache: Path, tmp_path: Path) -> None:
    directory = download("org/model", ModelSourceConfig(download_dir=str(tmp_path / "models")), nothing)
    assert directory.is_relative_to(tmp_path / "models")
    assert not cache.exists()


def test_what_is_here_is_not_downloaded_again(hub: Hub) -> None:
    directory = download("org/model", ModelSourceConfig(), nothing)
    hub.asked.clear()
    assert download("org/model", ModelSourceConfig(), nothing) == directory
    assert [asked.path for asked in hub.asked] == ["/api/models/org/model/revision/main"]


def test_offline_nothing_is_asked(hub: Hub) -> None:
    directory = download("org/model", ModelSourceConfig(), nothing)
    hub.asked.clear()
    assert download("org/model", ModelSourceConfig(offline=True), nothing) == directory
    with pytest.raises(NotDownloadedError, match=r"model: org/shards is no directory, .* not in the cache .*--offline"):
        download("org/shards", ModelSourceConfig(offline=True), nothing)
    assert hub.asked == []


def test_the_librarys_own_variable_means_offline_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotDownloadedError):
        download("org/model", ModelSourceConfig(), nothing)
    assert hub.asked == []


def test_without_the_hub_what_was_downloaded_is_served_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = download("org/model", ModelSourceConfig(), nothing)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert download("org/model", ModelSourceConfig(), nothing) == directory
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("model: the hub, http://127.0.0.1:9, cannot be reached (")
    assert warning.endswith("): org/model is served as it was downloaded before")


def test_without_the_hub_and_a_download_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match=r"hub, http://127.0.0.1:9, cannot be reached \(.*not downloaded before$"):
        download("org/model", ModelSourceConfig(), nothing)


@pytest.mark.parametrize(
    ("model", "options", "error"),
    [
        ("org/nobody", {}, "model: org/nobody is no directory, and no model on the hub, {url}; one that is private"),
        ("org/a--b", {}, "model: org/a--b is no directory, and no name on the hub can be like that"),
        ("org/model", {"revision": "v9"}, "model: org/model has no revision v9 on the hub, {url}"),
        ("org/private", {}, "model: org/private is no directory, and no model on the hub, {url}; one that is private"),
        ("org/gated", {}, "model: org/gated is gated: ask for access at {url}/org/gated, and give a token that has it"),
        (
            "org/gated",
            {"hf_token": "wrong"},
            "model: the hub, {url}, does not take the token for org/gated (--hf",
        ),
        (
            "org/pickles",
            {},
            "nor model.safetensors.index.json; pytorch_model.bin can run code when it is read",
        ),
        ("org/dataset", {}, "model: org/dataset on the hub, {url}: it has neither config.json nor metadata.json"),
        ("org/incomplete", {}, "{url}: it names model-00002-of-00002.safetensors, which is not there"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(
    model: str,
    options: dict[str, str],
    error: str,
    hub: Hub,
) -> None:
    with pytest.raises(ValueError, match=r"^model: ") as raised:
        download(model, ModelSourceConfig(**options), nothing)  # type: ignore[arg-type]
    assert error.format(url=hub.url) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert is_mistake(raised.value)


@pytest.mark.parametrize("status", [HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE])
def test_a_hub_that_is_out_of_order_may_be_in_order_soon(status: HTTPStatus, hub: Hub) -> None:
    hub.refuses_with = status
    with pytest.raises(TransientError, match=r"the hub, .* cannot be reached \("):
        download("org/model", ModelSourceConfig(), nothing)


@pytest.mark.parametrize("model", ["org/gated", "org/private"])
def test_a_token_opens_what_is_closed_and_stays_with_the_hub(model: str, hub: Hub) -> None:
    directory = download(model, ModelSourceConfig(hf_token="right"), nothing)
    assert (directory / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert {asked.token for asked in hub.asked if asked.host == "127.0.0.1"} == {"right"}
    assert {asked.token for asked in hub.asked if asked.host == "localhost"} == {None}  # where large files are kept


def test_the_token_is_on_no_command_line_and_in_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RYZANSTEIN_HF_TOKEN", "right")
    seen: list[str] = []

    def look(_: Path) -> None:
        (child,) = [child for child in psutil.Process().children() if HUB_PROCESS[-1] in child.cmdline()]
        seen.extend([*child.cmdline(), *child.environ().values()])

    download("org/gated", ModelSourceConfig(hf_token="right"), look)
    assert any("hub_process" in word for word in seen)
    assert "right" not in seen


def parts(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name.endswith(PART_SUFFIX)]


def downloaded_size(cache: Path) -> int:
    """Return the bytes in unfinished files; one may be finished, and so renamed, while they are counted."""
    size = 0
    for part in parts(cache):
        with suppress(FileNotFoundError):
            size += part.stat().st_size
    return size


@contextmanager
def downloading_big() -> Iterator["subprocess.Popen[bytes]"]:
    """Start a download of org/big."""
    with subprocess.Popen(HUB_PROCESS, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b'{"task":"download","model":"org/big"}\n')
        process.stdin.flush()
        yield process


def interrupt(hub: Hub, cache: Path) -> int:
    """Kill a download of org/big when some of it is here; return how much."""
    hub.holds_after = 12 << 20
    with downloading_big() as process:
        wait_until(lambda: downloaded_size(cache) >= 10 << 20, 30)
        process.kill()
    hub.holds_after = None
    wait_until(lambda: hub.num_sending == 0, 30)
    (part,) = parts(cache)
    return part.stat().st_size


def test_an_interrupted_download_goes_on_where_it_was(hub: Hub, cache: Path) -> None:
    size = interrupt(hub, cache)
    assert 10 << 20 <= size < len(BIG)
    with pytest.raises(NotDownloadedError):
        find("org/big", ModelSourceConfig())
    hub.sent = 0
    directory = download("org/big", ModelSourceConfig(), nothing)
    assert (directory / "model.safetensors").read_bytes() == BIG
    assert hub.sent == len(BIG) - size
    assert parts(cache) == []


def test_a_server_that_knows_no_ranges_sends_all_again(hub: Hub, cache: Path) -> None:
    interrupt(hub, cache)
    hub.knows_ranges = False
    hub.sent = 0
    directory = download("org/big", ModelSourceConfig(), nothing)
    assert (directory / "model.safetensors").read_bytes() == BIG
    assert hub.sent == len(BIG)


def test_what_a_crash_left_damaged_is_not_taken_for_the_file(hub: Hub, cache: Path) -> None:
    interrupt(hub, cache)
    (part,) = parts(cache)
    with part.open("r+b") as damaged:
        damaged.write(bytes(1000))
    with pytest.raises(TransientError, match=r"model.safetensors: what came is not what the hub announced; start"):
        download("org/big", ModelSourceConfig(), nothing)
    directory = download("org/big", ModelSourceConfig(), nothing)
    assert (directory / "model.safetensors").read_bytes() == BIG


def test_two_that_download_at_once_share_the_work(hub: Hub) -> None:
    hub.bytes_per_second = 60e6
    with downloading_big() as one, downloading_big() as other:
        assert all(b'"done"' in process.stdout.read() for process in (one, other) if process.stdout is not None)
    assert (find("org/big", ModelSourceConfig()) / "model.safetensors").read_bytes() == BIG
    assert hub.sent == len(BIG) + len(SMALL["tokenizer.json"])


def test_who_waited_for_a_download_that_is_killed_goes_on_where_it_was(hub: Hub, cache: Path) -> None:
    hub.holds_after = 1 << 20  # so that the other has opened the file before something is in it
    with downloading_big() as one:
        assert one.stdout is not None
        assert b'"texts"' in one.stdout.readline()
        wait_until(lambda: parts(cache) != [], 30)
        with downloading_big() as other:
            wait_until(lambda: is_open_in(other, parts(cache)[0]), 30)
            hub.holds_after = 12 << 20
            wait_until(lambda: downloaded_size(cache) >= 10 << 20, 30)
            one.kill()
            hub.holds_after = None
            assert other.stdout is not None
            assert b'"done"' in other.stdout.read()
    assert (find("org/big", ModelSourceConfig()) / "model.safetensors").read_bytes() == BIG


def is_open_in(process: "subprocess.Popen[bytes]", path: Path) -> bool:
    return str(path) in {file.path for file in psutil.Process(process.pid).open_files()}


def test_the_process_ends_when_its_service_is_gone(hub: Hub) -> None:
    hub.holds_after = 1 << 20
    with downloading_big() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert b'"texts"' in process.stdout.readline()
        process.stdin.close()
        process.wait(60)


def test_what_does_not_fit_is_said_before_it_is_downloaded(hub: Hub) -> None:
    """The hub announces more than any disk holds."""
    listing = hub.listed_sizes
    listing["model.safetensors"] = 1 << 60
    with pytest.raises(ValueError, match=r"1048576\.0 TiB of org/big are to be downloaded, and .* are free"):
        download("org/big", ModelSourceConfig(), nothing)
    assert hub.sent < len(BIG)


def test_a_full_disk_is_one_line_and_leaves_no_file_that_seems_whole(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = ("bash", "-c", f"ulimit -f {12 << 10}; trap '' XFSZ; exec \"$@\"", "bash", *HUB_PROCESS)  # 12 MiB
    monkeypatch.setattr(hub_module, "HUB_PROCESS", limited)
    with pytest.raises(ValueError, match=os.strerror(errno.EFBIG)):
        download("org/big", ModelSourceConfig(), nothing)
    monkeypatch.undo()
    assert not [path for path in cache.rglob("blobs/*") if path.stat().st_size == 12 << 20 and path not in parts(cache)]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^model: .*file.*: Not a directory \(--download-dir, HF_HOME\)$"):
        download("org/model", ModelSourceConfig(download_dir=str(tmp_path / "file")), nothing)


def test_the_hub_says_what_would_be_downloaded(hub: Hub, cache: Path) -> None:
    assert describe("org/model", ModelSourceConfig()) == HubDescribed(
        hub.url, sum(map(len, MODEL.values())), len(MODEL)
    )
    assert describe("org/shards", ModelSourceConfig()).num_files >= 6
    assert not cache.exists()
    with pytest.raises(ValueError, match="no model on the hub"):
        describe("org/nobody", ModelSourceConfig())
