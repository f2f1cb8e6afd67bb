"""Group norm of single frames, for the fast autoencoder: of frames of any size, in little memory, and of split ones.

    a frame is b c H W, in channels-last memory
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .frames import COUNTED, FastOptions, Frames, channels_last
from .row_split import RowSplit
from .vae import CausalState, FrameNorm

# Positions of a frame whose values torch may add up one by one; see `large_norm`.
SUMMED = 4096


class NormSilu(nn.Module):
    def __init__(self, norm: FrameNorm, options: FastOptions):
        super().__init__()
        self.norm, self.options = norm, options

    def forward(self, frames: Frames, state: CausalState) -> Frames:
        return [F.silu(self.normed(frames.pop(0)), inplace=True) for _ in range(len(frames))]

    def normed(self, frame: Tensor) -> Tensor:
        if self.options.split is not None:
            return split_norm(frame, self.norm, self.options.split)
        if frame.shape[-2] * frame.shape[-1] <= SUMMED:
            return self.norm.of_frame(frame)
        clips = [large_norm(clip, self.norm, self.options) for clip in frame.split(1)]
        # A lone one would be copied.
        return torch.cat(clips) if len(clips) > 1 else clips[0]


def large_norm(frame: Tensor, norm: nn.GroupNorm, options: FastOptions) -> Tensor:
    """Group norm of a large frame, 1 c H W, in channels-last memory, with statistics that stay true."""
    frame = channels_last(frame)
    # Weights in fp32 keep the statistics in fp32.
    ones = frame.new_ones(frame.shape[1], dtype=torch.float32)
    if options.device == "cpu":
        center, spread = group_moments(frame, norm, ones, options.band)
    elif options.device != "cuda":
        groups = frame.unflatten(1, (norm.num_groups, -1))[0].float()
        spread, center = torch.var_mean(groups, dim=(1, 2, 3), correction=0)
    else:
        center, spread = channel_moments(frame, norm, ones)
    of_channel = (x.float().repeat_interleave(frame.shape[1] // norm.num_groups) for x in (center, spread))
    return F.batch_norm(frame, *of_channel, norm.weight.float(), norm.bias.float(), eps=norm.eps)


def channel_moments(frame: Tensor, norm: nn.GroupNorm, ones: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every group of channels of a frame 1 c H W, on CUDA, put together of those of channels."""
    # Of more values than it counts torch makes a copy in fp32.
    parts = frame.tensor_split(-(-frame.numel() // COUNTED), dim=2)
    moments = [torch.batch_norm_update_stats(part, torch.zeros_like(ones), ones, 0.0) for part in parts]
    of_groups = [[moment.unflatten(0, (norm.num_groups, -1)) for moment in pair] for pair in moments]
    shares = [part.shape[2] / frame.shape[2] for part in parts]
    center = sum(share * mean.mean(1) for share, (mean, _) in zip(shares, of_groups, strict=True))
    spread = sum(
        share * (variance + (mean - center[:, None]).square()).mean(1)
        for share, (mean, variance) in zip(shares, of_groups, strict=True)
    )
    return center, spread


def group_moments(frame: Tensor, norm: nn.GroupNorm, ones: Tensor, band: int | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of every group of channels of a frame 1 c H W, on a CPU.

    Args:
        band: positions looked at in one call, which takes as much memory again; None: all.

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
