"""Causal convolutions with three taps in time, for the fast autoencoder: how the taps meet frames.

    b clips   c channels   k the kernel's height and width
    a frame is b c H W, in channels-last memory
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frames import COUNTED, FastOptions, Frames, ThreeTaps, channels_last, fixed, stacked
from .vae import CausalState
from .winograd import WinogradTaps


class TemporalConv(nn.Module):
    """A causal convolution with 3 taps in time and stride 1. Its state are the two frames before."""

    def __init__(self, weight: Tensor, bias: Tensor | None, options: FastOptions):
        super().__init__()
        self.taps: ThreeTaps = BandedTaps(three_taps(weight, bias, options), weight, options)
        self.split = options.split

    def forward(self, frames: Frames, state: CausalState) -> Frames:
        if self.split:
            frames = [self.split.extend(frame) for frame in frames]
        out: Frames = []
        if self not in state:
            first, *frames = frames
            state[self] = [first, first]
            out.append(self.taps.still(first))
        if frames:
            frames = [*state[self], *frames]
            state[self] = frames[-2:]
            out += self.taps.moving(frames)
        return [self.split.trim(frame) for frame in out] if self.split else out


def three_taps(weight: Tensor, bias: Tensor | None, options: FastOptions) -> ThreeTaps:
    c, k = weight.shape[1], weight.shape[-1]
    if options.winograd_from is None or c < options.winograd_from:
        slow = convolves_clips_slowly(options.device, weight.dtype)
        return StackedTaps(weight, bias) if slow else DirectTaps(weight, bias)
    rows_from = math.inf if options.winograd_rows_from is None else options.winograd_rows_from
    # Rows of the small kernels of an upsampler would share too little.
    shared_rows = k == 3 and c >= rows_from * (2 if weight.dtype.itemsize == 2 else 1)
    return WinogradTaps(weight, bias, shared_rows, on_band=options.step)


def convolves_clips_slowly(device: str | None, dtype: torch.dtype) -> bool:
    """Whether torch takes a path of its own instead of the library's, in many times the time and memory.

    On a CPU that is a lone clip in fp32; on CUDA clips in 16 bits, for torch 2.9 with cuDNN before 9.15
    (pytorch/pytorch#166643).
    """
    if device == "cpu":
        return dtype == torch.float32
    spared = not torch.__version__.startswith("2.9.") or (torch.backends.cudnn.version() or 0) >= 91500
    return device == "cuda" and dtype.itemsize == 2 and not spared


class BandedTaps(nn.Module):
    """Bands of rows, one after the other. Exact: a band gets the neighbours' rows that its kernel reaches."""

    def __init__(self, taps: ThreeTaps, weight: Tensor, options: FastOptions):
        """The weight c_out c ... k k has a kernel 2 or 3 rows high."""
        super().__init__()
        self.taps, self.kernel, self.options = taps, weight.shape[-1], options
        self.most = COUNTED // max(weight.shape[:2])
        # Shared products come in small bands anyway; with kernels of 2 rows, those of a picture share none.
        small = isinstance(taps, WinogradTaps) and self.kernel == 3
        self.turn = None if small or options.turn is None else options.turn // weight.numel()

    def still(self, frame: Tensor) -> Tensor:
        return self.in_bands(lambda frames: [self.taps.still(*frames)], [frame])[0]

    def moving(self, frames: Frames) -> Frames:
        return self.in_bands(self.taps.moving, frames)

    def in_bands(self, compute: Callable[[Frames], Frames], frames: Frames) -> Frames:
        b, _, height, width = frames[0].shape
        limits = (self.options.band, self.turn, self.most // (b * len(frames)))
        rows = max(1, min(limit for limit in limits if limit is not None) // width)
        if rows >= height:
            return compute([frame[...] for frame in frames])
        # A kernel of 2 rows has one result more: before the first row, between rows, behind the last.
        results = height + 3 - self.kernel
        out: Frames = []
        for start in range(0, results, rows):
            stop = min(start + rows, results)
            first = max(0, start - 1)
            bands = [frame[..., first : stop + self.kernel - 2, :] for frame in frames]
            for index, band in enumerate(compute(bands)):
                if start == 0:
                    b, c, _, w = band.shape
                    out.append(band.new_empty(b, results, w, c).permute(0, 3, 1, 2))
                # At the edge of a band the padding took the place of rows that exist.
                out[index][..., start:stop, :] = band[..., start - first : stop - first, :]
            self.options.step()
        return out


class DirectTaps(nn.Module):
    """Frames stacked, one call."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = fixed(weight.contiguous(memory_format=torch.channels_last_3d))
        self.bias = None if bias is None else fixed(bias)

    def still(self, frame: Tensor) -> Tensor:
        return F.conv2d(frame, channels_last(self.weight.sum(2)), self.bias, padding=1)

    def moving(self, frames: Frames) -> Frames:
        return list(F.conv3d(stacked(frames), self.weight, self.bias, padding=(0, 1, 1)).unbind(2))


class StackedTaps(nn.Module):
    """As many frames as there are taps, one above the other as channels, for every result."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 1):
        super().__init__()
        self.taps, self.stride, self.padding = weight.shape[2], stride, padding
        self.weight = fixed(channels_last(weight.transpose(1, 2).flatten(1, 2)))
        self.bias = None if bias is None else fixed(bias)

    def still(self, frame: Tensor) -> Tensor:
        return self.conv(frame, channels_last(self.weight.unflatten(1, (self.taps, -1)).sum(1)))

    def moving(self, frames: Frames) -> Frames:
        starts = range(len(frames) - self.taps + 1)
        return [self.conv(torch.cat(frames[start : start + self.taps], dim=1), self.weight) for start in starts]

    def conv(self, frame: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(frame, weight, self.bias, self.stride, self.padding)
