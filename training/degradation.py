"""The damage the model learns to undo: blur, resizing, noise, JPEG and video codecs, in one or two passes.

`degrade` is a pure function of (clip, seed, profile) and returns every parameter it drew. Over the frames of a clip the
parameters walk at random in small steps, so that the damage drifts as it does in real footage.

Source: RealBasicVSR's published training configuration, which SeedVR2 follows by way of Upscale-A-Video; exceptions are
noted where they are made.
"""
# T c H W frames, 0..1   h w height and width on the way down

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from seedvr2_core.errors import SettingError
from seedvr2_core.video.geometry import mirror_indices_before, resize, to_uint8

from .randomness import rng

# A degraded clip is this many times smaller than its source, on each side, unless its profile says otherwise.
REDUCTION = 4

KERNELS = ("iso", "aniso", "generalised_iso", "generalised_aniso", "plateau_iso", "plateau_aniso", "sinc")
KERNEL_SHARES = (0.405, 0.225, 0.108, 0.027, 0.108, 0.027, 0.1)
RESIZE_FILTERS = ("bilinear", "area", "bicubic")
GREY_NOISE = 0.4
# x264 twice as often as mpeg4: the published list names it twice, as libx264 and as h264.
PUBLISHED_CODECS = (("libx264", 2 / 3), ("mpeg4", 1 / 3))
# One more kind of blocks than the published ones; ours. No x265: eight encodes of a clip made eight files. No VP9:
# asked for a tenth of the bits, five frames of 128 x 128 became a tenth smaller.
VARIED_CODECS = (("libx264", 0.5), ("mpeg4", 0.25), ("mpeg2video", 0.25))
# One thread, because the bytes must not depend on the machine. No macroblock tree in x264: with it, a frame of less
# than 100 pixels now and then gives other bytes, measured at up to 1 in 70 encodes, and at none of 4000 without.
CODEC_OPTIONS = {
    "libx264": {"threads": "1", "bf": "2", "x264-params": "mbtree=0"},
    "mpeg4": {"threads": "1", "bf": "2"},
    "mpeg2video": {"threads": "1", "bf": "2"},
}
CODECS = tuple(CODEC_OPTIONS)
# Bit rates are for a crop of this many pixels, and scaled: a fixed rate tuned for it would destroy 720p.
BITS_AREA = 256 * 256
# Some encoders refuse the published 1 fps.
CODEC_RATE = 25
# Below this x264 rounds the rate to zero and encodes at constant quality instead, in bits per second.
MIN_BIT_RATE = 2000
# The rate is bound by a decoder's buffer of so many frames. Measured: without one, mpeg4 spends the same 41 kbit each
# on five 256 x 256 frames whether asked for 10 or for 100.
CODEC_BUFFER = 4
# The unsharp mask: side of its kernel in pixels, the deviation that belongs to it, weight, threshold in codes.
UNSHARP_KERNEL, UNSHARP_WEIGHT, UNSHARP_THRESHOLD = 51, 0.5, 10
UNSHARP_SIGMA = 0.3 * ((UNSHARP_KERNEL - 1) * 0.5 - 1) + 0.8
# Encoders want even sides for 4:2:0, and nothing smaller than a macroblock.
MIN_CODED_SIDE = 16
# Up to so many leading frames are encoded first and dropped, so that not every clip starts on an I-frame.
CODEC_LEAD = 10


@dataclass(frozen=True)
class Walk:
    """A parameter's range, and how far it may move from one frame to the next."""

    low: float
    high: float
    step: float = 0.0

    def draw(self, random: np.random.Generator, frames: int) -> list[float]:
        """One value a frame: p <- clip(p + U(-step, step)), starting anywhere in the range."""
        values = [random.uniform(self.low, self.high)]
        for _ in range(frames - 1):
            moved = values[-1] + random.uniform(-self.step, self.step)
            values.append(min(max(moved, self.low), self.high))
        return values


ROTATION = Walk(-math.pi, math.pi, 0.314)
BETA_GENERALISED = Walk(0.5, 4, 0.05)
BETA_PLATEAU = Walk(1, 2, 0.1)
# Cut-off in radians. A small kernel cannot hold a low one.
OMEGA = Walk(math.pi / 5, math.pi, 0.0628)
OMEGA_SMALL_OR_FINAL = Walk(math.pi / 3, math.pi, 0.0628)
SMALL_KERNEL = 13


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One round of blur, resize, noise, JPEG and codec."""

    # Share of clips that are blurred, odd kernel sizes in pixels, and the deviation in pixels.
    blur: float = 1.0
    kernel_sizes: tuple[int, int] = (7, 21)
    sigma: Walk = Walk(0.2, 3, 0.02)
    # Shares of clips that grow, shrink and keep their size, and the factor.
    resize: tuple[float, float, float] = (0.2, 0.7, 0.1)
    scale: Walk = Walk(0.15, 1.5, 0.015)
    # Deviation in codes of 255, and the scale of Poisson noise.
    gaussian: Walk = Walk(1, 30, 0.1)
    poisson: Walk = Walk(0.05, 3, 0.005)
    jpeg: Walk = Walk(30, 95, 3)
    # Shares of clips, and of single frames, that go through a codec.
    codec: float = 1.0
    codec_image: float = 0.3
    # Encoders and their shares.
    codecs: tuple[tuple[str, float], ...] = PUBLISHED_CODECS
    # Bits per frame of BITS_AREA pixels.
    bits: tuple[float, float] = (1e4, 1e5)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Everything `degrade` may do to a clip. The codec of the last pass and the final reduction swap at random."""

    name: str
    passes: tuple[Pass, ...]
    # Share of clips with a sinc filter after the final reduction.
    final_sinc: float = 0.8
    # How many times smaller the result is than its source, on each side.
    reduction: int = REDUCTION
    # Share of clips that are sharpened first, as some published configurations do: what the model is asked for is then
    # softer than what was degraded.
    unsharp: float = 0.0


_SECOND = Pass(
    blur=0.8, sigma=Walk(0.2, 1.5, 0.02), resize=(0.3, 0.4, 0.3), scale=Walk(0.3, 1.2, 0.03),
    gaussian=Walk(1, 25, 0.1), poisson=Walk(0.05, 2.5, 0.005),
)  # fmt: skip
FULL = Profile(name="full", passes=(Pass(), _SECOND))
# The published chain with more kinds of codecs.
VARIED = replace(FULL, name="varied", passes=tuple(replace(stage, codecs=VARIED_CODECS) for stage in FULL.passes))
# After the milder ranges of MGLD and DLoRAL.
MILD = Profile(
    name="mild",
    passes=(
        Pass(scale=Walk(0.3, 1.5, 0.015), gaussian=Walk(1, 15, 0.1), poisson=Walk(0.05, 2, 0.005),
             jpeg=Walk(60, 95, 3)),
        replace(_SECOND, blur=0.5, scale=Walk(0.6, 1.2, 0.03), gaussian=Walk(1, 12, 0.1),
                poisson=Walk(0.05, 1, 0.005), jpeg=Walk(60, 100, 3)),
    ),
)  # fmt: skip
# SeedVR2 sharpens lightly degraded input too much; this is for seeing some of it. Its bit rates stay clear of the
# published lower end, which leaves little of a small crop.
LIGHT = Profile(
    name="light",
    passes=(Pass(scale=Walk(0.5, 1.5, 0.015), gaussian=Walk(1, 10, 0.1), poisson=Walk(0.05, 1, 0.005),
                 jpeg=Walk(60, 95, 3), bits=(5e4, 2e5)),),
)  # fmt: skip
IDENTITY = Profile(name="identity", passes=(), final_sinc=0.0)
# One pass within the reach of a model of ten million weights.
NANO = Profile(
    name="nano",
    passes=(Pass(blur=0.8, kernel_sizes=(7, 13), sigma=Walk(0.2, 2, 0.02), resize=(0.1, 0.6, 0.3),
                 scale=Walk(0.3, 1.2, 0.015), gaussian=Walk(1, 15, 0.1), poisson=Walk(0.05, 1.5, 0.005),
                 jpeg=Walk(50, 95, 3), codec_image=0.1, bits=(5e4, 2e5)),),
    final_sinc=0.4,
)  # fmt: skip
# Footage that is bad at its own size: the same damage without the loss of resolution.
NANO_SAME = replace(NANO, name="nano_same", reduction=1)
PROFILES = {profile.name: profile for profile in (FULL, VARIED, MILD, LIGHT, IDENTITY, NANO, NANO_SAME)}

# What training asks for by name: a profile alone, or several with their shares of the samples. Synthetic damage is
# harsher than real damage, so training at scale sees light and no damage as well.
Mixture = tuple[tuple[Profile, float], ...]
MIXTURES: dict[str, Mixture] = {
    **{name: ((profile, 1.0),) for name, profile in PROFILES.items()},
    "mixed": ((FULL, 0.75), (LIGHT, 0.2), (IDENTITY, 0.05)),
    "varied_mixed": ((VARIED, 0.75), (LIGHT, 0.2), (IDENTITY, 0.05)),
    "nano_mixed": ((NANO, 0.8), (NANO_SAME, 0.2)),
}


def draw_profile(mixture: Mixture, seed: int) -> Profile:
    """The profile of one sample."""
    profiles, shares = zip(*mixture, strict=True)
    return profiles[rng(seed, "strength").choice(len(profiles), p=shares)]


def degrade(clip: Tensor, seed: int, profile: Profile, lead: int = 0) -> tuple[Tensor, dict[str, Any]]:
    """Damage a clip and reduce it, to a quarter of its sides in most profiles.

    Args:
        clip: T 3 H W, 0..1, on the CPU; sides of at least REDUCTION pixels, odd ones welcome. T = 1 is an image.
        seed: same clip, seed and profile, same bytes.
        profile: what may happen, and how strongly.
        lead: so many of the frames only lead up to the clip. They are degraded with it, so that a codec is in the
            middle of its work when the clip begins, and dropped. Where there are none, mirrored frames do that.

    Returns:
        The degraded clip, float32 T-lead 3 H//reduction W//reduction in 0..1 on the 8-bit grid, and a log, ready for
        JSON, of every parameter drawn: one entry a pass, lists holding one value a frame, leading frames included.

    Raises:
        SettingError: the clip has another shape or is too small, or all of it is lead.
    """
    if not 0 <= lead < max(1, len(clip)):
        raise SettingError(f"degrade got {lead} leading frames of {len(clip)}; at least one frame has to be left.")
    if clip.ndim != 4 or clip.shape[1] != 3 or min(clip.shape[-2:]) < REDUCTION:
        raise SettingError(f"degrade takes T x 3 x H x W frames with sides of at least {REDUCTION} pixels, "
                           f"got {tuple(clip.shape)}.")
    random = rng(seed, f"degradation/{profile.name}")
    smaller = tuple(side // profile.reduction for side in clip.shape[-2:])
    frames = clip.float()
    log: dict[str, Any] = {"seed": seed, "profile": profile.name, "lead": lead, "passes": []}
    if profile.unsharp:
        log["unsharp"] = bool(random.random() < profile.unsharp)
        frames = unsharp_mask(frames) if log["unsharp"] else frames
    for number, stage in enumerate(profile.passes, start=1):
        last = number == len(profile.passes)
        done: dict[str, Any] = {}
        damaged = list(frames.split(1))
        damaged, done["blur"] = _blur(damaged, random, stage)
        damaged, done["resize"] = _resize(damaged, random, stage)
        damaged, done["noise"] = _noise(damaged, random, stage)
        damaged, done["jpeg"] = _jpeg(damaged, random, stage)
        # Frames of a walking scale differ in size by a pixel or two; from here on they are one clip again.
        size = damaged[0].shape[-2:]
        frames = torch.cat([frame if frame.shape[-2:] == size else resize(frame, *size) for frame in damaged])
        done["reduced_before_codec"] = last and random.random() < 0.5
        if done["reduced_before_codec"]:
            frames, log["final"] = _reduce(frames, random, profile, *smaller)
        frames, done["codec"] = _codec(frames, random, stage, lead)
        log["passes"].append(done)
    if "final" not in log:
        frames, log["final"] = _reduce(frames, random, profile, *smaller)
    return to_uint8(frames[lead:]).float() / 255, log


def unsharp_mask(frames: Tensor) -> Tensor:
    """Sharpen T 3 H W in 0..1: edges that differ from their blurred selves by more than a threshold are exaggerated.

    Source: Real-ESRGAN's published code, where it is optional: kernel 51, weight 0.5, threshold 10 of 255.
    """
    kernel = gaussian_kernel("iso", UNSHARP_KERNEL, UNSHARP_SIGMA, UNSHARP_SIGMA)
    line = kernel.sum(0)

    def blur(x: Tensor) -> Tensor:
        edge, c = UNSHARP_KERNEL // 2, x.shape[1]
        mode = "reflect" if min(x.shape[-2:]) > edge else "replicate"
        x = F.pad(x, (edge,) * 4, mode=mode)
        return F.conv2d(F.conv2d(x, line.expand(c, 1, 1, -1), groups=c), line[:, None].expand(c, 1, -1, -1), groups=c)

    residual = frames - blur(frames)
    mask = blur((residual.abs() * 255 > UNSHARP_THRESHOLD).float())
    sharpened = (frames + UNSHARP_WEIGHT * residual).clamp(0, 1)
    return torch.lerp(frames, sharpened, mask)


def upsample(frames: Tensor, height: int, width: int) -> Tensor:
    """A degraded clip (T 3 h w, 0..1) at the size of its source, the way it meets the model: T 3 height width, 0..1."""
    return resize(frames, height, width)


def code(frames: Tensor, codec: str, bits_per_frame: float) -> Tensor:
    """Encode and decode frames in memory: T 3 h w in 0..1, to the same shape.

    Args:
        frames: any size; sides are padded to what the encoder takes, and cropped again.
        codec: one of CODECS.
        bits_per_frame: asked of the rate control; a picture, or a few frames, may take several times as much.
    """
    h, w = frames.shape[-2:]
    rows, columns = (max(MIN_CODED_SIDE, side + side % 2) for side in (h, w))
    padded = F.pad(frames, (0, columns - w, 0, rows - h), mode="replicate")
    pictures = to_uint8(padded).permute(0, 2, 3, 1).contiguous().numpy()
    decoded = torch.from_numpy(decode_stream(encode_stream(pictures, codec, bits_per_frame)))
    return decoded[:, :h, :w].permute(0, 3, 1, 2).float() / 255


def encode_stream(pictures: np.ndarray, codec: str, bits_per_frame: float) -> bytes:
    """Pictures (uint8 T h w 3, even sides) as a Matroska file in memory, all but the first frame predicted."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        bit_rate = max(MIN_BIT_RATE, round(bits_per_frame * CODEC_RATE))
        bound = {"maxrate": str(bit_rate), "bufsize": str(bit_rate * CODEC_BUFFER // CODEC_RATE)}
        stream = container.add_stream(codec, rate=CODEC_RATE, options={**CODEC_OPTIONS[codec], **bound})
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, CODEC_RATE)
        stream.gop_size = len(pictures) + 1
        stream.bit_rate = bit_rate
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def decode_stream(file: bytes) -> np.ndarray:
    """All pictures of a video file in memory: uint8 T h w 3."""
    with av.open(io.BytesIO(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def bit_budget(span: tuple[float, float], share: float, height: int, width: int) -> float:
    """Bits a frame of this size may take; share 0..1 runs through span, which is for BITS_AREA pixels, in log scale."""
    low, high = span
    return low * (high / low) ** share * (height * width / BITS_AREA)


def gaussian_kernel(
    kind: str, size: int, sigma_x: float, sigma_y: float, rotation: float = 0.0, beta: float = 1.0
) -> Tensor:
    """A blur kernel, size x size, with sum 1.

    Args:
        kind: one of KERNELS but "sinc"; its suffix does not matter here, an isotropic kernel has equal deviations.
        size: odd, in pixels.
        sigma_x: deviation along the rotated x axis in pixels; sigma_y likewise.
        rotation: in radians.
        beta: exponent of the generalised (1 is a Gaussian) and plateau kernels.

    Source: Real-ESRGAN, arXiv 2107.10833, section 3.1 and its appendix.
    """
    line = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    u = (math.cos(rotation) * x + math.sin(rotation) * y) / sigma_x
    v = (math.cos(rotation) * y - math.sin(rotation) * x) / sigma_y
    squared = u**2 + v**2
    kernel = 1 / (1 + squared**beta) if kind.startswith("plateau") else torch.exp(-0.5 * squared**beta)
    return (kernel / kernel.sum()).float()


def sinc_kernel(size: int, omega: float) -> Tensor:
    """A circular low-pass kernel, size x size, with sum 1: it rings, as sharpened and over-compressed video does.

    Args:
        size: odd, in pixels.
        omega: cut-off in radians, pi passing everything.
    """
    line = torch.arange(size, dtype=torch.float64) - size // 2
    radius = torch.hypot(line[:, None], line[None])
    kernel = omega * torch.special.bessel_j1(omega * radius) / (2 * math.pi * radius.clamp_min(1e-9))
    kernel[size // 2, size // 2] = omega**2 / (4 * math.pi)
    return (kernel / kernel.sum()).float()


def _convolve(frame: Tensor, kernel: Tensor) -> Tensor:
    edge = kernel.shape[-1] // 2
    mode = "reflect" if min(frame.shape[-2:]) > edge else "replicate"
    padded = F.pad(frame, (edge,) * 4, mode=mode)
    return F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)


def _kernel_size(random: np.random.Generator, sizes: tuple[int, int]) -> int:
    return int(random.choice(range(sizes[0], sizes[1] + 1, 2)))


def _blur(frames: list[Tensor], random: np.random.Generator, stage: Pass) -> tuple[list[Tensor], dict | None]:
    if random.random() >= stage.blur:
        return frames, None
    kind, size = str(random.choice(KERNELS, p=KERNEL_SHARES)), _kernel_size(random, stage.kernel_sizes)
    log: dict[str, Any] = {"kernel": kind, "size": size}
    T = len(frames)
    if kind == "sinc":
        log["omega"] = (OMEGA_SMALL_OR_FINAL if size < SMALL_KERNEL else OMEGA).draw(random, T)
        kernels = [sinc_kernel(size, omega) for omega in log["omega"]]
    else:
        log["sigma_x"] = log["sigma_y"] = stage.sigma.draw(random, T)
        log["rotation"], log["beta"] = [0.0] * T, [1.0] * T
        if kind.endswith("aniso"):
            log["sigma_y"], log["rotation"] = stage.sigma.draw(random, T), ROTATION.draw(random, T)
        if kind.startswith("generalised"):
            log["beta"] = BETA_GENERALISED.draw(random, T)
        if kind.startswith("plateau"):
            log["beta"] = BETA_PLATEAU.draw(random, T)
        shapes = zip(log["sigma_x"], log["sigma_y"], log["rotation"], log["beta"], strict=True)
        kernels = [gaussian_kernel(kind, size, *shape) for shape in shapes]
    return [_convolve(frame, kernel) for frame, kernel in zip(frames, kernels, strict=True)], log


def _resize(frames: list[Tensor], random: np.random.Generator, stage: Pass) -> tuple[list[Tensor], dict]:
    mode = str(random.choice(("up", "down", "keep"), p=stage.resize))
    spans = {
        "up": replace(stage.scale, low=1.0),
        "down": replace(stage.scale, high=1.0),
        "keep": Walk(1.0, 1.0),
    }
    log = {"mode": mode, "filter": _filter(random), "scale": spans[mode].draw(random, len(frames))}
    if mode == "keep":
        return frames, log
    h, w = frames[0].shape[-2:]
    sizes = [(max(1, round(h * scale)), max(1, round(w * scale))) for scale in log["scale"]]
    return [_interpolate(frame, size, log["filter"]) for frame, size in zip(frames, sizes, strict=True)], log


def _filter(random: np.random.Generator) -> str:
    return str(random.choice(RESIZE_FILTERS))


def _interpolate(frames: Tensor, size: tuple[int, int], kind: str) -> Tensor:
    # No antialiasing, as in the published chain: aliasing is part of the damage.
    options = {} if kind == "area" else {"align_corners": False}
    return F.interpolate(frames, size, mode=kind, **options)


def _noise(frames: list[Tensor], random: np.random.Generator, stage: Pass) -> tuple[list[Tensor], dict]:
    kind = "gaussian" if random.random() < 0.5 else "poisson"
    log = {"kind": kind, "grey": bool(random.random() < GREY_NOISE)}
    log["strength"] = (stage.gaussian if kind == "gaussian" else stage.poisson).draw(random, len(frames))
    noisy = []
    for frame, strength in zip(frames, log["strength"], strict=True):
        if kind == "gaussian":
            shape = (1, 1 if log["grey"] else 3, *frame.shape[-2:])
            noise = torch.from_numpy(random.standard_normal(shape, dtype=np.float32)) * (strength / 255)
        else:
            noise = _shot_noise(luma(frame) if log["grey"] else frame, random) * strength
        noisy.append((frame + noise).clamp(0, 1))
    return noisy, log


def luma(frames: Tensor) -> Tensor:
    """Full-range BT.601 luma of ... 3 H W, as ... 1 H W in the same range."""
    red, green, blue = frames.unbind(-3)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(-3)


def _shot_noise(frame: Tensor, random: np.random.Generator) -> Tensor:
    # Photon counts: as many levels as the picture has codes, to the next power of two, as in Real-ESRGAN.
    codes = to_uint8(frame)
    levels = 2 ** math.ceil(math.log2(max(2, len(codes.unique()))))
    expected = codes.double().numpy() / 255 * levels
    return torch.from_numpy(((random.poisson(expected) - expected) / levels).astype(np.float32))


def _jpeg(frames: list[Tensor], random: np.random.Generator, stage: Pass) -> tuple[list[Tensor], dict]:
    qualities = [round(quality) for quality in stage.jpeg.draw(random, len(frames))]
    return [_jpeg_frame(frame, quality) for frame, quality in zip(frames, qualities, strict=True)], {
        "quality": qualities
    }


def _jpeg_frame(frame: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(to_uint8(frame[0]).permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    decoded = torch.from_numpy(np.array(Image.open(file)))
    return decoded.permute(2, 0, 1)[None].float() / 255


def _codec(frames: Tensor, random: np.random.Generator, stage: Pass, lead: int) -> tuple[Tensor, dict | None]:
    T, _, h, w = frames.shape
    if random.random() >= (stage.codec_image if T == 1 else stage.codec):
        return frames, None
    names, shares = zip(*stage.codecs, strict=True)
    name = str(random.choice(names, p=shares))
    mirrored = int(random.integers(0, min(CODEC_LEAD, T - 1) + 1))
    if lead:
        mirrored = 0
    bits = bit_budget(stage.bits, random.random(), h, w)
    order: Sequence[int] = mirror_indices_before(T, mirrored)
    coded = code(frames[order], name, bits)[mirrored:]
    return coded, {"codec": name, "mirrored_lead": mirrored, "bits_per_frame": bits}


def _reduce(
    frames: Tensor, random: np.random.Generator, profile: Profile, height: int, width: int
) -> tuple[Tensor, dict]:
    log: dict[str, Any] = {"filter": _filter(random), "sinc": None}
    frames = _interpolate(frames, (height, width), log["filter"]) if profile.passes else resize(frames, height, width)
    if random.random() < profile.final_sinc:
        size = _kernel_size(random, (7, 21))
        log["sinc"] = {"size": size, "omega": OMEGA_SMALL_OR_FINAL.draw(random, len(frames))}
        kernels = [sinc_kernel(size, omega) for omega in log["sinc"]["omega"]]
        frames = torch.cat([_convolve(f, k) for f, k in zip(frames.split(1), kernels, strict=True)])
    return frames.clamp(0, 1), log
