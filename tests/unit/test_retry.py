"""Reads that fail for a moment are tried again, on storage that really fails: a library before libc's makes it so."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from torch import nn

from engine.checkpoint.retry import TRANSIENT_ERRORS, WAITS
from tests.sharded_checkpoints import write

CHILD_SECONDS = 120.0
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int left = -1;

static int fails(const char *call, const char *path) {
    const char *wanted = getenv("SHIM_CALL"), *part = getenv("SHIM_PATH");
    if (!wanted || strcmp(wanted, call) || !strstr(path, part)) return 0;
    if (left < 0) left = atoi(getenv("SHIM_TIMES"));
    if (left == 0) return 0;
    left--;
    errno = atoi(getenv("SHIM_ERRNO"));
    return 1;
}

static int read_fails(int descriptor) {
    char link[64], path[4096] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    return readlink(link, path, sizeof path - 1) > 0 && fails("read", path);
}

#define READ(name) ssize_t name(int descriptor, const struct iovec *vector, int count, off64_t offset, int flags) { \\
    if (read_fails(descriptor)) return -1; \\
    ssize_t (*real)(int, const struct iovec *, int, off64_t, int) = dlsym(RTLD_NEXT, #name); \\
    return real(descriptor, vector, count, offset, flags); }
READ(preadv2)
READ(preadv64v2)

#define OPEN(name) int name(const char *path, int flags, ...) { \\
    va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list); \\
    if (fails("open", path)) return -1; \\
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name); \\
    return real(path, flags, mode); }
OPEN(open)
OPEN(open64)
"""
LOAD = """
import logging, sys, torch
from engine.checkpoint.loader import ModelLoadConfig
from engine.checkpoint.model_distributor import ModelDistributor
from engine.communication.handler import CommunicationHandler

logging.basicConfig(format="%(message)s")
group, model = CommunicationHandler(torch.device("cpu")), torch.nn.Linear(300, 200)
config = ModelLoadConfig(
    checkpoint_dir="", tp_size=1, use_memory_map="map" in sys.argv, verify_checksums="verify" in sys.argv
)
try:
    ModelDistributor(group, config).load_model(model, sys.argv[1])
except ValueError as error:
    print("ValueError:", error)
else:
    print(bool((model.weight == 3).all()))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make storage fail with")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"], cwd=folder, check=True)
    return folder / "shim.so"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(_: object) -> nn.Module:
        model = nn.Linear(300, 200)
        nn.init.constant_(model.weight, 3)
        return model

    return write(make, tmp_path_factory.mktemp("failing") / "checkpoint", 1)


def load(shim: Path, checkpoint: Path, call: str, times: int, code: int, *, path: str, mode: str) -> tuple[str, str]:
    """Load in a process whose reads fail; return its last line, and what it logged."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), str(checkpoint), mode],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "LD_PRELOAD": str(shim),
            "SHIM_CALL": call,
            "SHIM_TIMES": str(times),
            "SHIM_ERRNO": str(code),
            "SHIM_PATH": path,
        },
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("call", "code", "path", "mode"),
    [
        ("read", errno.EIO, "weights_rank0", "read"),
        ("read", errno.ESTALE, "weights_rank0", "map"),  # the header
        ("read", errno.EIO, "weights_rank0", "verify"),
        ("open", errno.ETIMEDOUT, "weights_rank0", "map"),
        ("open", errno.ESTALE, "metadata.json", "map"),
    ],
)
def test_a_read_that_fails_twice_is_tried_again_and_succeeds(
    shim: Path, checkpoint: Path, call: str, code: int, path: str, mode: str
) -> None:
    said, logged = load(shim, checkpoint, call, 2, code, path=path, mode=mode)
    assert said == "True"
    assert logged.count("trying again in") == 2
    assert os.strerror(code) in logged
    assert f"{checkpoint}/" in logged


@pytest.mark.parametrize(("call", "mode"), [("open", "map"), ("read", "read"), ("read", "verify")])
def test_a_read_that_goes_on_failing_is_one_line_that_names_the_file(
    shim: Path, checkpoint: Path, call: str, mode: str
) -> None:
    said, logged = load(shim, checkpoint, call, 99, errno.EIO, path="weights_rank0", mode=mode)
    path = checkpoint / "weights_rank0.safetensors"
    assert said == f"ValueError: {path}: cannot be read: Input/output error, 4 times"
    assert logged.count("trying again in") == len(WAITS)


def test_an_error_that_will_not_pass_is_not_waited_for(shim: Path, checkpoint: Path) -> None:
    said, logged = load(shim, checkpoint, "open", 99, errno.EACCES, path="weights_rank0", mode="map")
    assert said == f"ValueError: {checkpoint / 'weights_rank0.safetensors'}: cannot be read: Permission denied"
    assert logged == ""
    assert errno.EACCES not in TRANSIENT_ERRORS
