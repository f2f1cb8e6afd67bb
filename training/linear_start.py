"""Start an autoencoder as the best linear codec there is, so that training only has to improve on it.

From random weights a small autoencoder spends thousands of steps finding out what principal component analysis computes
in a second: 16 numbers that describe a block of 8 x 8 pixels of four frames. Here those are written into the weights.
Residual blocks begin as the identity (their second convolution is zero), samplers rearrange pixels and frames, and four
layers do the arithmetic: components of 4 x 4 pixels of two frames, components of those, and the same backwards.

The one obstacle is the GroupNorm before the last convolution of each half: it would normalise the contrast away. Two
constant channels of opposite sign in every group, far larger than the signal, hold its statistics still; training is
free to drop them.

    s signals   k features of a block   c channels   t h w frames, height, width
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


@torch.no_grad()
def start_linear(vae: VideoVAE, clips: Tensor) -> None:
    """Overwrite the weights of a fresh autoencoder, in place.

    Args:
        vae: with four stages and one residual block in an encoder stage.
        clips: n 3 4 H W in -1..1, H and W multiples of 8; a few million pixels to learn the components from. What moves
            in them gets its share of the latent, and none where every clip is a picture four times over.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    for half in (vae.encoder, vae.decoder):
        nn.init.zeros_(half.mid_block.attentions[0].to_out[0].weight)
        nn.init.zeros_(half.mid_block.attentions[0].to_out[0].bias)
    pixels = _fold(_fold(clips), times=2)
    fine = principal_components(pixels, vae.config.widths[1])
    blocks = _fold(_apply(pixels, *fine), times=2)
    coarse = principal_components(blocks, vae.config.latent_channels, whiten=True)
    _start_encoder(vae, fine, coarse)
    # Components that are not whitened are orthonormal, so their transpose is the way back.
    _start_decoder(vae, _least_squares(_apply(blocks, *coarse), blocks), (fine[0].T, _rows(pixels).mean(0)))


def _start_encoder(vae: VideoVAE, fine: tuple[Tensor, Tensor], coarse: tuple[Tensor, Tensor]) -> None:
    """Weight and bias of the components of 4 x 4 pixels of two frames, and of the latent made of those."""
    encoder, count = vae.encoder, vae.config.latent_channels
    first, second, third, fourth = encoder.down_blocks
    _set(encoder.conv_in, torch.eye(3))
    _set_down(first, torch.eye(12))
    _set(second.resnets[0].conv_shortcut, torch.eye(12))
    _set_down(second, *fine)
    _set(third.resnets[0].conv_shortcut, torch.eye(len(fine[0])))
    _set_down(third, *coarse)
    _through_norm(fourth.resnets[0].conv_shortcut, encoder.conv_norm_out, encoder.conv_out, count)
    encoder.conv_out.bias[count:] = NARROW


def _start_decoder(vae: VideoVAE, coarse: tuple[Tensor, Tensor], fine: tuple[Tensor, Tensor]) -> None:
    """Weight and bias from a latent to the components of 4 x 4 pixels of two frames, and from those to pixels."""
    decoder = vae.decoder
    first, second, third, fourth = decoder.up_blocks
    _set(decoder.conv_in, torch.eye(vae.config.latent_channels))
    _set_up(first.upsamplers[0], *coarse)
    _set(second.resnets[0].conv_shortcut, torch.eye(fine[0].shape[1]))
    _set_up(second.upsamplers[0], *fine)
    _set(third.resnets[0].conv_shortcut, torch.eye(12))
    _set_up(third.upsamplers[0], torch.eye(12), torch.zeros(12))
    _through_norm(fourth.resnets[0].conv_shortcut, decoder.conv_norm_out, decoder.conv_out, 3)


def _least_squares(known: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Weight k s and bias k that bring features n s t h w nearest to n k t h w."""
    rows = _rows(known).double()
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    solution = torch.linalg.lstsq(rows, _rows(wanted).double()).solution.float()
    return solution[:-1].T, solution[-1]


def principal_components(features: Tensor, count: int, whiten: bool = False) -> tuple[Tensor, Tensor]:
    """Weight s k and bias s that map features n k t h w to their first `count` components, of unit variance if
    whitened. The mean is removed in any case.
    """
    rows = _rows(features).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    weight = vectors.flip(1)[:, :count].T
    if whiten:
        weight = weight / values.flip(0)[:count, None].clamp(min=1e-6).sqrt()
    return weight.float(), (-weight @ mean).float()


def _fold(features: Tensor, times: int = 1) -> Tensor:
    """Blocks of `times` x 2 x 2 to features; the first are those of the upper left, and there of the first frame."""
    return rearrange(features, "n k (t z) (h p) (w q) -> n (p q z k) t h w", p=2, q=2, z=times)


def _rows(features: Tensor) -> Tensor:
    return rearrange(features, "n k t h w -> (n t h w) k")


def _apply(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("sk,nkthw->nsthw", weight, features) + bias[:, None, None, None]


def _set(conv: nn.Conv3d, weight: Tensor, bias: Tensor | None = None) -> None:
    """The first outputs of a convolution become weight s k times the first inputs, at the same place and time."""
    rows, columns = weight.shape
    conv.weight[:rows] = 0
    centre = (-1, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2)
    conv.weight[:rows, :columns, centre[0], centre[1], centre[2]] = weight
    conv.bias[:rows] = 0 if bias is None else bias


def _set_down(stage: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """The downsampler's first outputs become weight s k times the folded first inputs."""
    conv = stage.downsamplers[0].conv
    times = 2 if stage.downsamplers[0].temporal else 1
    rows = len(weight)
    conv.weight[:rows] = 0
    # Padded at the bottom and right only, so the taps 0 and 1 are the block of 2 x 2; in time the last ones are.
    taps = rearrange(weight, "s (p q z k) -> s k z p q", p=2, q=2, z=times)
    conv.weight[:rows, : taps.shape[1], -times:, :2, :2] = taps
    conv.bias[:rows] = 0 if bias is None else bias


def _set_up(upsampler: Upsampler, weight: Tensor, bias: Tensor) -> None:
    """The upsampler's first outputs become the unfolded weight k s times its first inputs."""
    channels, times = upsampler.conv.in_channels, upsampler.times
    rows = rearrange(weight, "(phase z k) s -> phase z k s", phase=4, z=times)
    k, s = rows.shape[2:]
    phases = upsampler.upscale_conv.weight.view(4, times, channels, channels)
    phases[:, :, :k] = 0
    phases[:, :, :k, :s] = rows
    biases = upsampler.upscale_conv.bias.view(4, times, channels)
    biases[:, :, :k] = rearrange(bias, "(phase z k) -> phase z k", phase=4, z=times)
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
