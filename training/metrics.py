"""How close restored frames come to the originals, and how real they look: metrics that need no weights.

PSNR, SSIM, MS-SSIM and GMSD reward fidelity; LSD and SWD reward realistic texture. One-step models trade one for the
other, so both sides are reported. The temporal profile and the warping error tell how steady a clip is.

Every function is pure. It takes frames T 3 H W, either in 0..1, which it rounds to 8 bits as files do, or as uint8
codes, and is a mean over frames.
"""
# T H W frames, height, width   h w the same at a smaller scale   c channels: 3 in RGB, 1 in Y

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seedvr2_core.errors import SettingError
from seedvr2_core.video.color import rgb_to_lab
from seedvr2_core.video.geometry import to_uint8

from .degradation import luma

Plane = Literal["rgb", "y"]

# Wang et al. 2004: an 11 x 11 Gaussian window of deviation 1.5, and constants for codes 0..255.
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Wang, Simoncelli and Bovik 2003, one exponent a scale, fine to coarse.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# The window has to fit at the coarsest scale.
MS_SSIM_MIN_SIDE = (SSIM_WINDOW - 1) * 2 ** (len(MS_SSIM_WEIGHTS) - 1) + 1
# Xue et al. 2014, for codes 0..255.
GMSD_C = 170.0
GMSD_MIN_SIDE = 6
# Variance of rounding to 8 bits, in codes: weaker content is not there, and two flat pictures have equal spectra.
ROUNDING_POWER = 1 / 12
LSD_MIN_SIDE = 4
SWD_PATCH, SWD_PROJECTIONS, SWD_SCALES, SWD_SEED = 7, 128, 2, 0
SWD_MIN_SIDE = SWD_PATCH * 2 ** (SWD_SCALES - 1)
# Larger pictures are sampled on a coarser grid of patches.
SWD_MAX_PATCHES = 16384
# The Y of BT.601 in codes 16..235, as papers on super-resolution measure it, from RGB in codes 0..255.
Y_WEIGHTS, Y_OFFSET = (65.481 / 255, 128.553 / 255, 24.966 / 255), 16.0
# Sundaram, Brox and Keutzer 2010: a flow that its reverse does not undo, beyond this share and floor, is occluded.
OCCLUSION_SHARE, OCCLUSION_FLOOR = 0.01, 0.5


def psnr(pred: Tensor, gt: Tensor, plane: Plane = "rgb") -> float:
    """Peak signal to noise ratio, in dB, with a peak of 255 in both planes; infinite where a frame is equal."""

    def of_frame(p: Tensor, g: Tensor) -> float:
        error = (p - g).square().mean()
        return float(10 * torch.log10(255**2 / error))

    return _mean(of_frame, pred, gt, plane)


def ssim(pred: Tensor, gt: Tensor, plane: Plane = "rgb") -> float:
    """Structural similarity, mean over the channels; 1 for equal frames. Borders without a whole window are out."""

    def of_frame(p: Tensor, g: Tensor) -> float:
        luminance, contrast = _ssim_maps(p, g)
        return float((luminance * contrast).mean())

    return _mean(of_frame, pred, gt, plane, at_least=SSIM_WINDOW)


def ms_ssim(pred: Tensor, gt: Tensor, plane: Plane = "rgb") -> float:
    """Multi-scale structural similarity over five scales, mean over the channels; 1 for equal frames.

    Raises:
        SettingError: a side is below 161 pixels.
    """

    def of_frame(p: Tensor, g: Tensor) -> float:
        value = torch.ones(p.shape[:2], dtype=p.dtype)
        for scale, weight in enumerate(MS_SSIM_WEIGHTS, start=1):
            luminance, contrast = _ssim_maps(p, g)
            coarsest = scale == len(MS_SSIM_WEIGHTS)
            part = (luminance * contrast if coarsest else contrast).mean(dim=(2, 3))
            value *= part.clamp_min(0) ** weight
            p, g = F.avg_pool2d(p, 2), F.avg_pool2d(g, 2)
        return float(value.mean())

    return _mean(of_frame, pred, gt, plane, at_least=MS_SSIM_MIN_SIDE)


def gmsd(pred: Tensor, gt: Tensor) -> float:
    """Gradient magnitude similarity deviation of luma; 0 for equal frames, lower is better."""

    def of_frame(p: Tensor, g: Tensor) -> float:
        p, g = (_gradient(F.avg_pool2d(luma(frame), 2)) for frame in (p, g))
        similarity = (2 * p * g + GMSD_C) / (p**2 + g**2 + GMSD_C)
        return float(similarity.std(correction=0))

    return _mean(of_frame, pred, gt, at_least=GMSD_MIN_SIDE)


def lsd(pred: Tensor, gt: Tensor) -> float:
    """Log-spectral distance: RMS difference in dB of the radially averaged log power spectra of luma.

    0 for equal frames, lower is better; blur and false texture both raise it, misplaced texture does not.
    """

    def of_frame(p: Tensor, g: Tensor) -> float:
        return float((_radial_spectrum(p) - _radial_spectrum(g)).square().mean().sqrt())

    return _mean(of_frame, pred, gt, at_least=LSD_MIN_SIDE)


def swd(pred: Tensor, gt: Tensor) -> float:
    """Sliced Wasserstein distance of 7 x 7 mean-removed RGB patches at two scales, in codes of 255.

    The two sets of patches are compared as distributions, on 128 fixed projections; where a patch sits does not count.
    0 for equal frames, lower is better.
    """
    kernels = _projections()

    def of_frame(p: Tensor, g: Tensor) -> float:
        total = 0.0
        for _ in range(SWD_SCALES):
            total += _sliced_distance(p, g, kernels)
            p, g = F.avg_pool2d(p, 2), F.avg_pool2d(g, 2)
        return total / SWD_SCALES

    return _mean(of_frame, pred, gt, at_least=SWD_MIN_SIDE)


def temporal_profile(pred: Tensor, gt: Tensor) -> float:
    """Flicker: how differently pixels change from frame to frame, as a mean colour difference (Delta E 1976).

    The profiles are three rows of pixels, at a quarter, half and three quarters of the height, followed over time.
    0 where every change is that of the original; a constant error in colour or detail does not count.

    Raises:
        SettingError: there is only one frame.
    """
    _check(pred, gt)
    if len(gt) < 2:
        raise SettingError("The temporal profile needs at least 2 frames, got 1; leave it out for images.")
    rows = [gt.shape[-2] * quarter // 4 for quarter in (1, 2, 3)]
    changes = [rgb_to_lab(_codes(frames[:, :, rows]) / 255).diff(dim=0) for frames in (pred, gt)]
    return float((changes[0] - changes[1]).norm(dim=1).mean())


# Flow from frame i to frame j of a clip: 2 H W, in pixels, x before y. What is at p in frame i is at p + flow in j.
Flow = Callable[[int, int], Tensor]


def warp_error(frames: Tensor, flow: Flow) -> float:
    """Mean squared difference, in 0..1 squared and times 1000, between a frame and the next one warped back to it.

    Pixels that are hidden in the next frame, or move out of it, do not count. Lower is steadier: a still picture has 0,
    and blur wins against detail, so it is reported and never decides anything.

    Args:
        frames: the clip that is judged.
        flow: its motion; exact where the motion is known, else estimated, best on the original frames.

    Raises:
        SettingError: there is only one frame.

    Source: Lai et al., arXiv 1808.00449, section 4; occlusions by the consistency of forward and backward flow.
    """
    if len(frames) < 2:
        raise SettingError("The warping error needs at least 2 frames, got 1; leave it out for images.")
    errors = []
    for index in range(len(frames) - 1):
        forward, backward = flow(index, index + 1), flow(index + 1, index)
        here, there = (_codes(frames[i : i + 1]) / 255 for i in (index, index + 1))
        warped, inside = warp(there, forward)
        returned, _ = warp(backward[None], forward)
        bound = OCCLUSION_SHARE * (forward.square().sum(0) + returned.square().sum(1)) + OCCLUSION_FLOOR
        seen = inside & ((forward + returned[0]).square().sum(0) < bound[0])
        if seen.any():
            errors.append(float((warped - here).square().mean(1)[0][seen].mean()))
    if not errors:
        raise SettingError("The warping error has nothing to compare: by its flow, no pixel is seen in two frames.")
    return 1000 * sum(errors) / len(errors)


def warp(frame: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Fetch frame 1 c H W at p + flow for every pixel p: 1 c H W, and H W, whether that lies inside the frame."""
    h, w = frame.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    x, y = x + flow[0], y + flow[1]
    grid = torch.stack(((2 * x + 1) / w - 1, (2 * y + 1) / h - 1), dim=-1)[None]
    inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
    return F.grid_sample(frame, grid, mode="bilinear", padding_mode="border", align_corners=False), inside


def _mean(
    of_frame: Callable[[Tensor, Tensor], float], pred: Tensor, gt: Tensor, plane: Plane = "rgb", at_least: int = 1
) -> float:
    """The mean of a metric over pairs of frames 1 c H W, in codes 0..255 and fp32; one pair is in memory at a time."""
    values = [of_frame(p, g) for p, g in _pairs(pred, gt, plane, at_least)]
    return sum(values) / len(values)


def _pairs(pred: Tensor, gt: Tensor, plane: Plane, at_least: int) -> Iterator[tuple[Tensor, Tensor]]:
    _check(pred, gt, at_least)
    for pair in zip(pred.split(1), gt.split(1), strict=True):
        codes = [_codes(frame) for frame in pair]
        yield tuple(codes if plane == "rgb" else map(to_y, codes))


def _check(pred: Tensor, gt: Tensor, at_least: int = 1) -> None:
    if pred.shape != gt.shape or gt.ndim != 4 or gt.shape[1] != 3 or not len(gt):
        raise SettingError(f"A metric compares frames T x 3 x H x W of equal shape, got {tuple(pred.shape)} and "
                           f"{tuple(gt.shape)}; crop or resize first.")
    if min(gt.shape[-2:]) < at_least:
        raise SettingError(f"This metric needs sides of at least {at_least} pixels, "
                           f"got {gt.shape[-1]} x {gt.shape[-2]}; leave it out for so small a picture.")


def _codes(frames: Tensor) -> Tensor:
    """Whole codes 0..255, in fp32."""
    return (to_uint8(frames) if frames.is_floating_point() else frames).float()


def to_y(codes: Tensor) -> Tensor:
    """The Y of BT.601, codes 16..235, of RGB in codes 0..255: n 3 H W to n 1 H W."""
    weights = torch.tensor(Y_WEIGHTS, dtype=codes.dtype)
    return torch.einsum("c,nchw->nhw", weights, codes)[:, None] + Y_OFFSET


def _ssim_maps(pred: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    c = pred.shape[1]
    line = torch.arange(SSIM_WINDOW, dtype=pred.dtype) - SSIM_WINDOW // 2
    window = torch.exp(-(line**2) / (2 * SSIM_SIGMA**2))
    window = (window / window.sum()).expand(c, 1, 1, -1)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window, groups=c), window.transpose(2, 3), groups=c)

    mean_p, mean_g = blur(pred), blur(gt)
    var_p, var_g = blur(pred * pred) - mean_p**2, blur(gt * gt) - mean_g**2
    covariance = blur(pred * gt) - mean_p * mean_g
    luminance = (2 * mean_p * mean_g + SSIM_C1) / (mean_p**2 + mean_g**2 + SSIM_C1)
    return luminance, (2 * covariance + SSIM_C2) / (var_p + var_g + SSIM_C2)


def _gradient(plane: Tensor) -> Tensor:
    prewitt = torch.tensor([[1.0, 0, -1]] * 3, dtype=plane.dtype) / 3
    return F.conv2d(plane, torch.stack((prewitt, prewitt.T))[:, None], padding=1).norm(dim=1)


def _radial_spectrum(frames: Tensor) -> Tensor:
    """Mean log power in dB for each ring of spatial frequency, without the mean: T rings."""
    plane = luma(frames)[:, 0]
    h, w = plane.shape[-2:]
    # A Hann window, or the step from one border to the opposite one would look like texture.
    window = torch.outer(*(torch.hann_window(side, periodic=False, dtype=plane.dtype) for side in (h, w)))
    plane = (plane - plane.mean(dim=(1, 2), keepdim=True)) * window
    power = torch.fft.fft2(plane).abs().square() / window.square().sum()
    decibel = 10 * torch.log10(power + ROUNDING_POWER)
    down, across = (torch.fft.fftfreq(side, dtype=plane.dtype) for side in (h, w))
    radius = torch.hypot(down[:, None], across[None])
    rings = min(h, w) // 2
    # Ring 0 is the mean; the corners beyond half a cycle a pixel are left out, as not every direction reaches them.
    ring = (radius * 2 * rings).round().long().flatten().clamp_max(rings + 1)
    sums = torch.zeros(len(plane), rings + 2, dtype=plane.dtype).index_add_(1, ring, decibel.flatten(1))
    counts = torch.bincount(ring, minlength=rings + 2)
    return (sums / counts.clamp_min(1))[:, 1 : rings + 1]


def _projections() -> Tensor:
    generator = torch.Generator().manual_seed(SWD_SEED)
    kernels = torch.randn(SWD_PROJECTIONS, 3, SWD_PATCH, SWD_PATCH, generator=generator)
    # Projecting on a direction without a mean is removing the mean of the patch.
    kernels -= kernels.mean(dim=(2, 3), keepdim=True)
    return kernels / kernels.flatten(1).norm(dim=1)[:, None, None, None]


def _sliced_distance(pred: Tensor, gt: Tensor, kernels: Tensor) -> float:
    patches = math.prod(side - SWD_PATCH + 1 for side in gt.shape[-2:])
    stride = max(1, math.ceil(math.sqrt(patches / SWD_MAX_PATCHES)))
    # NumPy sorts fp32 with vector instructions, several times faster than torch on a CPU.
    lines = [np.sort(F.conv2d(frame, kernels, stride=stride)[0].flatten(1).numpy(), axis=1) for frame in (pred, gt)]
    return float(np.abs(lines[0] - lines[1]).mean())


# A metric at work: (restored, original) to its value. The original is None for what needs none.
Measure = Callable[[Tensor, Tensor | None], float]


@dataclass(frozen=True)
class Opened:
    """A metric that is ready, and what it is made of."""

    measure: Measure
    made_of: Mapping[str, str] = field(default_factory=dict)  # libraries and weights, for the record


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A name, and what one has to know to use it."""

    name: str
    better: Literal["higher", "lower"]
    open: Callable[[torch.device], Opened]
    reference: bool = True  # compares with an original
    min_frames: int = 1
    min_side: int = 1
    decimals: int = 3

    def fits(self, frames: Tensor, reference: bool) -> bool:
        """Whether it has a value for frames T 3 H W that do, or do not, come with an original."""
        return (reference or not self.reference) and len(frames) >= self.min_frames and (
            min(frames.shape[-2:]) >= self.min_side
        )


def _ready(measure: Measure) -> Callable[[torch.device], Opened]:
    return lambda device: Opened(measure)


# Always there. Their order is that of the tables.
PANEL = (
    Metric(name="psnr", better="higher", open=_ready(psnr), decimals=2),
    Metric(name="psnr_y", better="higher", open=_ready(partial(psnr, plane="y")), decimals=2),
    Metric(name="ssim", better="higher", open=_ready(ssim), min_side=SSIM_WINDOW),
    Metric(name="ssim_y", better="higher", open=_ready(partial(ssim, plane="y")), min_side=SSIM_WINDOW),
    Metric(name="ms_ssim", better="higher", open=_ready(ms_ssim), min_side=MS_SSIM_MIN_SIDE),
    Metric(name="ms_ssim_y", better="higher", open=_ready(partial(ms_ssim, plane="y")), min_side=MS_SSIM_MIN_SIDE),
    Metric(name="gmsd", better="lower", open=_ready(gmsd), min_side=GMSD_MIN_SIDE),
    Metric(name="lsd", better="lower", open=_ready(lsd), min_side=LSD_MIN_SIDE, decimals=2),
    Metric(name="swd", better="lower", open=_ready(swd), min_side=SWD_MIN_SIDE, decimals=2),
    Metric(name="temporal_profile", better="lower", open=_ready(temporal_profile), min_frames=2, decimals=2),
)


def measure(pred: Tensor, gt: Tensor) -> dict[str, float]:
    """The value of every metric of the panel that fits: restored and original T 3 H W, to name -> value.

    MS-SSIM needs sides of 161 pixels, the temporal profile a clip.

    Raises:
        SettingError: the shapes differ, or are not T 3 H W.
    """
    _check(pred, gt)
    cpu = torch.device("cpu")
    return {metric.name: metric.open(cpu).measure(pred, gt) for metric in PANEL if metric.fits(gt, reference=True)}


def means(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the items that have it."""
    names = dict.fromkeys(name for values in results.values() for name in values)
    columns = {name: [values[name] for values in results.values() if name in values] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}
