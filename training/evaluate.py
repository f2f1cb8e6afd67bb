"""How close restored frames come to the originals, and how real they look: metrics that need no weights.

PSNR, SSIM, MS-SSIM and GMSD reward fidelity; LSD and SWD reward realistic texture. One-step models trade one for the
other, so both sides are reported. Every metric takes frames T 3 H W in 0..1, rounds them to 8 bits, as files do, and
is a mean over frames.

    python -m training.evaluate --pred RESTORED --gt ORIGINALS
"""
# T H W frames, height, width   h w the same at a smaller scale

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seedvr2_core.errors import MediaError, SettingError
from seedvr2_core.video.geometry import to_uint8
from training.data import CLIP_SUFFIXES, IMAGE_SUFFIXES, decode, list_media
from training.degradation import NANO, degrade, luma
from training.randomness import key

# Wang et al. 2004: an 11 x 11 Gaussian window of deviation 1.5, and constants for codes 0..255.
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Wang, Simoncelli and Bovik 2003, one exponent a scale, fine to coarse.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# The window has to fit at the coarsest scale.
MS_SSIM_MIN_SIDE = (SSIM_WINDOW - 1) * 2 ** (len(MS_SSIM_WEIGHTS) - 1) + 1
# Xue et al. 2014, for codes 0..255.
GMSD_C = 170.0
# Variance of rounding to 8 bits, in codes: weaker content is not there, and two flat pictures have equal spectra.
ROUNDING_POWER = 1 / 12
SWD_PATCH, SWD_PROJECTIONS, SWD_SCALES, SWD_SEED = 7, 128, 2, 0
# Larger pictures are sampled on a coarser grid of patches.
SWD_MAX_PATCHES = 16384


@dataclass(frozen=True)
class EvalItem:
    """One original: its file name without suffix, and its frames T 3 H W in 0..1."""

    name: str
    frames: Tensor

    def degraded(self) -> Tensor:
        """The input every model is given: float32 T 3 H//4 W//4 in 0..1, damaged by NANO with a seed of the name."""
        return degrade(self.frames, key(0, f"eval/{self.name}"), NANO)[0]


def eval_items(root: Path, side: int | None = None, length: int | None = None) -> Iterator[EvalItem]:
    """The originals in `root/eval/images` and `root/eval/clips`, one at a time, images first.

    Args:
        root: the data folder.
        side: cut a centred square of at most this many pixels; None keeps whole frames.
        length: keep at most this many frames of a clip; None keeps all.

    Raises:
        MediaError: there is nothing to evaluate, or a file cannot be decoded.
    """
    folder = Path(root) / "eval"
    paths = list_media(folder / "images", IMAGE_SUFFIXES) + list_media(folder / "clips", CLIP_SUFFIXES)
    if not paths:
        raise MediaError(f"{folder} holds nothing to evaluate. Expected the folders images and clips in it.")
    for path in paths:
        frames = _read(path)[:length]
        if side is not None:
            top, left = (max(0, (whole - side) // 2) for whole in frames.shape[-2:])
            frames = frames[..., top : top + side, left : left + side]
        yield EvalItem(path.stem, frames)


def measure(pred: Tensor, gt: Tensor) -> dict[str, float]:
    """Every metric that fits: T 3 H W in 0..1, to name -> value. MS-SSIM needs sides of 161 pixels, tp a clip.

    Raises:
        SettingError: the shapes differ, or are not T 3 H W.
    """
    values = {metric.__name__: metric(pred, gt) for metric in (psnr, ssim, gmsd, lsd, swd)}
    if min(gt.shape[-2:]) >= MS_SSIM_MIN_SIDE:
        values["ms_ssim"] = ms_ssim(pred, gt)
    if len(gt) > 1:
        values["temporal_profile"] = temporal_profile(pred, gt)
    return values


def psnr(pred: Tensor, gt: Tensor) -> float:
    """Peak signal to noise ratio over RGB, in dB; infinite for equal frames."""
    pred, gt = _codes(pred, gt)
    error = (pred - gt).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(255**2 / error)).mean())


def ssim(pred: Tensor, gt: Tensor) -> float:
    """Structural similarity, mean over R, G and B; 1 for equal frames. Borders without a whole window do not count."""
    pred, gt = _codes(pred, gt, at_least=SSIM_WINDOW)
    luminance, contrast = _ssim_maps(pred, gt)
    return float((luminance * contrast).mean())


def ms_ssim(pred: Tensor, gt: Tensor) -> float:
    """Multi-scale structural similarity over five scales, mean over R, G and B; 1 for equal frames.

    Raises:
        SettingError: a side is below 161 pixels.
    """
    pred, gt = _codes(pred, gt, at_least=MS_SSIM_MIN_SIDE)
    value = torch.ones(pred.shape[:2], dtype=pred.dtype)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS, start=1):
        luminance, contrast = _ssim_maps(pred, gt)
        coarsest = scale == len(MS_SSIM_WEIGHTS)
        part = (luminance * contrast if coarsest else contrast).mean(dim=(2, 3))
        value *= part.clamp_min(0) ** weight
        pred, gt = F.avg_pool2d(pred, 2), F.avg_pool2d(gt, 2)
    return float(value.mean())


def gmsd(pred: Tensor, gt: Tensor) -> float:
    """Gradient magnitude similarity deviation of luma; 0 for equal frames, lower is better."""
    pred, gt = _codes(pred, gt, at_least=6)
    slopes = [_gradient(F.avg_pool2d(luma(frames), 2)) for frames in (pred, gt)]
    similarity = (2 * slopes[0] * slopes[1] + GMSD_C) / (slopes[0] ** 2 + slopes[1] ** 2 + GMSD_C)
    return float(similarity.flatten(1).std(dim=1, correction=0).mean())


def lsd(pred: Tensor, gt: Tensor) -> float:
    """Log-spectral distance: RMS difference in dB of the radially averaged log power spectra of luma.

    0 for equal frames, lower is better; blur and false texture both raise it, misplaced texture does not.
    """
    pred, gt = _codes(pred, gt, at_least=4)
    difference = _radial_spectrum(pred) - _radial_spectrum(gt)
    return float(difference.square().mean(dim=1).sqrt().mean())


def swd(pred: Tensor, gt: Tensor) -> float:
    """Sliced Wasserstein distance of 7 x 7 mean-removed RGB patches at two scales, in codes of 255.

    The two sets of patches are compared as distributions, on 128 fixed projections; where a patch sits does not count.
    0 for equal frames, lower is better.
    """
    pred, gt = _codes(pred, gt, at_least=SWD_PATCH * 2 ** (SWD_SCALES - 1))
    kernels = _projections()
    total = 0.0
    for _ in range(SWD_SCALES):
        # A frame at a time: the projections of a whole clip would not fit into memory.
        distances = [_sliced_distance(p, g, kernels) for p, g in zip(pred.split(1), gt.split(1), strict=True)]
        total += sum(distances) / len(distances)
        pred, gt = F.avg_pool2d(pred, 2), F.avg_pool2d(gt, 2)
    return total / SWD_SCALES


def temporal_profile(pred: Tensor, gt: Tensor) -> float:
    """Flicker: how differently pixels change from frame to frame, as a mean colour difference (Delta E 1976).

    The profiles are three rows of pixels, at a quarter, half and three quarters of the height, followed over time.
    0 where every change is that of the original; a constant error in colour or detail does not count.

    Raises:
        SettingError: there is only one frame.
    """
    pred, gt = _codes(pred, gt)
    if len(gt) < 2:
        raise SettingError("The temporal profile needs at least 2 frames, got 1; leave it out for images.")
    rows = [gt.shape[-2] * quarter // 4 for quarter in (1, 2, 3)]
    changes = [_lab(frames[:, :, rows] / 255).diff(dim=0) for frames in (pred, gt)]
    return float((changes[0] - changes[1]).norm(dim=1).mean())


def _codes(pred: Tensor, gt: Tensor, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Both as whole codes 0..255, in fp32."""
    if pred.shape != gt.shape or gt.ndim != 4 or gt.shape[1] != 3:
        raise SettingError(f"A metric compares frames T x 3 x H x W of equal shape, got {tuple(pred.shape)} and "
                           f"{tuple(gt.shape)}; crop or resize first.")
    if min(gt.shape[-2:]) < at_least:
        raise SettingError(f"This metric needs sides of at least {at_least} pixels, "
                           f"got {gt.shape[-1]} x {gt.shape[-2]}; leave it out for so small a picture.")
    return to_uint8(pred).float(), to_uint8(gt).float()


def _ssim_maps(pred: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    line = torch.arange(SSIM_WINDOW, dtype=pred.dtype) - SSIM_WINDOW // 2
    window = torch.exp(-(line**2) / (2 * SSIM_SIGMA**2))
    window = (window / window.sum()).expand(3, 1, 1, -1)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window, groups=3), window.transpose(2, 3), groups=3)

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


def _lab(frames: Tensor) -> Tensor:
    """sRGB T 3 H W in 0..1 to CIE L*a*b* under D65."""
    linear = torch.where(frames <= 0.04045, frames / 12.92, ((frames + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
        dtype=frames.dtype,
    )
    white = to_xyz.sum(dim=1)
    x, y, z = (torch.einsum("ij,tjhw->tihw", to_xyz, linear) / white[:, None, None]).unbind(1)

    def response(v: Tensor) -> Tensor:
        return torch.where(v > (6 / 29) ** 3, v ** (1 / 3), v * (29 / 6) ** 2 / 3 + 4 / 29)

    x, y, z = response(x), response(y), response(z)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)


def compare_folders(pred: Path, gt: Path) -> dict[str, dict[str, float]]:
    """Measure every file in gt against the one of the same name, of any suffix, in pred: name -> metric -> value.

    Raises:
        MediaError: gt is empty, or a file is missing or cannot be decoded.
        SettingError: two files differ in size or length.
    """
    suffixes = (*IMAGE_SUFFIXES, *CLIP_SUFFIXES)
    restored = {path.stem: path for path in list_media(pred, suffixes)}
    originals = list_media(gt, suffixes)
    missing = [path.stem for path in originals if path.stem not in restored]
    if not originals or missing:
        raise MediaError(f"{gt} holds {len(originals)} files to compare, of which {pred} lacks {len(missing)}: "
                         f"{', '.join(missing) or 'none'}. Give both folders the same names.")
    return {path.stem: measure(_read(restored[path.stem]), _read(path)) for path in originals}


def _read(path: Path) -> Tensor:
    return torch.tensor(decode(path)).permute(0, 3, 1, 2).float() / 255


def main() -> None:
    """Compare two folders of images and clips; print one JSON line an item, then the means."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=main.__doc__)
    parser.add_argument("--pred", type=Path, required=True, help="restored files")
    parser.add_argument("--gt", type=Path, required=True, help="originals of the same names")
    options = parser.parse_args()
    results = compare_folders(options.pred, options.gt)
    for name, values in results.items():
        print(json.dumps({"name": name, **values}))
    print(json.dumps({"name": "mean", "items": len(results), "torch": torch.__version__, **means(results)}))


def means(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the items that have it."""
    names = dict.fromkeys(name for values in results.values() for name in values)
    columns = {name: [values[name] for values in results.values() if name in values] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}


if __name__ == "__main__":
    main()
