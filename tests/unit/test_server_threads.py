import asyncio
import threading
import time

import pytest

from server.threads import in_daemon_thread


def test_the_loop_goes_on_while_a_function_runs() -> None:
    async def both() -> tuple[str, bool]:
        release = threading.Event()
        waiting = asyncio.ensure_future(in_daemon_thread(lambda: release.wait(10)))
        await asyncio.sleep(0.01)
        release.set()
        return "went on", await waiting

    assert asyncio.run(both()) == ("went on", True)


def test_what_a_function_raises_is_raised() -> None:
    def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(in_daemon_thread(fail))


def test_the_loop_ends_without_the_function_and_the_function_after_the_loop() -> None:
    release, before = threading.Event(), set(threading.enumerate())

    async def leave() -> None:
        waiting = asyncio.ensure_future(in_daemon_thread(lambda: release.wait(30)))
        await asyncio.sleep(0.01)
        waiting.cancel()

    begin = time.monotonic()
    asyncio.run(leave())
    assert time.monotonic() - begin < 5
    (left,) = set(threading.enumerate()) - before
    assert left.daemon
    release.set()
    left.join(10)
    assert not left.is_alive()
