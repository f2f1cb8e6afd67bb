"""The causal video autoencoder of SeedVR and SeedVR2.

Causal in time, symmetric in space: 4n+1 frames become n+1 latents, each 8 times smaller in height and width. No layer
mixes frames except the 3-tap causal convolutions, so a clip may be cut anywhere in time: what those convolutions still
need from the past is a `CausalState` that goes into a slice and comes back for the next one.

Attribute names are those of the published checkpoint, so its tensors load strictly.

    b clips   c channels   T H W pixel frames, height, width   t h w the same in latent space
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# GroupNorm everywhere, the attention included; not torch's default of 1e-5.
NORM_EPS = 1e-6
# Decoder stages that double time, encoder stages (counted from the last sampler) that halve it.
TEMPORAL_STAGES = 2
# The attention of the middle block scores every position of a frame against every other. Where torch has no kernel that
# keeps them to itself, queries are taken in turns so that no more than this many scores exist at once (a 4K frame would
# need 17 billion).
MAX_SCORES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of one autoencoder."""

    widths: Annotated[tuple[int, ...], "channels of each stage, fine to coarse"] = (128, 256, 512, 512)
    blocks: Annotated[int, "residual blocks in an encoder stage; a decoder stage has one more"] = 2
    latent_channels: Annotated[int, "numbers by 8 x 8 pixels of four frames"] = 16
    groups: Annotated[int, "of every GroupNorm"] = 32
    scale: Annotated[float, "what the transformer sees is scale * latent"] = 0.9152


SEEDVR2_VAE = VAEConfig()
# Queries, keys and values of frames, n positions c, to what every position gets.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class CausalState(dict["CausalConv3d", Tensor]):
    """The last input frames of every causal convolution, keyed by the convolution. Empty means the clip starts here.

    Belongs to one clip and one network; treat it as opaque. Size for the published model, in elements per pixel of a
    full-resolution frame: 1,942 while encoding, 4,321 while decoding, whatever the length of the clip.
    """

    def begin(self) -> CausalState:
        """What the next slice works on: a copy, so that a slice that fails leaves this state as it was."""
        return CausalState(self)


class Pass:
    """One pass over one slice: the past it continues, and what it leaves for the next."""

    def __init__(self, past: CausalState, keep: bool):
        self.past = past
        self.kept = CausalState() if keep else None

    @property
    def at_start(self) -> bool:
        return not self.past

    def extend(self, conv: CausalConv3d, x: Tensor) -> Tensor:
        """Put the frames before this slice in front of it; a clip is preceded by its own first frame."""
        reach = conv.kernel_size[0] - 1
        past = x[:, :, :1].expand(-1, -1, reach, -1, -1) if self.at_start else self.past[conv]
        x = torch.cat([past, x], dim=2)
        if self.kept is not None:
            # A view would keep the whole activation alive between slices.
            self.kept[conv] = x[:, :, x.shape[2] - (conv.kernel_size[0] - conv.stride[0]) :].clone()
        return x


class CausalConv3d(nn.Conv3d):
    """Convolution that sees this frame and the two before it (kernel 3 in time), or this frame alone (kernel 1)."""

    def forward(self, x: Tensor, slice_: Pass) -> Tensor:
        if self.kernel_size[0] == 1:
            return super().forward(x)
        if x.shape[2] == 1 and slice_.at_start and slice_.kept is None:
            return self.forward_still(x)
        return super().forward(slice_.extend(self, x))

    def forward_still(self, x: Tensor) -> Tensor:
        """A lone first frame meets itself under every tap, so the taps may be added up first: a third of the work."""
        x = F.conv2d(x.squeeze(2), self.weight.sum(2), self.bias, self.stride[1:], self.padding[1:])
        return x.unsqueeze(2)


def causal_conv(c_in: int, c_out: int) -> CausalConv3d:
    return CausalConv3d(c_in, c_out, 3, padding=(0, 1, 1))


class FrameNorm(nn.GroupNorm):
    """GroupNorm whose statistics are those of a single frame."""

    def __init__(self, groups: int, channels: int):
        super().__init__(groups, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        return rearrange(self.of_frame(frames), "(b t) c h w -> b c t h w", b=x.shape[0])

    def of_frame(self, frames: Tensor) -> Tensor:
        """Frames n c h w on their own."""
        return super().forward(frames)


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = FrameNorm(groups, c_in)
        self.conv1 = causal_conv(c_in, c_out)
        self.norm2 = FrameNorm(groups, c_out)
        self.conv2 = causal_conv(c_out, c_out)
        self.conv_shortcut = CausalConv3d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, slice_: Pass) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), slice_)
        h = self.conv2(F.silu(self.norm2(h)), slice_)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x, slice_))


class FrameAttention(nn.Module):
    """Self-attention over the positions of one frame: a single head as wide as the features."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """b c t h w in and out; `attend` computes what `attend_to_frame` does."""
        b, _, _, h, _ = x.shape
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        tokens = rearrange(self.group_norm(frames), "n c h w -> n (h w) c")
        out = (attend or attend_to_frame)(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](out), "(b t) (h w) c -> b c t h w", b=b, h=h)


def attend_to_frame(q: Tensor, k: Tensor, v: Tensor, on_turn: Callable[[], None] = lambda: None) -> Tensor:
    """Softmax attention of every frame, with one head: n positions c. `on_turn` is called after every turn."""
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    n, _, positions, _ = q.shape
    turn = positions if keeps_scores(q, k, v) else max(1, MAX_SCORES // (n * positions))
    out = []
    for part in q.split(turn, dim=2):
        out.append(F.scaled_dot_product_attention(part, k, v))
        on_turn()
    return (torch.cat(out, dim=2) if len(out) > 1 else out[0]).squeeze(1)


def keeps_scores(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch computes this attention, n heads l c, in a kernel that keeps the scores to itself.

    That of CUDA takes heads of any width, and wants many queries at once.
    """
    if not q.is_cuda:
        return False
    call = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    return torch.backends.cuda.can_use_efficient_attention(call)


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(channels, groups)])

    def forward(self, x: Tensor, slice_: Pass) -> Tensor:
        x = self.resnets[0](x, slice_)
        return self.resnets[1](self.attentions[0](x), slice_)


class Downsampler(nn.Module):
    """Halves height and width, and time as well if temporal: 2m+1 frames become m+1."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.temporal = temporal
        kernel, stride = ((3, 3, 3), (2, 2, 2)) if temporal else ((1, 3, 3), (1, 2, 2))
        self.conv = CausalConv3d(channels, channels, kernel, stride)

    def forward(self, x: Tensor, slice_: Pass) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)), slice_)


class Upsampler(nn.Module):
    """Doubles height and width, and time as well if temporal: m+1 frames become 2m+1 at the start of a clip."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.times = 2 if temporal else 1
        self.upscale_conv = nn.Conv3d(channels, channels * 4 * self.times, 1)
        self.conv = causal_conv(channels, channels)

    def forward(self, x: Tensor, slice_: Pass) -> Tensor:
        x = channel_to_space(self.upscale_conv(x), self.times)
        if self.times == 2 and slice_.at_start:
            # The first latent stands for one frame only; the second half of what it became is dropped.
            x = torch.cat([x[:, :, :1], x[:, :, 2:]], dim=2)
        return self.conv(x, slice_)


def channel_to_space(x: Tensor, times: int) -> Tensor:
    """Channels -> a finer grid. Row offset slowest, then column, then time; the feature itself is fastest."""
    return rearrange(x, "b (p q z c) t h w -> b c (t z) (h p) (w q)", p=2, q=2, z=times)


class Stage(nn.Module):
    """Residual blocks of one resolution, then the change to the next, if there is a next."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, sampler: Downsampler | Upsampler | None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))
        if isinstance(sampler, Downsampler):
            self.downsamplers = nn.ModuleList([sampler])
        elif isinstance(sampler, Upsampler):
            self.upsamplers = nn.ModuleList([sampler])
        self.steps = [*self.resnets, *([sampler] if sampler else [])]

    def forward(self, x: Tensor, slice_: Pass) -> Tensor:
        for step in self.steps:
            x = step(x, slice_)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, last = config.widths, config.groups, len(config.widths) - 1
        self.conv_in = causal_conv(3, widths[0])
        self.down_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                width,
                config.blocks,
                groups,
                Downsampler(width, temporal=i >= last - TEMPORAL_STAGES) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = FrameNorm(groups, widths[-1])
        self.conv_out = causal_conv(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, slice_: Pass) -> Tensor:
        x = self.conv_in(x, slice_)
        for stage in self.down_blocks:
            x = stage(x, slice_)
        x = self.mid_block(x, slice_)
        return self.conv_out(F.silu(self.conv_norm_out(x)), slice_)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, last = config.widths[::-1], config.groups, len(config.widths) - 1
        self.conv_in = causal_conv(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                width,
                config.blocks + 1,
                groups,
                Upsampler(width, temporal=i < TEMPORAL_STAGES) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = FrameNorm(groups, widths[-1])
        self.conv_out = causal_conv(widths[-1], 3)

    def forward(self, x: Tensor, slice_: Pass) -> Tensor:
        x = self.mid_block(self.conv_in(x, slice_), slice_)
        for stage in self.up_blocks:
            x = stage(x, slice_)
        return self.conv_out(F.silu(self.conv_norm_out(x)), slice_)


class VideoVAE(nn.Module):
    """Clips in -1..1 to latents and back.

    `encode` and `decode` take whole clips; `encode_slice` and `decode_slice` take them piece by piece and give the same
    numbers. Decoded values may leave -1..1; clamp them after colour transfer, not before.

    Source: SeedVR, arXiv 2501.01320, section 3; sizes as in the released checkpoint.
    """

    def __init__(self, config: VAEConfig = SEEDVR2_VAE):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def watched(self, on_step: Callable[[], None]) -> AbstractContextManager[None]:
        """Meanwhile `FastVAE` calls this after every step of a slice; here a slice is a single step."""
        return nullcontext()

    def encode_slice(self, clip: Tensor, state: CausalState, last: bool = False) -> tuple[Tensor, CausalState]:
        """Encode the next frames of a clip.

        Args:
            clip: b 3 T H W in -1..1. T is 4n+1 where the clip starts, a multiple of 4 later.
            state: `CausalState()` where the clip starts, afterwards what the previous slice returned.
            last: whether the clip ends here; then nothing is kept for a next slice.

        Returns:
            moments b 32 t h w (see `posterior`), and the state for the next slice.
        """
        slice_ = Pass(state, keep=not last)
        return self.encoder(clip, slice_), slice_.kept or CausalState()

    def decode_slice(self, latent: Tensor, state: CausalState, last: bool = False) -> tuple[Tensor, CausalState]:
        """Decode the next latents of a clip, any number of them.

        Args:
            latent: b 16 t h w, in the autoencoder's own scale.
            state: `CausalState()` where the clip starts, afterwards what the previous slice returned.
            last: whether the clip ends here; then nothing is kept for a next slice.

        Returns:
            clip b 3 T H W with T = 4(t-1)+1 where the clip starts, 4t later; and the state for the next slice.
        """
        slice_ = Pass(state, keep=not last)
        return self.decoder(latent, slice_), slice_.kept or CausalState()

    def encode(self, clip: Tensor, slice_frames: int | None = 4) -> Tensor:
        """Moments b 32 t h w of a whole clip b 3 T H W, T = 4n+1, working on `slice_frames` frames at a time.

        `slice_frames` is a positive multiple of 4 and does not change the result; None takes all frames at once.
        """
        return self._run(self.encoder, clip, slice_frames)

    def decode(self, latent: Tensor, slice_latents: int | None = 1) -> Tensor:
        """Clip b 3 T H W, about -1..1, of whole latents b 16 t h w, working on `slice_latents` latents at a time."""
        return self._run(self.decoder, latent, slice_latents)

    @staticmethod
    def _run(network: Encoder | Decoder, x: Tensor, length: int | None) -> Tensor:
        frames = x.shape[2]
        if length is None or frames - 1 <= length:
            return network(x, Pass(CausalState(), keep=False))
        # The first slice also holds the frame that stands alone at the start of a clip.
        slices = [x[:, :, : 1 + length], *x[:, :, 1 + length :].split(length, dim=2)]
        state, out = CausalState(), []
        for i, part in enumerate(slices):
            slice_ = Pass(state, keep=i < len(slices) - 1)
            out.append(network(part, slice_))
            state = slice_.kept
        return torch.cat(out, dim=2)


def posterior(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each b 16 t h w, of the latent distribution described by moments b 32 t h w.

    The mean is what inference uses; training draws `mean + std * noise`.
    """
    mean, logvar = moments.chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30, 20))
