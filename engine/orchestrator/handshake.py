"""HELLO, READY, START, STARTED: a group begins only when all its ranks have said the same."""

from dataclasses import dataclass
from typing import Self

from engine.protocol.config import EngineConfig, RankSpec, config_hash
from engine.protocol.messages import Hello, RankInfo, Ready, Start, Started
from engine.protocol.model_config import ModelConfig


class HandshakeError(RuntimeError):
    """The ranks do not agree: something is wrong with the installation, not with what the user asked for."""


@dataclass(frozen=True)
class Agreement:
    """What one group began with, and each that follows it must: what was asked of one is to be done by the next."""

    num_kv_blocks: int
    max_model_len: int
    fingerprint: str = ""  # of the weights; empty where another orchestrator knew

    @classmethod
    def of(cls, spec: RankSpec) -> Self | None:
        """Return what a launch was told of the groups before it, if there were any."""
        if spec.num_kv_blocks is None or spec.max_model_len is None:
            return None
        return cls(spec.num_kv_blocks, spec.max_model_len)


class Handshake:
    """Collects what the ranks say. Fed with messages in any order; knows no sockets.

    Args:
        engine: the options.
        config: the model.
        epoch: of the group.
        before: what an earlier group has agreed on, if there was one.
    """

    def __init__(self, engine: EngineConfig, config: ModelConfig, epoch: int, before: Agreement | None = None) -> None:
        self._engine = engine
        self._config = config
        self._epoch = epoch
        self._before = before
        self._hellos: dict[int, Hello] = {}
        self._readies: dict[int, Ready] = {}
        self._started: set[int] = set()

    def hear_hello(self, hello: Hello) -> None:
        """Take a rank's first word.

        Raises:
            HandshakeError: if it was started with another configuration.
        """
        if hello.config_hash != config_hash(self._engine):
            raise HandshakeError(f"rank {hello.rank} on {hello.host} was started with another configuration")
        self._hellos[hello.rank] = hello

    def hear_ready(self, ready: Ready) -> None:
        """Take a rank's word that it has loaded.

        Raises:
            HandshakeError: if it holds other weights than the ranks heard before, or than an earlier group.
        """
        for other in self._readies.values():
            if other.fingerprint != ready.fingerprint:
                raise HandshakeError(
                    f"ranks {other.rank} and {ready.rank} loaded different weights: {self._engine.model}"
                )
        if self._before is not None and self._before.fingerprint not in ("", ready.fingerprint):
            raise HandshakeError(f"the weights are others than those that the service began with: {self._engine.model}")
        self._readies[ready.rank] = ready

    def hear_started(self, started: Started) -> None:
        """Take a rank's word that it takes steps."""
        self._started.add(started.rank)

    @property
    def all_said_hello(self) -> bool:
        """Whether every rank is known."""
        return len(self._hellos) == self._engine.tensor_parallel_size

    @property
    def all_loaded(self) -> bool:
        """Whether every rank has loaded."""
        return self.all_said_hello and len(self._readies) == self._engine.tensor_parallel_size

    @property
    def all_started(self) -> bool:
        """Whether every rank takes steps."""
        return len(self._started) == self._engine.tensor_parallel_size

    @property
    def ranks(self) -> list[RankInfo]:
        """Where the ranks heard of run, in order of rank."""
        hellos = (self._hellos[rank] for rank in sorted(self._hellos))
        return [RankInfo(hello.rank, hello.pid, hello.host, hello.device, hello.threads) for hello in hellos]

    @property
    def kernels(self) -> str:
        """What the ranks compute with, as they said."""
        return ", ".join(sorted({ready.kernels for ready in self._readies.values()}))

    def memory(self, num_kv_blocks: int) -> dict[str, int]:
        """Return bytes by kind, summed over the ranks, with a cache of `num_kv_blocks` on each."""
        total: dict[str, int] = {}
        for ready in self._readies.values():
            for kind, size in {**ready.memory, "kv_cache": num_kv_blocks * ready.kv_block_bytes}.items():
                total[kind] = total.get(kind, 0) + size
        return total

    @property
    def agreement(self) -> Agreement | None:
        """What holds for the groups after this one, once all ranks take steps."""
        if not self.all_started:
            return None
        start = self.start()
        return Agreement(start.num_kv_blocks, start.max_model_len, next(iter(self._readies.values())).fingerprint)

    def start(self) -> Start:
        """Return what all ranks begin with: the smallest rank's number of KV blocks holds for all.

        Behind an earlier group it is what that began with.

        Raises:
            ValueError: naming the options, if the KV cache cannot hold the context that was asked for.
        """
        if self._before is not None:
            return Start(self._epoch, self._before.num_kv_blocks, self._before.max_model_len)
        num_kv_blocks = min(ready.num_kv_blocks for ready in self._readies.values())
        capacity = num_kv_blocks * self._engine.block_size
        longest = self._config.longest_context
        asked = self._engine.max_model_len
        if asked is not None and asked > capacity:
            raise ValueError(
                f"--max-model-len {asked} does not fit: the KV cache holds {capacity} tokens "
                f"({num_kv_blocks} blocks of {self._engine.block_size}); lower it, or raise --num-kv-blocks or "
                "--kv-cache-memory"
            )
        return Start(epoch=self._epoch, num_kv_blocks=num_kv_blocks, max_model_len=asked or min(longest, capacity))
