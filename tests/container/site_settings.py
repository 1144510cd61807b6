"""How packages are had on this machine, told to a build by secrets and mounts: nothing of it may come into an image."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

CA_SECRET = "/run/secrets/ca"


def build_options(folder: Path, marker: str) -> list[str]:
    """Return options of `buildah build` that give a build this machine's settings of pip.

    Args:
        folder: where the secrets are written; as secret as pip's own settings.
        marker: a comment in each secret, by which it can be found where it should not be.
    """
    settings = _pip_settings()
    options = []
    certificates = settings.get("cert") or os.environ.get("SSL_CERT_FILE")
    if certificates is not None:
        options += ["--secret", f"id=ca,src={_write(folder / 'ca', marker + Path(certificates).read_text())}"]
        settings["cert"] = CA_SECRET
    text = "\n".join([marker, "[global]", *(f"{name} = {value}" for name, value in settings.items())])
    options += ["--secret", f"id=pip,src={_write(folder / 'pip', text)}"]
    for path in sorted(set(_local_folders(settings))):
        options += ["--volume", f"{path}:{path}:ro"]
    return options


def _write(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text + "\n")
    return path


def _pip_settings() -> dict[str, str]:
    """Return pip's settings as its files and variables have them; variables come first, as with pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    items = [line.split("=", 1) for line in lines]
    items.sort(key=lambda item: item[0].startswith(":env:"))
    return {key.rpartition(".")[2]: value.strip("'\"") for key, value in items if not key.endswith("config-file")}


def _local_folders(settings: Mapping[str, str]) -> Iterator[Path]:
    """Yield the folders of this machine that pip takes packages from: an index's pages link to what is beside them."""
    for name in ("find-links", "index-url", "extra-index-url"):
        for place in settings.get(name, "").split():
            if place.startswith("file://"):
                path = Path(place.removeprefix("file://"))
                yield path if name == "find-links" else path.parent
            elif place.startswith("/"):
                yield Path(place)
