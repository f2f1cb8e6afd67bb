"""The autoencoder for inference: the numbers of `VideoVAE` in fewer operations and less memory.

Built from the weights of a `VideoVAE`, which stays the definition. What is different, all of it exact in real numbers:

- Frames flow through the network depth first, few at a time, each a picture of its own in channels-last memory. Only
  the temporal convolutions look at a frame's predecessors, which they keep in the `CausalState`.
- The first frame of a clip meets itself under every tap, so the taps are added up beforehand: a third of the work. A
  picture is nothing but a first frame.
- Two frames, and two or four rows, at a time share products, see `winograd`.
- An upsampler (1x1x1 convolution, channels to space, causal convolution) is one linear map, whose output phases are
  small kernels on the coarse grid. Its state is coarse as well.

    b clips   c channels   T H W pixel frames, height, width   t h w the same in latent space
    a frame is b c H W, in channels-last memory
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels import Choices
from . import vae_chosen
from .frames import Frames, Taps, ThreeTaps, stacked
from .row_split import RowSplit
from .vae import (
    CausalConv3d,
    CausalState,
    Decoder,
    Downsampler,
    Encoder,
    FrameAttention,
    FrameNorm,
    ResnetBlock,
    Stage,
    Upsampler,
    VAEConfig,
    VideoVAE,
    attend_to_frame,
)
from .vae_chosen import ChosenConv, ChosenNormSilu, ChosenResnet
from .winograd import WinogradTaps

# Positions of a frame whose values torch may add up one by one; see `large_norm`.
SUMMED = 4096
# Values in one tensor that libraries of convolutions count in 32 bits.
COUNTED = 2**31 - 1


class Step(Protocol):
    """Part of the network."""

    def __call__(self, frames: Frames, state: CausalState) -> Frames:
        """The next frames of a clip in, what comes of them out. What later ones will need is left in the state.

        The list is the step's own: it may take frames out of it to let go of them.
        """


@dataclass(kw_only=True)
class FastOptions:
    """How the same numbers are computed. An autoencoder has its own, of which `block` and `band` may change between two
    slices, see `FastVAE.take`."""

    # Frames that pass a stage at once. More is faster on small frames, fewer takes less memory.
    block: int = 2
    # Channels from which two frames share products; None: never. Below, the additions cost more than they save.
    winograd_from: int | None = 128
    # Channels from which rows share products as well; None: never. In types of 16 bits, to whose rounding every sharing
    # adds, from twice as many.
    winograd_rows_from: int | None = 128
    # Positions of a frame that one convolution takes at once, in bands of whole rows; None: all. Bands bound what a
    # convolution needs besides its input and output, and change nothing else: norms and attention see whole frames.
    band: int | None = None
    # Multiplications that one convolution takes at once, about, in such bands as well: whoever watches is soon asked
    # again. None: all, for devices that compute while others go on.
    turn: int | None = None
    # Called after every step and every band; see `FastVAE.watched`.
    on_step: Callable[[], None] | None = None
    # Where this process has only some rows of every frame: how it meets the others.
    split: RowSplit | None = None
    # Who says where kernels of our own are faster than the library, on a GPU; None: the library everywhere.
    choices: Choices | None = None

    def step(self) -> None:
        """Tell whoever watches."""
        if self.on_step:
            self.on_step()

    @property
    def choosing(self) -> Choices | None:
        """`choices`, where there is a choice: shared frames are left to the library."""
        return None if self.split else self.choices


class FastVAE:
    """Stands in for `VideoVAE` where nothing is trained; see there for what the methods take and return.

    States of the two are not interchangeable.
    """

    def __init__(self, vae: VideoVAE, options: FastOptions | None = None):
        self.config: VAEConfig = vae.config
        weight = vae.decoder.conv_in.weight
        self.device, self.dtype = weight.device, weight.dtype
        # Its own copy, which `take` may change.
        self.options = options = replace(options or FastOptions())
        with torch.no_grad():
            self.encoder = encoder_steps(vae.encoder, options)
            self.decoder = decoder_steps(vae.decoder, options)

    def take(self, block: int, band: int | None) -> None:
        """From the next slice on, compute this much at once, see `FastOptions`."""
        self.options.block, self.options.band = block, band

    @contextmanager
    def watched(self, on_step: Callable[[], None]) -> Iterator[None]:
        """Meanwhile call this after every step and every band; it may raise to cancel."""
        self.options.on_step = on_step
        try:
            yield
        finally:
            self.options.on_step = None

    def encode_slice(self, clip: Tensor, state: CausalState, last: bool = False) -> tuple[Tensor, CausalState]:
        return self._run(self.encoder, clip, state, last)

    def decode_slice(self, latent: Tensor, state: CausalState, last: bool = False) -> tuple[Tensor, CausalState]:
        return self._run(self.decoder, latent, state, last)

    def encode(self, clip: Tensor) -> Tensor:
        return self.encode_slice(clip, CausalState(), last=True)[0]

    def decode(self, latent: Tensor) -> Tensor:
        return self.decode_slice(latent, CausalState(), last=True)[0]

    @torch.no_grad()
    def _run(self, steps: Sequence[Step], x: Tensor, state: CausalState, last: bool) -> tuple[Tensor, CausalState]:
        # The first frame of a clip goes alone: what follows comes in pairs.
        parts = [x] if state else x.split([1, x.shape[2] - 1], dim=2)
        state = Forgetful() if last and not state and x.shape[2] == 1 else state.begin()
        out: Frames = []
        for part in parts:
            blocks: Iterator[Frames] = ([channels_last(frame)] for frame in part.unbind(2))
            for step in steps:
                blocks = flow(step, blocks, state, self.options.block)
            out += [frame for block in blocks for frame in block]
        return torch.stack(out, dim=2), CausalState() if last else state


class Forgetful(CausalState):
    """Of a picture, which nothing follows: its frames are let go of as soon as the next layer has seen them."""

    def __setitem__(self, layer: object, past: object) -> None:
        pass


def flow(step: Step, blocks: Iterable[Frames], state: CausalState, size: int) -> Iterator[Frames]:
    """Send frames through a step, `size` at a time."""
    waiting: Frames = []
    for block in blocks:
        waiting += block
        # Nothing here may hold frames that are done with while the next ones are computed.
        del block
        while len(waiting) >= size:
            yield step(take(waiting, size), state)
    if waiting:
        yield step(waiting, state)


def take(waiting: Frames, size: int) -> Frames:
    """The first so many frames, which wait no longer."""
    taken = waiting[:size]
    del waiting[:size]
    return taken


def encoder_steps(encoder: Encoder, options: FastOptions) -> list[Step]:
    """The encoder, cut where frames get fewer."""
    mid = encoder.mid_block
    middle = [resnet(mid.resnets[0], options), Attention(mid.attentions[0], options), resnet(mid.resnets[1], options)]
    return [
        temporal_conv(encoder.conv_in, options),
        *(step for stage in encoder.down_blocks for step in stage_steps(stage, options)),
        Chain([*middle, norm_silu(encoder.conv_norm_out, options), temporal_conv(encoder.conv_out, options)], options),
    ]


def decoder_steps(decoder: Decoder, options: FastOptions) -> list[Step]:
    """The decoder, cut where frames get more."""
    mid = decoder.mid_block
    middle = [resnet(mid.resnets[0], options), Attention(mid.attentions[0], options), resnet(mid.resnets[1], options)]
    return [
        Chain([temporal_conv(decoder.conv_in, options), *middle], options),
        *(step for stage in decoder.up_blocks for step in stage_steps(stage, options)),
        Chain([norm_silu(decoder.conv_norm_out, options), temporal_conv(decoder.conv_out, options)], options),
    ]


def stage_steps(stage: Stage, options: FastOptions) -> list[Step]:
    blocks = Chain([resnet(step, options) for step in stage.steps if isinstance(step, ResnetBlock)], options)
    sampler = stage.steps[-1]
    if isinstance(sampler, Downsampler):
        return [blocks, (TemporalDown if sampler.temporal else SpatialDown)(sampler, options)]
    if isinstance(sampler, Upsampler):
        return [blocks, TemporalUp(sampler, options) if sampler.times == 2 else SpatialUp(sampler, options)]
    return [blocks]


class Chain:
    """Steps one after the other, all for the same frames."""

    def __init__(self, steps: Sequence[Step], options: FastOptions):
        self.steps, self.options = steps, options

    def __call__(self, frames: Frames, state: CausalState) -> Frames:
        for step in self.steps:
            frames = step(frames, state)
            self.options.step()
        return frames


def norm_silu(norm: FrameNorm, options: FastOptions) -> NormSilu | ChosenNormSilu:
    return ChosenNormSilu(norm, options.choosing) if options.choosing else NormSilu(norm, options)


class NormSilu:
    def __init__(self, norm: FrameNorm, options: FastOptions):
        self.norm, self.options = norm, options

    def __call__(self, frames: Frames, state: CausalState) -> Frames:
        return [F.silu(self.normed(frames.pop(0)), inplace=True) for _ in range(len(frames))]

    def normed(self, frame: Tensor) -> Tensor:
        if self.options.split is not None:
            return split_norm(frame, self.norm, self.options.split)
        if frame.shape[-2] * frame.shape[-1] <= SUMMED:
            return self.norm.of_frame(frame)
        clips = [large_norm(clip, self.norm, self.options.band) for clip in frame.split(1)]
        # A lone one would be copied.
        return torch.cat(clips) if len(clips) > 1 else clips[0]


def large_norm(frame: Tensor, norm: nn.GroupNorm, band: int | None = None) -> Tensor:
    """Group norm of a large frame, 1 c H W, in channels-last memory, with statistics that stay true.

    Args:
        band: positions looked at in one call, which takes as much memory again; None: all.
    """
    frame = channels_last(frame)
    # Weights in fp32 keep the statistics in fp32.
    ones = frame.new_ones(frame.shape[1], dtype=torch.float32)
    if norm.weight.device.type == "cpu":
        center, spread = group_moments(frame, norm, ones, band)
    else:
        moments = torch.batch_norm_update_stats(frame, torch.zeros_like(ones), ones, 0.0)
        mean, variance = (moment.unflatten(0, (norm.num_groups, -1)) for moment in moments)
        center = mean.mean(1)
        spread = (variance + (mean - center[:, None]).square()).mean(1)
    of_channel = (x.float().repeat_interleave(frame.shape[1] // norm.num_groups) for x in (center, spread))
    return F.batch_norm(frame, *of_channel, norm.weight.float(), norm.bias.float(), eps=norm.eps)


def group_moments(frame: Tensor, norm: nn.GroupNorm, ones: Tensor, band: int | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of every group of channels of a frame 1 c H W, on a CPU.

    In channels-last memory, torch adds up all values of a group one after the other, in fp32. At half a million values
    the result is off by a thousandth, and more in larger frames. So it is asked for strips of rows, whose moments are
    put together in fp64.
    """
    _, c, h, w = frame.shape
    height = max(1, SUMMED // w)
    whole = h // height * height
    rows = h if band is None else max(height, band // w // height * height)
    pieces = [(start, min(start + rows, whole), height) for start in range(0, whole, rows)]
    pieces += [(whole, h, h - whole)] if whole < h else []
    means, variances, counts = [], [], []
    for start, stop, size in pieces:
        strips = rearrange(frame[0, :, start:stop], "c (n h) w -> n c h w", h=size)
        mean, scale = torch.native_group_norm(strips, ones, ones, len(strips), c, size * w, norm.num_groups, norm.eps)[
            1:
        ]
        means.append(mean.double())
        variances.append(scale.double().pow(-2) - norm.eps)
        counts += [size / h] * len(strips)
    mean, variance, share = torch.cat(means), torch.cat(variances), means[0].new_tensor(counts)[:, None]
    center = (mean * share).sum(0)
    return center, ((variance + (mean - center).square()) * share).sum(0)


def split_norm(frame: Tensor, norm: nn.GroupNorm, split: RowSplit) -> Tensor:
    """Group norm of some rows of a frame, with the statistics of all of them."""
    groups = frame.unflatten(1, (norm.num_groups, -1)).to(torch.promote_types(frame.dtype, torch.float32))
    count, mean = groups[0, 0].numel(), groups.mean((2, 3, 4))
    # Means and squares about each process's own mean, put together as Chan et al. do: no large squares to subtract.
    square = (groups - mean[:, :, None, None, None]).square().sum((2, 3, 4))
    all_count = split.total(mean.new_tensor([count]))
    all_mean = split.total(mean * count) / all_count
    variance = split.total(square + count * (mean - all_mean).square()) / all_count
    scale = (variance + norm.eps).rsqrt()
    out = (groups - all_mean[:, :, None, None, None]) * scale[:, :, None, None, None]
    out = out.flatten(1, 2) * norm.weight[:, None, None] + norm.bias[:, None, None]
    return channels_last(out.to(frame.dtype))


class Attention:
    def __init__(self, attention: FrameAttention, options: FastOptions):
        self.attention, self.split = attention, options.split
        self.how = (
            partial(vae_chosen.attend, options.choices)
            if options.choices
            else partial(attend_to_frame, on_turn=options.step)
        )

    def __call__(self, frames: Frames, state: CausalState) -> Frames:
        return [channels_last(self.attend(frame)) for frame in frames]

    def attend(self, frame: Tensor) -> Tensor:
        if self.split is None:
            return self.attention(frame.unsqueeze(2), self.how).squeeze(2)
        # On the coarsest grid there is little to compute, so every process does all of it.
        whole, rows = self.split.gather(frame)
        return self.attention(whole.unsqueeze(2), self.how).squeeze(2)[:, :, rows]


def resnet(block: ResnetBlock, options: FastOptions) -> Resnet | ChosenResnet:
    parts = ((block.norm1, block.conv1), (block.norm2, block.conv2))
    halves = [(norm_silu(norm, options), temporal_conv(conv, options)) for norm, conv in parts]
    if options.choosing:
        return ChosenResnet(*halves, Skip(block))
    return Resnet(*(Chain(half, options) for half in halves), Skip(block))


class Resnet:
    def __init__(self, first: Step, second: Step, skip: Skip):
        self.first, self.second, self.skip = first, second, skip

    def __call__(self, frames: Frames, state: CausalState) -> Frames:
        # A wide input is let go of as soon as it is narrowed and normed.
        sources = [self.skip(frame) for frame in frames]
        out = self.second(self.first(frames, state), state)
        return [frame.add_(source) for frame, source in zip(out, sources, strict=True)]


class Skip:
    """The way around a residual block."""

    def __init__(self, block: ResnetBlock):
        self.shortcut = None
        if block.conv_shortcut is not None:
            self.shortcut = channels_last(block.conv_shortcut.weight.squeeze(2)), block.conv_shortcut.bias

    def __call__(self, frame: Tensor) -> Tensor:
        return F.conv2d(frame, *self.shortcut) if self.shortcut else frame


def temporal_conv(conv: CausalConv3d, options: FastOptions) -> TemporalConv | ChosenConv:
    if not options.choosing:
        return TemporalConv(conv.weight, conv.bias, options)
    # One copy of the weight serves all ways to use it.
    weight = conv.weight.contiguous(memory_format=torch.channels_last_3d)
    taps, bare = (TemporalConv(weight, bias, options).taps for bias in (conv.bias, None))
    return ChosenConv(weight, conv.bias, taps, bare, options.choosing)


class TemporalConv:
    """A causal convolution with 3 taps in time and stride 1. Its state are the two frames before."""

    def __init__(self, weight: Tensor, bias: Tensor | None, options: FastOptions):
        self.taps: ThreeTaps = BandedTaps(three_taps(weight, bias, options), weight, options)
        self.split = options.split

    def __call__(self, frames: Frames, state: CausalState) -> Frames:
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
        # For a lone clip in fp32 torch takes a slow path of its own on a CPU.
        slow = weight.device.type == "cpu" and weight.dtype == torch.float32
        return StackedTaps(weight, bias) if slow else DirectTaps(weight, bias)
    rows_from = math.inf if options.winograd_rows_from is None else options.winograd_rows_from
    # Rows of the small kernels of an upsampler would share too little.
    shared_rows = k == 3 and c >= rows_from * (2 if weight.dtype.itemsize == 2 else 1)
    return WinogradTaps(weight, bias, shared_rows, on_band=options.step)


class BandedTaps:
    """Bands of rows, one after the other. Exact: a band gets the neighbours' rows that its kernel reaches."""

    def __init__(self, taps: ThreeTaps, weight: Tensor, options: FastOptions):
        """The weight c_out c ... k k has a kernel 2 or 3 rows high."""
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


class DirectTaps:
    """Frames stacked, one call."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = weight.contiguous(memory_format=torch.channels_last_3d)
        self.bias = bias

    def still(self, frame: Tensor) -> Tensor:
        return F.conv2d(frame, channels_last(self.weight.sum(2)), self.bias, padding=1)

    def moving(self, frames: Frames) -> Frames:
        return list(F.conv3d(stacked(frames), self.weight, self.bias, padding=(0, 1, 1)).unbind(2))


class SpatialDown:
    """Halves height and width."""

    def __init__(self, sampler: Downsampler, options: FastOptions):
        self.weight, self.bias = channels_last(sampler.conv.weight.squeeze(2)), sampler.conv.bias
        self.split = options.split

    def __call__(self, frames: Frames, state: CausalState) -> Frames:
        return [F.conv2d(pad_end(frame, self.split), self.weight, self.bias, stride=2) for frame in frames]


def pad_end(frame: Tensor, split: RowSplit | None) -> Tensor:
    """One more row at the bottom and column at the right, of zeros."""
    return F.pad(frame, (0, 1, 0, 1)) if split is None else F.pad(split.extend_below(frame), (0, 1))


class TemporalDown:
    """Halves time, height and width. Its state are the frames that the next result needs and that are here already."""

    def __init__(self, sampler: Downsampler, options: FastOptions):
        self.taps = StackedTaps(sampler.conv.weight, sampler.conv.bias, stride=2, padding=0)
        self.split = options.split

    def __call__(self, frames: Frames, state: CausalState) -> Frames:
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


@dataclass(frozen=True)
class Phases:
    """Makes fine frames of what a merged upsampler computes on the coarse grid."""

    # What the first convolution's bias contributes through each tap of the second: s p q 3 3 c.
    tap_bias: Tensor
    split: RowSplit | None

    def __call__(self, coarse: Tensor) -> Frames:
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


class SpatialUp:
    """Doubles height and width."""

    def __init__(self, sampler: Upsampler, options: FastOptions):
        weight, bias, self.phases = merge(sampler, options, [[(0, 0), (1, 0), (2, 0)]])
        self.conv = TemporalConv(weight, bias, options)

    def __call__(self, frames: Frames, state: CausalState) -> Frames:
        return [fine for coarse in self.conv(frames, state) for fine in self.phases(coarse)]


class TemporalUp:
    """Doubles time, height and width. Its state is the frame before, and what to do with the next."""

    def __init__(self, sampler: Upsampler, options: FastOptions):
        # The second half of what the first frame becomes is dropped, and the first half stands in for all before it.
        self.first = CoarseUp(sampler, options, [[(0, 0), (0, 0), (0, 0)]])
        self.second = CoarseUp(sampler, options, [[(0, 0), (0, 0), (1, 0)], [(0, 0), (1, 0), (1, 1)]])
        self.regular = CoarseUp(sampler, options, [[(0, 0), (0, 1), (1, 0)], [(0, 1), (1, 0), (1, 1)]])

    def __call__(self, frames: Frames, state: CausalState) -> Frames:
        out: Frames = []
        for frame in frames:
            past, up = state.get(self, ([], self.first))
            out += up([*past, frame])
            state[self] = [frame], self.second if up is self.first else self.regular
        return out


class CoarseUp:
    """An upsampler that sees a fixed number of coarse frames."""

    def __init__(self, sampler: Upsampler, options: FastOptions, taps: Sequence[Sequence[tuple[int, int]]]):
        weight, bias, self.phases = merge(sampler, options, taps)
        self.taps: Taps = BandedTaps(StackedTaps(weight, bias), weight, options)
        self.split = options.split

    def __call__(self, coarse: Frames) -> Frames:
        if self.split is None:
            return self.phases(*self.taps.moving(coarse))
        (result,) = self.taps.moving([self.split.extend(frame) for frame in coarse])
        return self.phases(self.split.trim(result))


class StackedTaps:
    """As many frames as there are taps, one above the other as channels, for every result."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 1):
        self.taps = weight.shape[2]
        self.conv = partial(F.conv2d, bias=bias, stride=stride, padding=padding)
        self.weight = channels_last(weight.transpose(1, 2).flatten(1, 2))

    def still(self, frame: Tensor) -> Tensor:
        return self.conv(frame, channels_last(self.weight.unflatten(1, (self.taps, -1)).sum(1)))

    def moving(self, frames: Frames) -> Frames:
        starts = range(len(frames) - self.taps + 1)
        return [self.conv(torch.cat(frames[start : start + self.taps], dim=1), self.weight) for start in starts]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
