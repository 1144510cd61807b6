"""The engine's process that starts before it is known what to run: it ends with whatever started it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from engine.orchestrator.launcher import ONE_THREAD
from server.__main__ import will_serve
from server.early_engine import EarlyEngine
from tests.leftovers import Leftovers, still_running
from tests.service_process import wait_until

MAIN = (sys.executable, "-P", "-m", "server")
SPIES = """
import subprocess, sys
started = []
subprocess.Popen = lambda command, *_, **__: started.append(command)
sys.argv = ["ryzanstein", *sys.argv[1:]]
from engine.orchestrator.launcher import ONE_THREAD
from server.__main__ import main
try:
    main()
finally:
    print(started, file=sys.stderr)
"""


ORDER_AND_HANG_UP = """
import os, socket, subprocess, sys
from engine.worker.parent import adopt_orphans
adopt_orphans()
link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
forks = subprocess.Popen([sys.executable, "-P", "-m", "engine.worker"], stdin=theirs, stderr=subprocess.DEVNULL)
with socket.create_server(("127.0.0.1", 0)) as store:
    socket.send_fds(link, [b"1 3 /nowhere/spec.json"], [store.fileno()])
link.close()
theirs.close()
codes = [os.waitid(os.P_ALL, 0, os.WEXITED).si_status for _ in range(4)]
print(*(code != 0 for code in codes), flush=True)
os.waitpid(-1, 0)
"""


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    with Leftovers() as leftovers:
        yield leftovers


def processes_of(leftovers: Leftovers) -> list[psutil.Process]:
    """Return what runs with the variables of `leftovers`, whoever is its parent."""
    folder, found = str(leftovers.folder), []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == folder:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def ranks_below(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """Return what runs as a rank below a service."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if "engine.worker" in child.cmdline()]


def test_a_mistake_in_the_options_leaves_no_process(leftovers: Leftovers) -> None:
    environment = {**os.environ, **leftovers.environment}
    done = subprocess.run([*MAIN, "serve", "--nonsense"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr == "ryzanstein: error: unrecognized arguments: --nonsense (see ryzanstein serve --help)\n"
    assert processes_of(leftovers) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_engine_is_told_anything_leaves_no_process(
    number: signal.Signals, leftovers: Leftovers
) -> None:
    environment = {**os.environ, **leftovers.environment}
    with subprocess.Popen([*MAIN, "serve", "--port", "0"], env=environment, stderr=subprocess.PIPE) as process:
        wait_until(lambda: len(processes_of(leftovers)) > 1, 30)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == (-number if number == signal.SIGKILL else 0)
    assert errors == b""
    wait_until(lambda: processes_of(leftovers) == [], 10)


def test_an_engine_that_was_told_nothing_is_stopped_with_its_rank() -> None:
    engine = EarlyEngine()
    process = psutil.Process(engine._process.pid)
    wait_until(lambda: len(process.children()) == 1, 30)
    processes = [process, *process.children()]
    engine.stop()
    assert still_running(processes, 10) == []


def test_an_early_rank_dies_with_a_killed_orchestrator() -> None:
    engine = EarlyEngine()
    process = psutil.Process(engine._process.pid)
    wait_until(lambda: len(process.children()) == 1, 30)
    [rank] = process.children()
    process.kill()
    assert still_running([rank], 10) == []
    engine.stop()


def test_what_ranks_are_forked_from_may_end_before_it_is_told_anything(leftovers: Leftovers) -> None:
    environment = {**os.environ, **leftovers.environment}
    with subprocess.Popen([*MAIN, "serve", "--port", "0"], env=environment, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        wait_until(lambda: len(ranks_below(process)) == 1, 30)
        ranks_below(process)[0].kill()
        first_line = process.stderr.readline()  # pytest's own time limit holds
        process.terminate()
        process.communicate(timeout=30)
    assert first_line == b"ryzanstein is ready\n"
    assert process.returncode == 0
    wait_until(lambda: processes_of(leftovers) == [], 10)


@pytest.mark.parametrize(
    ("arguments", "serves"),
    [
        (["serve"], True),
        (["serve", "MODEL", "-tp", "2"], True),
        (["serve", "--help"], False),
        (["serve", "MODEL", "-h"], False),
        (["doctor"], False),
        (["checkpoint", "inspect", "serve"], False),
        (["--version"], False),
        ([], False),
    ],
)
def test_only_serving_starts_an_engine_early(arguments: list[str], serves: bool) -> None:
    assert will_serve(arguments) == serves


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["checkpoint", "--help"], ["--version"]])
def test_help_starts_nothing(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", SPIES, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_what_starts_first_imports_nothing_that_takes_long() -> None:
    program = (
        "import sys, server.__main__; print(*({'msgspec', 'zmq', 'torch', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_what_ranks_are_forked_from_has_one_thread() -> None:
    program = "import os, engine.worker.rank; print(len(os.listdir('/proc/self/task')))"
    environment = {**os.environ, **ONE_THREAD}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "1\n"


def test_ranks_whose_ids_cannot_be_told_end_themselves() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORDER_AND_HANG_UP], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "True True True True\n"  # the process that forks, and what it has forked
    assert "ChildProcessError" in done.stderr  # there is no other
