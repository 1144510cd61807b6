"""Clients that stream all at once, and a record of what each got and when."""

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

PROGRESS_SECONDS = 120.0  # generous: only a hang should exceed it


@dataclass
class Stream:
    """What one client got."""

    body: dict[str, Any]
    status: int = 0
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)  # seconds since the calendar's epoch, one for each token
    text: str = ""
    finish_reasons: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    is_done: bool = False  # `[DONE]` came, and only once

    @property
    def answer(self) -> tuple[list[int], str, list[str]]:
        """What must not depend on what happened to the engine."""
        return self.token_ids, self.text, self.finish_reasons

    @property
    def has_failed(self) -> bool:
        """Whether it did not come to its end as it should."""
        return self.status != 200 or bool(self.errors) or len(self.finish_reasons) != 1 or not self.is_done

    def first_after(self, moment: float) -> float | None:
        """Return when the first token after a moment came."""
        return next((arrival for arrival in self.arrivals if arrival > moment), None)

    def take(self, line: str) -> None:
        """Take a line of the stream."""
        if not line.startswith("data: "):
            return
        if line == "data: [DONE]":
            assert not self.is_done, "the stream ended twice"
            self.is_done = True
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            self.errors.append(event["error"]["message"])
            return
        for choice in event["choices"]:
            new = choice.get("token_ids") or []
            self.token_ids += new
            self.arrivals += [time.time()] * len(new)
            self.text += choice["text"]
            self.finish_reasons += [choice["finish_reason"]] if choice["finish_reason"] else []


class Crowd:
    """`with Crowd(url, bodies) as crowd:` streams each body's completion at the same time, in a thread of its own."""

    def __init__(self, url: str, bodies: Sequence[dict[str, Any]]) -> None:
        self.streams = [Stream({**body, "stream": True, "return_token_ids": True}) for body in bodies]
        self._url = url
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()

    @property
    def num_tokens(self) -> int:
        """How many tokens all have got together."""
        return sum(len(stream.token_ids) for stream in self.streams)

    @property
    def is_over(self) -> bool:
        """Whether every stream has ended."""
        return not self._thread.is_alive()

    def wait_for_tokens(self, number: int) -> bool:
        """Wait until all together have got so many tokens; return whether they did before all ended.

        Raises:
            TimeoutError: when nothing came for long.
        """
        last, deadline = -1, 0.0
        while (now := self.num_tokens) < number and not self.is_over:
            if now != last:
                last, deadline = now, time.monotonic() + PROGRESS_SECONDS
            if time.monotonic() > deadline:
                raise TimeoutError(f"no token came for {PROGRESS_SECONDS} s; {now} of {number} are there")
            time.sleep(0.002)
        return now >= number

    def finish(self) -> list[Stream]:
        """Wait until every stream has ended, and return them."""
        self.wait_for_tokens(2**60)
        return self.streams

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=len(self.streams))
        timeout = httpx.Timeout(30, read=PROGRESS_SECONDS)
        async with httpx.AsyncClient(base_url=self._url, timeout=timeout, limits=limits) as client:
            await asyncio.gather(*(self._stream(client, stream) for stream in self.streams))

    async def _stream(self, client: httpx.AsyncClient, stream: Stream) -> None:
        try:
            async with client.stream("POST", "/v1/completions", json=stream.body) as response:
                stream.status = response.status_code
                if response.status_code != 200:
                    stream.errors.append((await response.aread()).decode())
                    return
                async for line in response.aiter_lines():
                    stream.take(line)
        except httpx.HTTPError as error:
            stream.errors.append(f"{type(error).__name__}: {error}")
