"""Work beside the event loop, in threads that nobody waits for at the end."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_daemon_thread(function: Callable[[], T]) -> T:
    """Return what `function` returns, or raise what it raises, while the loop goes on.

    Unlike the threads of the loop's executor, this one keeps neither the loop nor the process from ending. Cancelling
    the wait leaves the thread to itself.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(outcome: Callable[[], None]) -> None:
        if not future.done():
            outcome()

    def run() -> None:
        try:
            result = function()
        except Exception as error:
            failure = error
            tell(lambda: future.set_exception(failure))
        else:
            tell(lambda: future.set_result(result))

    def tell(outcome: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended before the function
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name=getattr(function, "__qualname__", "work"), daemon=True).start()
    return await future
