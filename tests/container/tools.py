"""What the tests of the image need: programs of Debian's packages, and root.

python -m tests.container.tools          # installs what is missing, where that may be done
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Each program and its package. podman looks for the last two in folders of its own.
PROGRAMS = {
    "buildah": "buildah",
    "catatonit": "catatonit",
    "ip": "iproute2",
    "iptables": "iptables",
    "make": "make",
    "mmdebstrap": "mmdebstrap",
    "nsenter": "util-linux",
    "podman": "podman",
    "runc": "runc",
    "unshare": "util-linux",
    "aardvark-dns": "aardvark-dns",
    "netavark": "netavark",
}
SEARCH_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/lib/podman:/usr/libexec/podman"


def missing_packages() -> list[str]:
    """Return the packages whose programs are not here."""
    return sorted({name for program, name in PROGRAMS.items() if shutil.which(program, path=SEARCH_PATH) is None})


def why_not() -> str | None:
    """Return why no image can be built and run here, or None."""
    if os.geteuid() != 0:
        return "only root can build and run images without a daemon here"
    if missing := missing_packages():
        return f"these packages are not installed: {' '.join(missing)}"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlay file system"
    return None


def install() -> None:
    """Install the packages that are missing.

    Raises:
        OSError: if there is no apt-get.
        subprocess.CalledProcessError: if it fails.
    """
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    lock = ["-o", "DPkg::Lock::Timeout=300"]
    for command in (
        ["update", "--quiet=2"],
        ["install", "--yes", "--quiet=2", "--no-install-recommends", *missing_packages()],
    ):
        subprocess.run(["apt-get", *lock, *command], env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    if os.geteuid() == 0 and missing_packages():
        try:
            install()
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"what the tests of the image need cannot be installed: {error}")
