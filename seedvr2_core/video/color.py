"""Colour transfer from the input clip to the restored one; COLOR_METHODS.

The functions below state each formula on whatever frames they are given. `ColorTransfer` applies them to a clip of any
length, piece by piece, with statistics that neither jump from frame to frame nor depend on where the clip was cut.
Source: spec of the published flow (wavelet, AdaIN: StableSR) and of the community node (LAB, HSV, adaptive).
"""

# T H W frames, height, width   c = 3: R G B, or L a b, or hue saturation value   n pixels of one population
# Clips are T 3 H W, -1..1; "rgb" is 0..1. Everything is fp32: half precision shows as banding.

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingError

# What a user can choose, the published default first.
COLOR_METHODS = ("wavelet", "lab", "adain", "hsv", "wavelet_adaptive", "none")

# Blur radii, in pixels. Together they reach 31 pixels.
RADII = (1, 2, 4, 8, 16)
HUE_BINS = 12
# A hue with fewer pixels than this has no distribution to speak of.
FEW_PIXELS = 100

# Frames over which statistics are averaged: half a second of film, long enough to hide grain and key frames.
MEMORY = 12
# Knots of a transfer curve.
KNOTS = 1024
# Pixels of a frame that are sorted to find those knots; evenly spread if there are more.
SAMPLES = 2**18
# Where every pixel is on its own a frame is computed in at most so many parts, of no fewer than so many pixels.
BANDS, BAND = 8, 2**16
# Change of mean and spread between two frames of the input, in units of -1..1, that makes a cut.
CUT = 0.1

EMPTY: Mapping[Hashable, Any] = MappingProxyType({})

# Replaces values by values of a reference population of the same name: (values n, reference m, name, enough) -> n.
Match = Callable[[Tensor, Tensor, Hashable, bool], Tensor]


class ColorTransfer:
    """Gives restored frames the colours of the input, over one clip handed in as successive pieces.

    Frames are taken one at a time. Each takes its level (mean) from its own input frame, so flashes and fades arrive on
    time, and the shape of its transfer curve from a running average since the last cut, so that it does not pump. The
    result is the same for every way to cut the clip, and memory does not grow with it. The first frame of a shot, or a
    single image, gets the plain formula: AdaIN to rounding, histogram curves to about 1/1024 of their range.
    """

    def __init__(self, method: str) -> None:
        """Raises SettingError for a name that is not in COLOR_METHODS."""
        if method not in COLOR_METHODS:
            raise SettingError(f"There is no colour method {method!r}; choose one of {', '.join(COLOR_METHODS)}.")
        self.method = method
        self._shot = _Shot()

    def __call__(self, content: Tensor, style: Tensor) -> Tensor:
        """Correct the next frames of the clip.

        Args:
            content: restored frames, T 3 H W, -1..1.
            style: the same frames of the input, resized to the same T 3 H W, -1..1.

        Returns the corrected frames in fp32, about -1..1: not all methods clamp.
        """
        result = torch.empty(content.shape, dtype=torch.float32, device=content.device)
        for t in range(len(content)):
            result[t : t + 1] = self._frame(content[t : t + 1].float(), style[t : t + 1].float())
        return result

    @property
    def state(self) -> dict[str, Any]:
        """Tensors, in dictionaries, on which the frames to come depend."""
        return self._shot.state()

    def resume(self, state: dict[str, Any]) -> None:
        """Go on after frames that another has corrected, whose `state` this was."""
        self._shot = _Shot(**state)

    def _frame(self, content: Tensor, style: Tensor) -> Tensor:
        if self.method in ("lab", "adain", "hsv", "wavelet_adaptive"):
            self._shot.look_at(style)
        match self.method:
            case "wavelet":
                return wavelet(content, style)
            case "lab":
                return lab(content, style, match=self._shot.match)
            case "adain":
                return self._shot.adain(content, style)
            case "hsv":
                return hsv(content, style, match=self._shot.match)
            case "wavelet_adaptive":
                return wavelet_adaptive(content, style, match=self._shot.match)
        return content


class _Shot:
    """Running averages since the last cut. Whether there was one stays on the device, so that nobody waits for it."""

    def __init__(
        self,
        look: Tensor | None = None,
        cut: Tensor | None = None,  # whether the frame at hand begins a shot
        averages: Mapping[Hashable, Tensor] = EMPTY,
        seen: Mapping[Hashable, Tensor] = EMPTY,
        levels: Mapping[Hashable, tuple[Tensor, Tensor]] = EMPTY,
    ) -> None:
        self._look, self._cut = look, cut
        self._averages, self._seen, self._levels = dict(averages), dict(seen), dict(levels)

    def state(self) -> dict[str, Any]:
        # Copies of the dictionaries only: no tensor in them ever changes.
        averages, seen, levels = dict(self._averages), dict(self._seen), dict(self._levels)
        return {"look": self._look, "cut": self._cut, "averages": averages, "seen": seen, "levels": levels}

    def look_at(self, style: Tensor) -> None:
        """The next input frame: a shot ends where it looks different."""
        look = torch.stack(_moments(style))
        before = look if self._look is None else self._look
        # Distance between two normal distributions, per channel.
        self._look, self._cut = look, (look - before).norm(dim=0).max() > CUT

    def average(self, name: Hashable, value: Tensor) -> Tensor:
        """Plain mean of what was given under this name, turning into an exponential one after MEMORY frames."""
        if name not in self._seen:
            self._seen[name], self._averages[name] = torch.ones_like(self._cut, dtype=torch.long), value
            return value
        seen = self._seen[name] = self._seen[name].masked_fill(self._cut, 0) + 1
        mean = torch.where(self._cut, value, self._averages[name])
        self._averages[name] = mean + (value - mean) / seen.clamp_max(MEMORY)
        return self._averages[name]

    def adain(self, content: Tensor, style: Tensor) -> Tensor:
        """`adain` with the means of this frame and averaged spreads."""
        (content_mean, content_spread), (style_mean, style_spread) = _moments(content), _moments(style)
        content_spread, style_spread = self.average("spread", torch.stack([content_spread, style_spread]))
        return (content - content_mean) / content_spread * style_spread + style_mean

    def match(self, values: Tensor, reference: Tensor, name: Hashable, enough: bool = True) -> Tensor:
        """`match_ranks` with the means of this frame and averaged quantiles.

        The average of quantile functions is the Wasserstein barycentre of their distributions: a mean of curves that
        stays a curve. A population too small to look at (not `enough`) goes on with the curve it had.
        """
        if enough:
            values_level, reference_level = self._levels[name] = values.mean(), reference.mean()
            self.average(name, torch.stack([_knots(values) - values_level, _knots(reference) - reference_level]))
        elif name in self._levels and self._cut:
            for kept in (self._levels, self._averages, self._seen):
                del kept[name]
        if name not in self._levels:
            return values
        values_level, reference_level = self._levels[name]
        source, reference = _curve(*self._averages[name])
        parts = values.split(max(BAND, -(-len(values) // BANDS)))
        return torch.cat([_follow(part - values_level, source, reference) + reference_level for part in parts])


def _knots(values: Tensor) -> Tensor:
    """Quantiles of n values at KNOTS ranks, dense at both ends so that highlights and shadows keep theirs."""
    count = min(len(values), SAMPLES)
    # A step that is no whole number of pixels never falls into step with rows or with 8 x 8 blocks.
    taken = torch.arange(count, device=values.device) * (len(values) - 1) // max(1, count - 1)
    thinned = values[taken].sort().values
    ranks = (1 - torch.cos(torch.linspace(0, math.pi, KNOTS, device=values.device))) / 2 * (count - 1)
    below = ranks.long().clamp_max(max(0, count - 2))
    return torch.lerp(thinned[below], thinned[(below + 1).clamp_max(count - 1)], ranks - below)


def _curve(source: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Knots to follow. Those of a flat area (nearly) coincide and would tear a curve; they share the middle one."""
    near = (source[-1] - source[0]) / KNOTS
    first, last = torch.searchsorted(source, source - near), torch.searchsorted(source, source + near, right=True) - 1
    middle = (first + last) // 2
    return source[middle], reference[middle]


def _follow(values: Tensor, source: Tensor, reference: Tensor) -> Tensor:
    """Values n on the curve through the knots (source, reference), continued beyond its ends with slope 1."""
    inside = values.clamp(source[0], source[-1])
    above = torch.searchsorted(source, inside).clamp_min(1)
    below = above - 1
    share = (inside - source[below]) / (source[above] - source[below]).clamp_min(1e-12)
    return torch.lerp(reference[below], reference[above], share) + (values - inside)


# The formulas


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    """Coarse colours of the style, fine detail of the content: content - low(content) + low(style), not clamped."""
    return _by_channel(lambda content, style: content - low_band(content) + low_band(style), content, style)


def capped_wavelet(content: Tensor, style: Tensor) -> Tensor:
    """`wavelet` with radii up to an eighth of the shorter side, clamped to -1..1: the community node's form."""
    limit = max(1, min(content.shape[-2:]) // 8)

    def corrected(content: Tensor, style: Tensor) -> Tensor:
        return (content - low_band(content, limit) + low_band(style, limit)).clamp(-1, 1)

    return _by_channel(corrected, content, style)


def _by_channel(formula: Callable[[Tensor, Tensor], Tensor], content: Tensor, style: Tensor) -> Tensor:
    """A formula that looks at one channel at a time, T 1 H W: it takes a third of the memory on its way."""
    result = torch.empty_like(content)
    for c in range(content.shape[1]):
        result[:, c : c + 1] = formula(content[:, c : c + 1], style[:, c : c + 1])
    return result


def _in_bands(formula: Callable[[Tensor], Tensor], clip: Tensor) -> Tensor:
    """A formula that looks at one pixel at a time, T 3 H W: a band of rows takes little memory on its way."""
    height, width = clip.shape[-2:]
    rows = max(-(-height // BANDS), BAND // width, 1)
    return torch.cat([formula(band) for band in clip.split(rows, dim=-2)], dim=-2)


def low_band(x: Tensor, max_radius: int = RADII[-1]) -> Tensor:
    """T 3 H W blurred by (1 2 1)/4 in both directions, at every radius in turn, borders repeated."""
    height, width = x.shape[-2:]
    for radius in RADII:
        r = min(radius, max_radius)
        padded = F.pad(x, (r, r, r, r), mode="replicate")
        # Written out: a convolution is slower on a CPU and may run in TF32, which has 10 bits, on a GPU.
        x = torch.zeros_like(x)
        for row, row_weight in enumerate((0.25, 0.5, 0.25)):
            for column, column_weight in enumerate((0.25, 0.5, 0.25)):
                shifted = padded[..., row * r : row * r + height, column * r : column * r + width]
                x.add_(shifted, alpha=row_weight * column_weight)
    return x


def adain(content: Tensor, style: Tensor) -> Tensor:
    """Per frame and channel, mean and standard deviation of the style; not clamped."""
    (content_mean, content_spread), (style_mean, style_spread) = _moments(content), _moments(style)
    return (content - content_mean) / content_spread * style_spread + style_mean


def _moments(clip: Tensor) -> tuple[Tensor, Tensor]:
    # Unbiased, unless there is one pixel only.
    correction = min(1, clip.shape[-2] * clip.shape[-1] - 1)
    variance, mean = torch.var_mean(clip, dim=(-2, -1), correction=correction, keepdim=True)
    return mean, (variance + 1e-5).sqrt()


def match_ranks(values: Tensor, reference: Tensor, name: Hashable = None, enough: bool = True) -> Tensor:
    """The k-th smallest of the values becomes the k-th smallest of the reference: the meaning of every histogram match.

    `name` is of no use here; without `enough` pixels the values come back as they are. See `Match`.
    """
    if not enough:
        return values
    ranks = torch.arange(len(values), device=values.device) * max(0, len(reference) - 1) // max(1, len(values) - 1)
    matched = torch.empty_like(values)
    matched[values.argsort()] = reference.sort().values[ranks]
    return matched


def lab(content: Tensor, style: Tensor, match: Match = match_ranks, lightness_kept: float = 1) -> Tensor:
    """`capped_wavelet`, then the histograms of a and b of the style; clamped to -1..1.

    Args:
        match: what matches a channel. The default takes all pixels of all frames for one population.
        lightness_kept: share of the wavelet's lightness that stays, 0..1; the rest follows the histogram of the style.
            The community node has 0.8: of a blurred style that takes back contrast that was just restored.
    """
    base = _in_bands(_to_lab, capped_wavelet(content, style))
    target = _in_bands(_to_lab, style)
    for c, kept in enumerate((lightness_kept, 0, 0)):
        if kept < 1:
            matched = match(base[:, c].flatten(), target[:, c].flatten(), c, True).view(base[:, c].shape)
            base[:, c].lerp_(matched, 1 - kept)
    del target
    return _in_bands(_from_lab, base)


def hsv(content: Tensor, style: Tensor, match: Match = match_ranks) -> Tensor:
    """Saturations of the style, hue by hue; hue and value of the content stay. Clamped to -1..1.

    Args:
        match: what matches the saturations of one hue bin, see `lab`.
    """
    h, s, v = _in_bands(_to_hsv, content).unbind(1)
    style_h, style_s, _ = _in_bands(_to_hsv, style).unbind(1)
    matched = s.clone()
    for i in range(HUE_BINS):
        here, there = _in_hue_bin(h, i), _in_hue_bin(style_h, i)
        source, reference = s[here], style_s[there]
        matched[here] = match(source, reference, i, min(len(source), len(reference)) > FEW_PIXELS)
    return _in_bands(_from_hsv, torch.stack([h, matched.clamp(0, 1), v], dim=1))


def _in_hue_bin(hue: Tensor, i: int) -> Tensor:
    inside = (hue >= i / HUE_BINS) & (hue < (i + 1) / HUE_BINS)
    # Red wraps around: the first bin takes the last one's pixels too, unless the last one has its own say later.
    return inside | (hue >= 1 - 1 / HUE_BINS) if i == 0 else inside


def wavelet_adaptive(content: Tensor, style: Tensor, match: Match = match_ranks) -> Tensor:
    """`capped_wavelet`, but `hsv` where content and wavelet are more saturated than the style; not clamped."""
    smooth, toned = capped_wavelet(content, style), hsv(content, style, match)
    content_s, style_s, smooth_s = (_saturation(_rgb(clip)) for clip in (content, style, smooth))
    share = torch.sigmoid(5 * (content_s - style_s - 0.15)) * (smooth_s - style_s > 0.075)
    return torch.lerp(smooth, toned, share)


# Colour spaces

# sRGB primaries, D65 white, CIE 1931, as the node has them.
RGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
XYZ_TO_RGB = (
    (3.2404542, -1.5371385, -0.4985314), (-0.9692660, 1.8760108, 0.0415560), (0.0556434, -0.2040259, 1.0572252)
)
WHITE = (0.95047, 1.0, 1.08883)
# The cube root of CIE L*a*b* turns into a line below LINEAR^3, of this slope.
LINEAR = 6 / 29
SLOPE = (29 / 3) ** 3


def _rgb(clip: Tensor) -> Tensor:
    return ((clip + 1) / 2).clamp(0, 1)


# Between clips and the other spaces.


def _to_lab(clip: Tensor) -> Tensor:
    return rgb_to_lab(_rgb(clip))


def _from_lab(lab: Tensor) -> Tensor:
    return lab_to_rgb(lab) * 2 - 1


def _to_hsv(clip: Tensor) -> Tensor:
    return rgb_to_hsv(_rgb(clip))


def _from_hsv(hsv: Tensor) -> Tensor:
    return hsv_to_rgb(hsv).clamp(0, 1) * 2 - 1


def _mixed(x: Tensor, matrix: tuple[tuple[float, ...], ...]) -> list[Tensor]:
    # Written out: a matrix product may run in TF32, and constants in a tensor make the host wait for the device.
    first, second, third = x.unbind(1)
    return [a * first + b * second + c * third for a, b, c in matrix]


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB T 3 H W, 0..1, to L 0..100, a and b about -128..127."""
    light = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    planes = _mixed(light, RGB_TO_XYZ)
    xyz = torch.stack([plane / white for plane, white in zip(planes, WHITE, strict=True)], dim=1)
    x, y, z = torch.where(xyz > LINEAR**3, xyz ** (1 / 3), (SLOPE * xyz + 16) / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """L a b T 3 H W to sRGB, clamped to 0..1."""
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16) / 116
    f = torch.stack([a / 500 + y, y, y - b / 200], dim=1)
    xyz = torch.where(f > LINEAR, f**3, (116 * f - 16) / SLOPE)
    for c, white in enumerate(WHITE):
        xyz[:, c] *= white
    light = torch.stack(_mixed(xyz, XYZ_TO_RGB), dim=1)
    rgb = torch.where(light > 0.0031308, 1.055 * light.clamp_min(0) ** (1 / 2.4) - 0.055, 12.92 * light)
    return rgb.clamp(0, 1)


def rgb_to_hsv(rgb: Tensor) -> Tensor:
    """RGB T 3 H W, 0..1, to hue 0..1 (1 excluded), saturation and value 0..1, by the hexcone."""
    red, green, blue = rgb.unbind(1)
    value, chroma = rgb.amax(1), rgb.amax(1) - rgb.amin(1)
    divisor = chroma.clamp_min(1e-10)
    sixths = torch.where(
        value == red, (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = torch.where(chroma > 0, sixths / 6 % 1, torch.zeros_like(value))
    return torch.stack([hue, _saturation(rgb)[:, 0], value], dim=1)


def _saturation(rgb: Tensor) -> Tensor:
    value = rgb.amax(1, keepdim=True)
    return torch.where(value > 1e-10, (value - rgb.amin(1, keepdim=True)) / value.clamp_min(1e-10), 0)


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """Hue, saturation and value T 3 H W to RGB, 0..1."""
    h, s, v = hsv.split(1, dim=1)
    # How far each primary is from the hue, in sixths of the circle.
    sixths = (h * 6 + h.new_tensor([5, 3, 1]).view(3, 1, 1)) % 6
    return v - v * s * torch.minimum(sixths, 4 - sixths).clamp(0, 1)
