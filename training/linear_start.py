"""Start an autoencoder as the best linear codec there is, so that training only has to improve on it.

From random weights a small autoencoder spends thousands of steps finding out what principal component analysis computes
in a second: 16 numbers that describe a block of 8 x 8 pixels. Here those are written into the weights. Residual blocks
begin as the identity (their second convolution is zero), samplers rearrange pixels, and two layers do the arithmetic.

The one obstacle is the GroupNorm before the last convolution of each half: it would normalise the contrast away. Two
constant channels of opposite sign in every group, far larger than the signal, hold its statistics still; training is
free to drop them.

    s signals   k features of a block   c channels
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from seedvr2_core.models.vae import ResnetBlock, Upsampler, VideoVAE

# Size of the constant channels, in standard deviations of the signal.
CARRIER = 6.0
# Log-variance of the posterior at the first step: a standard deviation of 0.05.
NARROW = -6.0
BLOCK = 8


@torch.no_grad()
def start_linear(vae: VideoVAE, frames: Tensor) -> None:
    """Overwrite the weights of a fresh autoencoder, in place.

    Args:
        vae: with four stages and one residual block in an encoder stage.
        frames: n 3 H W in -1..1, H and W multiples of 8; a few million pixels to learn the components from.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    for half in (vae.encoder, vae.decoder):
        nn.init.zeros_(half.mid_block.attentions[0].to_out[0].weight)
        nn.init.zeros_(half.mid_block.attentions[0].to_out[0].bias)
    latent = _start_encoder(vae, frames)
    _start_decoder(vae, frames, latent)


def _start_encoder(vae: VideoVAE, frames: Tensor) -> Tensor:
    """Returns the latents n s h w of the frames."""
    encoder, count = vae.encoder, vae.config.latent_channels
    first, second, third, fourth = encoder.down_blocks
    _set(encoder.conv_in, torch.eye(3))
    features = _fold(frames)
    _set_down(first, torch.eye(12))
    _set(second.resnets[0].conv_shortcut, torch.eye(12))
    features = _fold(features)
    weight, bias = principal_components(features, min(features.shape[1], vae.config.widths[1]))
    _set_down(second, weight, bias)
    features = _apply(features, weight, bias)
    _set(third.resnets[0].conv_shortcut, torch.eye(len(weight)))
    features = _fold(features)
    weight, bias = principal_components(features, count, whiten=True)
    _set_down(third, weight, bias)
    _through_norm(fourth.resnets[0].conv_shortcut, encoder.conv_norm_out, encoder.conv_out, count)
    encoder.conv_out.bias[count:] = NARROW
    return _apply(features, weight, bias)


def _start_decoder(vae: VideoVAE, frames: Tensor, latent: Tensor) -> None:
    decoder = vae.decoder
    blocks = _fold(_fold(_fold(frames)))
    # Least squares: every pixel of a block from its latent.
    known = torch.cat([_rows(latent), torch.ones(latent.shape[0] * latent[0, 0].numel(), 1)], dim=1)
    solution = torch.linalg.lstsq(known.double(), _rows(blocks).double()).solution.float()
    weight, bias = solution[:-1].T, solution[-1]
    _set(decoder.conv_in, torch.eye(latent.shape[1]))
    inner = (len(bias) // 4, len(bias) // 16, len(bias) // 64)  # features of one quarter, sixteenth, ... of a block
    for index, (stage, features) in enumerate(zip(decoder.up_blocks[:3], inner, strict=True)):
        if index:
            _set(stage.resnets[0].conv_shortcut, torch.eye(inner[index - 1]))
        _set_up(stage.upsamplers[0], weight, bias)
        weight, bias = torch.eye(features), torch.zeros(features)
    _through_norm(decoder.up_blocks[3].resnets[0].conv_shortcut, decoder.conv_norm_out, decoder.conv_out, 3)


def principal_components(features: Tensor, count: int, whiten: bool = False) -> tuple[Tensor, Tensor]:
    """Weight s k and bias s that map features n k h w to their first `count` components, of unit variance if whitened.

    The mean is removed in any case.
    """
    rows = _rows(features).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    weight = vectors.flip(1)[:, :count].T
    if whiten:
        weight = weight / values.flip(0)[:count, None].clamp(min=1e-6).sqrt()
    return weight.float(), (-weight @ mean).float()


def _fold(features: Tensor) -> Tensor:
    """Blocks of 2 x 2 to features; the first features are those of the upper left."""
    return rearrange(features, "n k (h p) (w q) -> n (p q k) h w", p=2, q=2)


def _rows(features: Tensor) -> Tensor:
    return rearrange(features, "n k h w -> (n h w) k")


def _apply(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("sk,nkhw->nshw", weight, features) + bias[:, None, None]


def _set(conv: nn.Conv3d, weight: Tensor, bias: Tensor | None = None) -> None:
    """The first outputs of a convolution become weight s k times the first inputs, at the same place and time."""
    rows, columns = weight.shape
    conv.weight[:rows] = 0
    centre = (-1, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2)
    conv.weight[:rows, :columns, centre[0], centre[1], centre[2]] = weight
    conv.bias[:rows] = 0 if bias is None else bias


def _set_down(stage: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """The downsampler's first outputs become weight s 4k times the folded first inputs."""
    conv = stage.downsamplers[0].conv
    rows = len(weight)
    conv.weight[:rows] = 0
    # Padded at the bottom and right only, so the taps 0 and 1 are the block of 2 x 2.
    taps = rearrange(weight, "s (p q k) -> s k p q", p=2, q=2)
    conv.weight[:rows, : taps.shape[1], -1, :2, :2] = taps
    conv.bias[:rows] = 0 if bias is None else bias


def _set_up(upsampler: Upsampler, weight: Tensor, bias: Tensor) -> None:
    """The upsampler's first outputs become the unfolded weight 4k s times its first inputs."""
    channels, times = upsampler.conv.in_channels, upsampler.times
    rows = rearrange(weight, "(phase k) s -> phase 1 k s", phase=4)
    k, s = rows.shape[2:]
    phases = upsampler.upscale_conv.weight.view(4, times, channels, channels)
    phases[:, :, :k] = 0
    phases[:, :, :k, :s] = rows
    upsampler.upscale_conv.bias.view(4, times, channels)[:, :, :k] = rearrange(bias, "(phase k) -> phase 1 k", phase=4)
    _set(upsampler.conv, torch.eye(k))


def _through_norm(shortcut: nn.Conv3d, norm: nn.GroupNorm, conv: nn.Conv3d, signals: int) -> None:
    """Carry the first `signals` inputs of `shortcut` past norm and SiLU to the first outputs of `conv`.

    Every signal takes two channels, itself and its negative: silu(s) - silu(-s) = s, and their mean is zero.
    """
    size = norm.num_channels // norm.num_groups
    per_group = math.ceil(signals / norm.num_groups)
    assert 2 * per_group + 2 <= size, "a group needs two channels for each signal and two for the constants"
    for parameter in (shortcut.weight, shortcut.bias, norm.bias, conv.weight[:signals], conv.bias):
        parameter.zero_()
    norm.weight.fill_(math.sqrt((2 * CARRIER**2 + 2 * per_group) / size))
    for signal in range(signals):
        group, place = divmod(signal, per_group)
        positive = group * size + 2 * place
        for channel, sign in ((positive, 1), (positive + 1, -1)):
            shortcut.weight[channel, signal] = sign
            conv.weight[signal, channel, -1, 1, 1] = sign
    for end in range(size, norm.num_channels + 1, size):
        shortcut.bias[end - 2], shortcut.bias[end - 1] = CARRIER, -CARRIER
        norm.weight[end - 2 : end] = 0
