"""Tensors on their way to the device that computes and back, without one waiting for the other.

Only CUDA copies while both go on, and only from and to pinned memory; elsewhere these are plain copies, on a CPU none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, which is not waited for."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # torch keeps the pinned memory, wherever it came from, until the device has read it.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def download(tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """Begin to copy tensors of one device to the host.

    Returns a function that waits until they are there, in whatever thread, and returns them.
    """
    if not tensors[0].is_cuda:
        here = [tensor.cpu() for tensor in tensors]
        return lambda: here
    pinned = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for there, tensor in zip(pinned, tensors, strict=True):
        there.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # sleeps rather than spins
    copied.record(torch.cuda.current_stream(tensors[0].device))

    def arrived() -> Sequence[Tensor]:
        copied.synchronize()
        return pinned

    return arrived
