"""The image, built once for all tests of this folder, which are slow and of `make test-container`."""

import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.container.containers import Containers
from tests.container.site_settings import build_options
from tests.container.tools import why_not

ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 1800.0
IMAGE = "localhost/ryzanstein:cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.container)
            item.add_marker(pytest.mark.timeout(3 * BUILD_SECONDS))


@pytest.fixture(scope="session")
def containers() -> Iterator[Containers]:
    if reason := why_not():
        pytest.skip(reason)
    with Containers(Path(tempfile.mkdtemp(prefix="ryzanstein-containers-"))) as containers:
        yield containers


@pytest.fixture(scope="session")
def base(containers: Containers) -> str:
    """What stands in for the Dockerfile's base: the same Debian, made from its packages."""
    name = "docker.io/library/debian:12-slim"
    assert f"\nARG BASE={name}\n" in (ROOT / "Dockerfile").read_text()
    archive = containers.folder / "base.tar"
    without = [f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("doc", "man", "locale")]
    containers.outside("mmdebstrap", "--variant=minbase", *without, "bookworm", str(archive), seconds=BUILD_SECONDS)
    containers.inside("podman", "import", "--quiet", str(archive), name)
    archive.unlink()
    return name


@pytest.fixture(scope="session")
def secret() -> str:
    """A text that all secrets of the build hold."""
    return f"# {uuid4()}\n"


@pytest.fixture(scope="session")
def image_options(containers: Containers, secret: str) -> str:
    """What `make image` needs for a build without a daemon, with this machine's settings of pip."""
    plain = ["--isolation", "chroot", "--network", "host", "--pull-never", "--format", "docker", "--layers"]
    folder = containers.folder / "secrets"
    folder.mkdir(mode=0o700)
    return shlex.join([*plain, *build_options(folder, secret)])


@pytest.fixture(scope="session")
def image(containers: Containers, base: str, image_options: str) -> str:
    """The image of the target `cpu`, as `make image` builds it."""
    assert base
    options = ["BUILDER=buildah", f"IMAGE_OPTIONS={image_options}"]
    containers.outside("make", "image", *options, cwd=ROOT, seconds=BUILD_SECONDS)
    return IMAGE
