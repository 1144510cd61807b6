"""The processes of a group's other ranks, as far as this one can see them."""

import os
import select
from pathlib import Path

import msgspec


def identity() -> bytes:
    """Return what another rank needs to watch this process."""
    return msgspec.json.encode([machine(), os.getpid()])


class Peers:
    """Knows which of the ranks on this machine have ended."""

    def __init__(self) -> None:
        self._machine = machine()
        self._descriptors: dict[int, int] = {}
        self._ended: set[int] = set()

    def meet(self, rank: int, identity: bytes) -> None:
        """Take hold of a rank's process, if it runs where this one can see it."""
        machine, pid = msgspec.json.decode(identity, type=tuple[str, int])
        if machine != self._machine:
            return
        try:
            self._descriptors[rank] = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended.add(rank)
        except OSError:  # not permitted here: then only time tells
            return

    def ended(self) -> set[int]:
        """Return the ranks whose processes have ended."""
        return self._ended | self._poll(self._descriptors, 0)

    def has_ended(self, rank: int, seconds: float) -> bool:
        """Whether a rank's process has ended, or does within so many seconds."""
        watched = {rank: self._descriptors[rank]} if rank in self._descriptors else {}
        return rank in self._ended or bool(watched and self._poll(watched, seconds))

    def close(self) -> None:
        """Let go of all."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _poll(self, descriptors: dict[int, int], seconds: float) -> set[int]:
        poller = select.poll()
        for descriptor in descriptors.values():
            poller.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poller.poll(seconds * 1000)}
        return {rank for rank, descriptor in descriptors.items() if descriptor in ready}


def machine() -> str:
    """Return what tells processes apart that this one can see from those that it cannot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
