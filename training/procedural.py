"""Seeded pictures that need no data set: dead leaves with textured fills, glyphs, gradients and gratings.

Their edges are sharper and their textures more regular than a photograph's, and there is no end to them.
"""
# H W frame height, width   c channels, last

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from .randomness import rng

# Shapes are drawn at twice the size and averaged down, which gives them clean edges.
SUPERSAMPLE = 2
# Shares of the side. Radii follow r**-3, the law that gives natural image statistics (Lee, Mumford and Huang, 2001).
LEAF_RADII = (0.02, 0.3)
LEAVES = 450
GLYPH_SHARE = 0.5
GLYPHS = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz0123456789&@#%?!+-=/()"


def still(seed: int, index: int, size: int) -> np.ndarray:
    """Draw one picture: uint8, size x size x 3, the same for the same (seed, index, size)."""
    draw = rng(seed, "procedural", index)
    side = size * SUPERSAMPLE
    canvas = _gradient(draw, side, side)
    clouds = _clouds(draw, side)
    for radius in sorted(_radii(draw, side), reverse=draw.random() < 0.7):
        _paint_leaf(canvas, clouds, radius, draw)
    picture = Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8))
    if draw.random() < GLYPH_SHARE:
        _write_glyphs(picture, draw)
    return np.asarray(picture.reduce(SUPERSAMPLE))


@dataclass(frozen=True)
class CameraMove:
    """Where a camera looks in every frame: a point of a still, with a scale (still pixels in one of the view) and an
    angle in radians; each T values in fp32."""

    x: torch.Tensor
    y: torch.Tensor
    scale: torch.Tensor
    angle: torch.Tensor

    @classmethod
    def drawn(
        cls, draw: np.random.Generator, frames: int, picture: tuple[int, int], view: tuple[int, int]
    ) -> CameraMove:
        """A pan, zoom and turn over a picture of H x W that stays inside it for a view of H x W."""
        (H, W), (h, w) = picture, view
        time = torch.arange(frames, dtype=torch.float32) - (frames - 1) / 2
        scale = draw.uniform(1.25, min(2.0, min(H / h, W / w))) * (1 + draw.uniform(-0.01, 0.01) * time)
        angle = draw.uniform(-0.15, 0.15) + draw.uniform(-0.02, 0.02) * time
        speed = draw.uniform(-4, 4, 2)
        room = np.maximum(0, np.array([W, H]) - np.array([w, h]) * float(scale.max())) / 2
        centre = np.array([W, H]) / 2 + draw.uniform(-1, 1, 2) * room
        x, y = (float(centre[i]) + float(speed[i]) * time for i in (0, 1))
        return cls(x, y, scale, angle)

    def flow(self, i: int, j: int, view: tuple[int, int]) -> torch.Tensor:
        """Exact flow from frame i to frame j: 2 H W in pixels of the view, x before y."""
        u, v = _places(view, 1)
        x, y = self._on_still(i, u, v)
        x, y = x - self.x[j], y - self.y[j]
        cos, sin = self.angle[j].cos() / self.scale[j], self.angle[j].sin() / self.scale[j]
        return torch.stack((cos * x + sin * y - u, cos * y - sin * x - v))

    def _on_still(self, i: int, u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.angle[i].cos() * self.scale[i], self.angle[i].sin() * self.scale[i]
        return self.x[i] + cos * u - sin * v, self.y[i] + sin * u + cos * v


def _places(view: tuple[int, int], fineness: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of pixel centres from the middle of the view, H W each, `fineness` of them to a pixel along each axis."""
    rows, columns = ((torch.arange(side * fineness) + 0.5) / fineness - side / 2 for side in view)
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    return u, v


def moving_view(
    picture: np.ndarray, draw: np.random.Generator, frames: int, size: int | tuple[int, int]
) -> np.ndarray:
    """A camera pans, zooms and turns over a still: uint8 T x H x W x 3.

    Args:
        picture: uint8 H W 3, both sides at least 1.5 times those of the view.
        draw: where the motion comes from.
        frames: length in frames.
        size: side of the view in pixels, or its height and width.
    """
    view = (size, size) if isinstance(size, int) else size
    return follow(picture, CameraMove.drawn(draw, frames, picture.shape[:2], view), view)


def follow(picture: np.ndarray, move: CameraMove, view: tuple[int, int]) -> np.ndarray:
    """What the camera sees: uint8 T x H x W x 3."""
    H, W, _ = picture.shape
    x, y, scale, angle = (values[:, None, None] for values in (move.x, move.y, move.scale, move.angle))
    # Sampling at twice the resolution and averaging keeps a view that is smaller than its source free of aliasing.
    u, v = _places(view, SUPERSAMPLE)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    grid = torch.stack(((x + cos * u - sin * v) * 2 / W - 1, (y + sin * u + cos * v) * 2 / H - 1), dim=-1)
    source = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1).expand(len(x), -1, -1, -1)
    seen = F.grid_sample(source, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    seen = F.avg_pool2d(seen, SUPERSAMPLE).add_(0.5).clamp_(0, 255)
    return seen.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _radii(draw: np.random.Generator, side: int) -> np.ndarray:
    low, high = (bound**-2 for bound in LEAF_RADII)
    return side * draw.uniform(high, low, LEAVES) ** -0.5


def _colour(draw: np.random.Generator) -> np.ndarray:
    # Mostly muted, as in nature: grey plus a little colour.
    grey = draw.uniform(0.05, 0.95)
    return np.clip(grey + draw.normal(0, 0.15, 3), 0, 1).astype(np.float32)


def _gradient(draw: np.random.Generator, h: int, w: int) -> np.ndarray:
    angle = draw.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    ramp = np.cos(angle) * x / w + np.sin(angle) * y / h
    ramp = (ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6)
    return _colour(draw) * (1 - ramp[..., None]) + _colour(draw) * ramp[..., None]


def _grating(draw: np.random.Generator, h: int, w: int) -> np.ndarray:
    angle, period = draw.uniform(0, np.pi), np.exp(draw.uniform(np.log(5), np.log(60)))
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period)
    if draw.random() < 0.5:
        wave = np.tanh(4 * wave)
    return _colour(draw) + draw.uniform(0.05, 0.3) * wave[..., None]


def _clouds(draw: np.random.Generator, side: int) -> np.ndarray:
    """Noise with a 1/f spectrum, mean 0 and deviation 1: bark, stone, foliage from afar."""
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / side) ** draw.uniform(0.7, 1.3)
    amplitude[0, 0] = 0
    field = np.fft.irfft2(np.fft.rfft2(draw.standard_normal((side, side))) * amplitude, s=(side, side))
    return (field / field.std()).astype(np.float32)


def _paint_leaf(canvas: np.ndarray, clouds: np.ndarray, radius: float, draw: np.random.Generator) -> None:
    """Paint one ellipse or rectangle onto canvas, in place."""
    side = len(canvas)
    cy, cx = draw.uniform(0, side, 2)
    top, left = max(0, int(cy - radius)), max(0, int(cx - radius))
    bottom, right = min(side, int(cy + radius) + 1), min(side, int(cx + radius) + 1)
    h, w = bottom - top, right - left
    if h < 2 or w < 2:
        return
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    angle, flat = draw.uniform(0, np.pi), draw.uniform(0.4, 1.0)
    u = (np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)) / radius
    v = (np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)) / (radius * flat)
    inside = np.maximum(abs(u), abs(v)) < 0.7 if draw.random() < 0.4 else u**2 + v**2 < 1
    kind = draw.random()
    if kind < 0.3:
        fill = _gradient(draw, h, w)
    elif kind < 0.55:
        fill = _grating(draw, h, w)
    elif kind < 0.85:
        at_y, at_x = draw.integers(0, side - h + 1), draw.integers(0, side - w + 1)
        fill = _colour(draw) + draw.uniform(0.03, 0.2) * clouds[at_y : at_y + h, at_x : at_x + w, None]
    else:
        fill = np.broadcast_to(_colour(draw), (h, w, 3))
    canvas[top:bottom, left:right][inside] = fill[inside]


def _write_glyphs(picture: Image.Image, draw: np.random.Generator) -> None:
    """Write a few short lines onto picture, in place."""
    pen, side = ImageDraw.Draw(picture), picture.width
    for _ in range(draw.integers(2, 9)):
        text = "".join(draw.choice(list(GLYPHS), draw.integers(3, 14)))
        size = int(np.exp(draw.uniform(np.log(0.02), np.log(0.12))) * side)
        colour = tuple(int(value) for value in _colour(draw) * 255)
        pen.text(tuple(draw.uniform(0, 0.8, 2) * side), text, fill=colour, font=ImageFont.load_default(max(size, 8)))
