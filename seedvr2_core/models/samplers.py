"""The fast autoencoder's samplers.

An upsampler (1x1x1 convolution, channels to space, causal convolution) is one linear map, whose output phases are small
kernels on the coarse grid. Its state is coarse as well.

    b clips   c channels   h w the coarse grid
    a frame is b c h w, in channels-last memory
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .causal_taps import BandedTaps, StackedTaps, TemporalConv
from .frames import FastOptions, Frames, Taps, channels_last, fixed
from .row_split import RowSplit
from .vae import CausalState, Downsampler, Upsampler


class SpatialDown(nn.Module):
    """Halves height and width."""

    def __init__(self, sampler: Downsampler, options: FastOptions):
        super().__init__()
        self.weight, self.bias = fixed(channels_last(sampler.conv.weight.squeeze(2))), fixed(sampler.conv.bias)
        self.split = options.split

    def forward(self, frames: Frames, state: CausalState) -> Frames:
        return [F.conv2d(pad_end(frame, self.split), self.weight, self.bias, stride=2) for frame in frames]


def pad_end(frame: Tensor, split: RowSplit | None) -> Tensor:
    """One more row at the bottom and column at the right, of zeros."""
    return F.pad(frame, (0, 1, 0, 1)) if split is None else F.pad(split.extend_below(frame), (0, 1))


class TemporalDown(nn.Module):
    """Halves time, height and width. Its state are the frames that the next result needs and that are here already."""

    def __init__(self, sampler: Downsampler, options: FastOptions):
        super().__init__()
        self.taps = StackedTaps(sampler.conv.weight, sampler.conv.bias, stride=2, padding=0)
        self.split = options.split

    def forward(self, frames: Frames, state: CausalState) -> Frames:
        padded = [pad_end(frame, self.split) for frame in frames]
        out: Frames = []
        if self not in state:
            out.append(self.taps.still(padded[0]))
        held = [*state.get(self, []), *padded]
        while len(held) >= 3:
            out += self.taps.moving([frame[...] for frame in held[:3]])
            held = held[2:]
        state[self] = held
        return out


class SpatialUp(nn.Module):
    """Doubles height and width."""

    def __init__(self, sampler: Upsampler, options: FastOptions):
        super().__init__()
        weight, bias, self.phases = merge(sampler, options, [[(0, 0), (1, 0), (2, 0)]])
        self.conv = TemporalConv(weight, bias, options)

    def forward(self, frames: Frames, state: CausalState) -> Frames:
        return [fine for coarse in self.conv(frames, state) for fine in self.phases(coarse)]


class TemporalUp(nn.Module):
    """Doubles time, height and width. Its state is the frame before, and what to do with the next."""

    def __init__(self, sampler: Upsampler, options: FastOptions):
        super().__init__()
        # The second half of what the first frame becomes is dropped, and the first half stands in for all before it.
        self.first = CoarseUp(sampler, options, [[(0, 0), (0, 0), (0, 0)]])
        self.second = CoarseUp(sampler, options, [[(0, 0), (0, 0), (1, 0)], [(0, 0), (1, 0), (1, 1)]])
        self.regular = CoarseUp(sampler, options, [[(0, 0), (0, 1), (1, 0)], [(0, 1), (1, 0), (1, 1)]])

    def forward(self, frames: Frames, state: CausalState) -> Frames:
        out: Frames = []
        for frame in frames:
            past, up = state.get(self, ([], self.first))
            out += up([*past, frame])
            state[self] = [frame], self.second if up is self.first else self.regular
        return out


class CoarseUp(nn.Module):
    """An upsampler that sees a fixed number of coarse frames."""

    def __init__(self, sampler: Upsampler, options: FastOptions, taps: Sequence[Sequence[tuple[int, int]]]):
        super().__init__()
        weight, bias, self.phases = merge(sampler, options, taps)
        self.taps: Taps = BandedTaps(StackedTaps(weight, bias), weight, options)
        self.split = options.split

    def forward(self, coarse: Frames) -> Frames:
        if self.split is None:
            return self.phases(*self.taps.moving(coarse))
        (result,) = self.taps.moving([self.split.extend(frame) for frame in coarse])
        return self.phases(self.split.trim(result))


def merge(
    sampler: Upsampler, options: FastOptions, taps: Sequence[Sequence[tuple[int, int]]]
) -> tuple[Tensor, Tensor, Phases]:
    """An upsampler as one convolution on the coarse grid: its weight (s p q c_out) c_in cells 2 2, its bias (s p q
    c_out), and what makes fine frames of its results.

    An output phase s p q (time, row, column) sees 2 x 2 coarse positions, its own and a neighbour on the side of the
    phase. So all phases together are one 2 x 2 convolution with padding 1, each to be read at its own offset.

    Args:
        taps: of every output phase in time and for every tap, which coarse frame and which half of it.
    """
    dtype = sampler.conv.weight.dtype
    # Products of rounded weights are formed in fp32 and rounded once.
    precise = torch.promote_types(dtype, torch.float32)
    times, weight = sampler.times, sampler.conv.weight.to(precise).permute(2, 3, 4, 0, 1).contiguous()
    c_out, c_in = weight.shape[-2:]
    expand = sampler.upscale_conv.weight.to(precise).view(2, 2, times, c_in, c_in)
    expand_bias = sampler.upscale_conv.bias.to(precise).view(2, 2, times, c_in)
    cells = 1 + max(cell for phase in taps for cell, _ in phase)
    merged = weight.new_zeros(len(taps), 2, 2, cells, 2, 2, c_out, c_in)
    tap_bias = weight.new_zeros(len(taps), 2, 2, 3, 3, c_out)
    for s, p, q, i, j in product(range(len(taps)), range(2), range(2), range(3), range(3)):
        # The fine row that tap i meets is p + i - 1, counted from the coarse row's first.
        row, column = p + i - 1, q + j - 1
        for k, (cell, half) in enumerate(taps[s]):
            kernel, phase = weight[k, i, j], (row % 2, column % 2, half)
            merged[s, p, q, cell, row // 2 - p + 1, column // 2 - q + 1] += kernel @ expand[phase]
            tap_bias[s, p, q, i, j] += kernel @ expand_bias[phase]
    bias = tap_bias.sum((3, 4)) + sampler.conv.bias
    merged = rearrange(merged, "s p q cell i j c_out c_in -> (s p q c_out) c_in cell i j")
    return merged.to(dtype), bias.flatten().to(dtype), Phases(tap_bias.to(dtype), options.split)


class Phases(nn.Module):
    """Makes fine frames of what a merged upsampler computes on the coarse grid."""

    def __init__(self, tap_bias: Tensor, split: RowSplit | None):
        """`tap_bias`: what the first convolution's bias contributes through each tap of the second, s p q 3 3 c."""
        super().__init__()
        self.tap_bias, self.split = fixed(tap_bias), split

    def forward(self, coarse: Tensor) -> Frames:
        """b (s p q c) h+1 w+1 -> s frames b c 2h 2w."""
        times, c = self.tap_bias.shape[0], self.tap_bias.shape[-1]
        b, _, h, w = coarse.shape
        h, w = h - 1, w - 1
        phases = coarse.unflatten(1, (times, 2, 2, c))
        frames = []
        for s in range(times):
            frame = coarse.new_empty(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
            for p, q in product(range(2), range(2)):
                frame[..., p::2, q::2] = phases[:, s, p, q, :, p : p + h, q : q + w]
            self.mend_border(frame, self.tap_bias[s])
            frames.append(frame)
        return frames

    def mend_border(self, frame: Tensor, tap_bias: Tensor) -> None:
        """Beyond the border the fine grid is zero: take out what the bias has added from there.

        The first row has p = 0 and misses tap 0, the last has p = 1 and misses tap 2; columns likewise. A corner misses
        both, but the tap they share only once.
        """
        top, bottom, left, right = (0, 0), (1, 2), (0, 0), (1, 2)
        rows = [top, bottom]
        if self.split:
            rows = [top] * (not self.split.has_above) + [bottom] * (not self.split.has_below)
        for p, i in rows:
            for q in range(2):
                frame[..., -p, q::2] -= tap_bias[p, q, i].sum(0)[:, None]
        for q, j in (left, right):
            for p in range(2):
                frame[..., p::2, -q] -= tap_bias[p, q, :, j].sum(0)[:, None]
        for (p, i), (q, j) in product(rows, (left, right)):
            frame[..., -p, -q] += tap_bias[p, q, i, j]
