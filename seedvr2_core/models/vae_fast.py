"""The autoencoder for inference: the numbers of `VideoVAE` in fewer operations and less memory.

Built from the weights of a `VideoVAE`, which stays the definition. What is different, all of it exact in real numbers:

- Frames flow through the network depth first, few at a time, each a picture of its own in channels-last memory. Only
  the temporal convolutions look at a frame's predecessors, which they keep in the `CausalState`.
- The first frame of a clip meets itself under every tap, so the taps are added up beforehand: a third of the work. A
  picture is nothing but a first frame.
- Two frames, and two or four rows, at a time share products, see `winograd`.
- An upsampler is one linear map on the coarse grid, see `samplers`.

    b clips   c channels   T H W pixel frames, height, width   t h w the same in latent space
    a frame is b c H W, in channels-last memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import vae_chosen
from .causal_taps import TemporalConv
from .frame_norm import NormSilu
from .frames import FastOptions, Frames, Step, channels_last, fixed
from .samplers import SpatialDown, SpatialUp, TemporalDown, TemporalUp
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


class FastVAE(nn.Module):
    """Stands in for `VideoVAE` where nothing is trained; see there for what the methods take and return.

    It has weights of its own and does not need the other any more. States of the two are not interchangeable.
    """

    def __init__(self, vae: VideoVAE, options: FastOptions | None = None):
        super().__init__()
        self.config: VAEConfig = vae.config
        options, where = options or FastOptions(), vae.decoder.conv_in.weight.device.type
        # Its own copy, which `take` may change.
        self.options = options = replace(options, device=options.device or where)
        # Ordinary tensors, whatever the caller's mode, see `load_vae`.
        with torch.inference_mode(False), torch.no_grad():
            self.encoder = nn.ModuleList(encoder_steps(vae.encoder, options))
            self.decoder = nn.ModuleList(decoder_steps(vae.decoder, options))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

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


class Chain(nn.Module):
    """Steps one after the other, all for the same frames."""

    def __init__(self, steps: Sequence[Step], options: FastOptions):
        super().__init__()
        self.steps, self.options = nn.ModuleList(steps), options

    def forward(self, frames: Frames, state: CausalState) -> Frames:
        for step in self.steps:
            frames = step(frames, state)
            self.options.step()
        return frames


def norm_silu(norm: FrameNorm, options: FastOptions) -> NormSilu | ChosenNormSilu:
    return ChosenNormSilu(norm, options.choosing) if options.choosing else NormSilu(norm, options)


class Attention(nn.Module):
    def __init__(self, attention: FrameAttention, options: FastOptions):
        super().__init__()
        self.attention, self.split = attention, options.split
        self.how = (
            partial(vae_chosen.attend, options.choices)
            if options.choices
            else partial(attend_to_frame, on_turn=options.step)
        )

    def forward(self, frames: Frames, state: CausalState) -> Frames:
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


class Resnet(nn.Module):
    def __init__(self, first: Step, second: Step, skip: Skip):
        super().__init__()
        self.first, self.second, self.skip = first, second, skip

    def forward(self, frames: Frames, state: CausalState) -> Frames:
        # A wide input is let go of as soon as it is narrowed and normed.
        sources = [self.skip(frame) for frame in frames]
        out = self.second(self.first(frames, state), state)
        return [frame.add_(source) for frame, source in zip(out, sources, strict=True)]


class Skip(nn.Module):
    """The way around a residual block."""

    def __init__(self, block: ResnetBlock):
        super().__init__()
        shortcut = block.conv_shortcut
        self.weight = None if shortcut is None else fixed(channels_last(shortcut.weight.squeeze(2)))
        self.bias = None if shortcut is None else fixed(shortcut.bias)

    def forward(self, frame: Tensor) -> Tensor:
        return frame if self.weight is None else F.conv2d(frame, self.weight, self.bias)


def temporal_conv(conv: CausalConv3d, options: FastOptions) -> TemporalConv | ChosenConv:
    if not options.choosing:
        return TemporalConv(conv.weight, conv.bias, options)
    # One copy of the weight serves all ways to use it.
    weight = fixed(conv.weight.contiguous(memory_format=torch.channels_last_3d))
    taps, bare = (TemporalConv(weight, bias, options).taps for bias in (conv.bias, None))
    return ChosenConv(weight, conv.bias, taps, bare, options.choosing)
