"""Copies weights to where a model has them, in chunks: those that go to a CUDA device by way of pinned memory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 16 << 20
NUM_BUFFERS = 3  # one that is being filled while others are on their way to the device


class Stager:
    """Copies tensors chunk by chunk.

    To a CUDA device a chunk is read into a pinned buffer, from which the device fetches it while the next is read.

    Args:
        device: where the tensors that are written to lie.
        advance: is told of the bytes that were filled, after each chunk; what it raises ends the copying.
    """

    def __init__(self, device: torch.device, advance: Callable[[int], None] = lambda _: None) -> None:
        self._advance = advance
        self._ring = _PinnedRing(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, values: Tensor) -> None:
        """Copy `values` into `target`, which is of the same shape, and may be of another type.

        Raises:
            ValueError: if `target` has no memory.
        """
        if target.is_meta:
            raise ValueError("the model lies on the device meta, where nothing can be loaded; build it on cpu or cuda")
        for target_rows, rows in chunks(target, values):
            if self._ring is None:
                target_rows.copy_(rows)
            else:  # pragma: cuda
                self._ring.send(target_rows, rows)
            self._advance(target_rows.nbytes)

    def clear(self, target: Tensor) -> None:
        """Fill with zeros."""
        if target.numel():
            target.zero_()
            self._advance(target.nbytes)

    def finish(self) -> None:
        """Wait until all has arrived."""
        if self._ring is not None:  # pragma: cuda
            self._ring.wait()


class _PinnedRing:  # pragma: cuda
    """Pinned buffers that are used in turn."""

    def __init__(self, device: torch.device) -> None:
        self._buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_BUFFERS)]
        self._fetched = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._next = 0

    def send(self, target: Tensor, rows: Tensor) -> None:
        """Read `rows` into the buffer that has been fetched for longest, and let the device fetch it."""
        fetched = self._fetched[self._next]
        fetched.synchronize()
        if rows.nbytes > CHUNK_BYTES:  # a single row of that size: no buffer holds it
            target.copy_(rows)
            return
        buffer = self._buffers[self._next][: rows.nbytes].view(rows.dtype).view(rows.shape)
        buffer.copy_(rows)
        with torch.cuda.stream(self._stream):
            target.copy_(buffer, non_blocking=True)
            fetched.record(self._stream)
        self._next = (self._next + 1) % NUM_BUFFERS

    def wait(self) -> None:
        """Wait for the last."""
        self._stream.synchronize()


def chunks(target: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of rows, at most `CHUNK_BYTES` of `values` where a row is not larger than that."""
    if values.ndim == 0 or values.nbytes <= CHUNK_BYTES:
        yield target, values
        return
    rows = max(1, CHUNK_BYTES // (values.nbytes // values.shape[0]))
    for start in range(0, len(values), rows):
        yield target[start : start + rows], values[start : start + rows]
