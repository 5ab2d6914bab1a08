"""Copy the weights and states that a rank owns into host memory, so that they can be written while they change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from bigtx.engine.optimizers import Optimizer


class HostCopy:
    """A copy of tensors in host memory, in one buffer that is used again by the next copy."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._device = 0

    def take(self, pieces: Sequence[Tensor], optimizer: Optimizer) -> Iterable[Tensor]:
        """Copy the pieces one after another.

        From a GPU they are copied on a stream of their own, next to the computation.

        Args:
            pieces: fp32 tensors of one dimension, the same sizes each time.
            optimizer: it is given the event after which the pieces may change.

        Returns:
            An iterable of one tensor, the buffer, which is ready once it is read. Only one thread may read it.
        """
        sizes = [piece.numel() for piece in pieces]
        is_on_gpu = any(piece.is_cuda for piece in pieces)
        if self._buffer is None:
            self._buffer = torch.empty(sum(sizes))
            if is_on_gpu:
                _pin(self._buffer)
                self._stream, self._device = torch.cuda.Stream(), torch.cuda.current_device()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for target, piece in zip(self._buffer.split(sizes), pieces, strict=True):
                target.copy_(piece, non_blocking=True)
        optimizer.copied = None if self._stream is None else self._stream.record_event()
        return _after(optimizer.copied, self._buffer, self._device)


def _after(event: torch.cuda.Event | None, buffer: Tensor, device: int) -> Iterator[Tensor]:
    if event is not None:
        # A thread begins on GPU 0, where a wait would make another CUDA context.
        torch.cuda.set_device(device)
        event.synchronize()
    yield buffer


def _pin(buffer: Tensor) -> None:
    """Lock a buffer's memory, so that a GPU writes into it without the CPU.

    `torch.empty(pin_memory=True)` would round its size up to a power of two. Where the system refuses, copies are only
    slower.
    """
    size, runtime = buffer.numel() * buffer.itemsize, torch.cuda.cudart()
    if size and runtime.cudaHostRegister(buffer.data_ptr(), size, 0) != runtime.cudaError.success:
        # CUDA keeps the error, and the next kernel would raise it as its own.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")
