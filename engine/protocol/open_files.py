"""The limit of open files: each connection takes one, and the default of many shells is soon reached."""

import resource

FEWEST_OPEN_FILES = 64  # some 30 are open before the first connection
ENOUGH_OPEN_FILES = 65536


def raise_open_files_limit() -> None:
    """Let this process, and those that it starts, have as many files open as the hard limit allows, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_open_files() -> None:
    """Raise ValueError if so few files may be open that a service cannot start."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEWEST_OPEN_FILES:
        raise ValueError(f"only {soft} files may be open (ulimit -n); serving takes at least {FEWEST_OPEN_FILES}")
