"""pico: the whole recipe on pictures of 32 x 32 pixels, in minutes on one CPU core, with nothing in the way.

The pictures are drawn. The latent is lossless, pixels rearranged, so what an autoencoder loses hides nothing; the
transformer is the ordinary one with about a million parameters, and a window covers a whole picture. Held-out pictures
are measured as pictures.

    n pictures   H W pixels   c t h w latent channels, frames, height, width
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seedvr2_core.diffusion.conditioning import frame_noise
from seedvr2_core.diffusion.sampler import sample
from seedvr2_core.models.windows import WindowConfig

from .apt import AdversarialStage, LossConfig, PostTraining
from .config import OptimConfig, RunConfig
from .curriculum import Phase
from .distill import Distillation, HalvingStage
from .guards import GuardConfig
from .metrics import gmsd, lsd, psnr, swd
from .pretrain import NANO_DIT, Pretraining, PretrainStage
from .previews import Preview
from .procedural import still
from .randomness import torch_rng
from .restorer import Restorer
from .shards import InMemory, Latents

# With the transformer's own 2 x 2 patches, 4 x 4 pixels a token: 48 numbers, which a width of 112 can carry.
UNSHUFFLE = 2
CHANNELS = 3 * UNSHUFFLE**2
SIDE, SCALE = 32, 4
# Deviation of the noise on the small picture, of 0..1.
NOISE = 0.1
# Deviation of the drawn pictures in -1..1, measured; latents are divided by it.
SPREAD = 0.52
# Drawn at twice the side and cut into quarters: as many for training, and others for the exam.
STILL = 2 * SIDE
STILLS, STILLS_HELD_OUT = 512, 32

METRICS = {"psnr": psnr, "gmsd": gmsd, "lsd": lsd, "swd": swd}

PICO_DIT = replace(
    NANO_DIT,
    dim=112,
    depth=6,
    heads=2,
    head_dim=56,
    text_dim=32,
    separate_layers=1,
    mlp_hidden=224,
    in_channels=2 * CHANNELS + 1,
    out_channels=CHANNELS,
    windows=WindowConfig(),
)


def to_latent(frames: Tensor) -> Tensor:
    """Pictures n 3 H W in 0..1 -> latents n 12 1 h w of about unit variance."""
    return F.pixel_unshuffle(frames * 2 - 1, UNSHUFFLE)[:, :, None] / SPREAD


def to_frames(latent: Tensor) -> Tensor:
    """The inverse of `to_latent`, cut off to 0..1."""
    return (F.pixel_shuffle(latent[:, :, 0] * SPREAD, UNSHUFFLE) / 2 + 0.5).clamp(0, 1)


def degrade(frames: Tensor, seed: int) -> Tensor:
    """Pictures n 3 H W in 0..1, four times smaller, noisy, and enlarged again by bicubic interpolation."""
    small = F.interpolate(frames, scale_factor=1 / SCALE, mode="area")
    small = small + NOISE * torch.randn(small.shape, generator=torch_rng(seed, "pico/noise"))
    return F.interpolate(small, scale_factor=SCALE, mode="bicubic", align_corners=False).clamp(0, 1)


def draw_pictures(count: int, start: int, flips: bool) -> Tensor:
    """n 3 32 32 in 0..1: the quarters of `count` drawn pictures, and with `flips` their mirror images."""
    stills = np.stack([still(0, start + index, STILL) for index in range(count)])
    frames = torch.from_numpy(stills).permute(0, 3, 1, 2).float() / 255
    quarters = torch.cat([half for row in frames.split(SIDE, dim=2) for half in row.split(SIDE, dim=3)])
    mirrored = [quarters.flip(axes) for axes in ((3,), (2,), (2, 3))] if flips else []
    return torch.cat([quarters, *mirrored]).contiguous()


@dataclass(frozen=True)
class Exam:
    """Held-out pictures, and how restored ones are marked."""

    wanted: Tensor  # n 3 32 32 in 0..1
    given: Tensor  # the same, degraded

    def restore(self, restorer: Restorer, steps: int, count: int | None = None) -> Tensor:
        """The first `count` pictures restored, n 3 32 32 in 0..1, each from noise that is its own for good."""
        condition = to_latent(self.given[:count])
        noise = torch.stack([frame_noise(index, 0, *_frame_shape(x)) for index, x in enumerate(condition)])
        with torch.no_grad():
            latent = sample(lambda x, u: restorer.velocity(x, condition, x.new_full((len(x),), u)), noise, steps)
        return to_frames(latent)

    def marks(self, restored: Tensor) -> dict[str, list[float]]:
        """Every metric of every picture."""
        pairs = list(zip(restored.split(1), self.wanted.split(1), strict=False))
        return {name: [metric(a, b) for a, b in pairs] for name, metric in METRICS.items()}

    def preview(self, restorer: Restorer, steps: int) -> list[Preview]:
        restored = self.restore(restorer, steps, count=4)
        shown = enumerate(zip(self.given.split(1), restored.split(1), self.wanted.split(1), strict=False))
        return [Preview(f"picture_{index}", *pictures) for index, pictures in shown]


def _frame_shape(latent: Tensor) -> tuple[int, int, int, int]:
    c, t, h, w = latent.shape
    return t, c, h, w


class PicoLatents(Latents):
    """Drawn pairs, and the exam."""

    def __init__(self, folder: Path, seed: int, pictures: int = STILLS, held_out: int = STILLS_HELD_OUT):
        """Pictures are drawn once and kept in `folder`; they are the same for every seed, which orders them."""
        file = folder / f"pico_{pictures}_{held_out}.safetensors"
        if not file.exists():
            frames = {
                "train": draw_pictures(pictures, 0, flips=True),
                "exam": draw_pictures(held_out, 1_000_000, flips=False),
            }
            folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            save_file(frames, partial)
            partial.replace(file)
        frames = load_file(file)
        clean, degraded = to_latent(frames["train"]), to_latent(degrade(frames["train"], seed=0))
        super().__init__(InMemory([{"hq": clean, "lq": degraded}], scale=1.0), seed)
        self.exam = Exam(frames["exam"], degrade(frames["exam"], seed=1))


def mean_marks(marks: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in marks.items()}


# Pictures marked for a point of a curve.
CURVE_PICTURES = 64


class PicoPretrainStage(PretrainStage):
    """Stage 1, judged by the exam."""

    latents: PicoLatents

    def validate(self, module: nn.Module) -> dict[str, float]:
        return {
            f"{name}_{steps}": value
            for steps in (1, 16)
            for name, value in mean_marks(self.latents.exam.marks(self.latents.exam.restore(module, steps))).items()
        }

    def preview(self, module: nn.Module) -> list[Preview]:
        return self.latents.exam.preview(module, steps=16)


class PicoHalvingStage(HalvingStage):
    """Stage 2, judged by the exam."""

    latents: PicoLatents

    def validate(self, module: nn.Module) -> dict[str, float]:
        return _curve_point(module, self.latents.exam, self.steps // 2)

    def preview(self, module: nn.Module) -> list[Preview]:
        return self.latents.exam.preview(module, self.steps // 2)


class PicoAdversarialStage(AdversarialStage):
    """Stage 3, judged by the exam."""

    latents: PicoLatents

    def validate(self, module: nn.Module) -> dict[str, float]:
        return _curve_point(module, self.latents.exam, steps=1)

    def preview(self, module: nn.Module) -> list[Preview]:
        return self.latents.exam.preview(module, steps=1)


def _curve_point(module: nn.Module, exam: Exam, steps: int) -> dict[str, float]:
    return mean_marks(exam.marks(exam.restore(module, steps, count=CURVE_PICTURES)))


PRETRAINING = Pretraining(
    model=PICO_DIT,
    run=RunConfig(steps=3000, seed=0, ema=0.998, save_every=500, validate_every=3000, async_save=False),
    optim=OptimConfig(lr=2e-3, final_lr=5e-5, betas=(0.9, 0.95)),
    batch=16,
    text_dropout=0.0,
    condition_noise=0.0,
    pure_noise=0.1,
)
DISTILLATION = Distillation(
    model=PICO_DIT,
    run=RunConfig(steps=150, seed=1, ema=0.98, save_every=150, validate_every=150, async_save=False),
    optim=OptimConfig(lr=3e-4, final_lr=3e-5, warmup=20),
    teacher=Path("pretrain"),
    steps=32,
    batch=8,
    condition_noise=0.0,
)
_ADAM = OptimConfig(lr=2e-4, final_lr=2e-4, betas=(0.0, 0.99), warmup=20, decay=0.0)
POST_TRAINING = PostTraining(
    model=PICO_DIT,
    run=RunConfig(steps=250, seed=2, ema=0.995, save_every=125, validate_every=25, async_save=False),
    g=_ADAM,
    d=_ADAM,
    guard=GuardConfig(on_spike="alert"),
    pretrained="pretrain",
    distilled="distill/01",
    loss=LossConfig(w_1=1.0, w_F=1.0),
    curriculum=(Phase(share=1.0, frames=(1,)),),
    batch=8,
    condition_noise=0.0,
)
