"""Stage 1: flow matching. `python -m training.pretrain --config nano --out runs/pretrain --data runs/latents`

The transformer learns the velocity noise - data at every point of the path, given the degraded latent.

Source: SeedVR, arXiv 2501.01320; loss, logit-normal times and resolution shift as in the released configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from seedvr2_core.diffusion.conditioning import augment
from seedvr2_core.diffusion.schedule import interpolate, shift, shift_factor, velocity
from seedvr2_core.errors import CheckpointError, SettingError
from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiTConfig
from seedvr2_core.models.windows import WindowConfig
from seedvr2_core.video.geometry import PATCH

from . import doctor, loop
from .buckets import Deal
from .config import LARGE_RUN, ONE_GPU_RUN, OptimConfig, RunConfig, parse_command, run_main, setting
from .curriculum import Phase, check_phases, phase_at
from .guards import GuardConfig
from .journal import timed
from .previews import Preview
from .randomness import torch_rng
from .restorer import Restorer, for_training
from .shards import Latents
from .text import Chosen, TextConfig, Texts
from .validation import Captions, latent_errors, latent_previews
from .weights import empty_restorer, open_restorer

# The code of the 3B in a size that a CPU trains in half an hour.
NANO_DIT = DiTConfig(
    dim=192,
    depth=8,
    heads=3,
    head_dim=64,
    text_dim=192,
    separate_layers=3,
    mlp="swiglu",
    mlp_hidden=512,
    rope="video_text",
    out_norm=True,
    modulate_last_text=False,
    # At the published 45 x 80 tokens a training crop would be a single window, and windows would never be learnt.
    windows=WindowConfig(train_area=(16, 16)),
)
# Below this, the shift for tiny crops would leave hardly any noisy times.
MIN_SHIFT = 0.5


class Batches(Protocol):
    """What the config of a stage on latents says about its batches."""

    run: RunConfig
    batch: int
    batch_tokens: int | None
    image_share: float | None
    text: TextConfig


@dataclass(frozen=True, kw_only=True)
class Growth(Phase):
    """A phase that says as well how many of its steps have pictures."""

    image_share: float | None = setting(None, "share of the steps of pictures; none: the kinds take turns", least=0,
                                        most=1)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Everything a run of this stage depends on."""

    model: DiTConfig
    run: RunConfig
    optim: OptimConfig
    guard: GuardConfig = GuardConfig()
    init: str | None = setting(None, "run, checkpoint or published name to start from; none: random weights")
    # A data set of many shapes is better dealt by tokens, so that every step costs the same.
    batch_tokens: int | None = setting(
        None, "of a micro-batch; none: `batch` samples", source="S2", least=1, frozen=True
    )
    image_share: float | None = setting(
        None, "share of the steps of pictures; none: the kinds of latents take turns", least=0, most=1
    )
    curriculum: tuple[Growth, ...] = setting((), "how samples grow; none: all latents at any time", source="S1")
    batch: int = setting(8, "samples of a micro-batch", least=1, frozen=True)
    text: TextConfig = TextConfig()
    text_dropout: float = setting(0.1, "share of samples with the null prompt", least=0, most=1)
    condition_noise: float = setting(
        0.25, "most noise in the condition, drawn from 0..this", source="RC", least=0, most=1
    )
    # Where every sampler starts and a one-step sampler stays. Logit-normal times hardly get near it.
    pure_noise: float = setting(0.0, "share of samples at pure noise", least=0, most=1)

    def __post_init__(self) -> None:
        if self.curriculum and self.batch_tokens is None:
            raise SettingError("curriculum deals batches by tokens, and batch_tokens is none; set it, such as "
                               "batch_tokens=90000, or leave curriculum out.")


# Small pictures and short clips first, then what inference is for: 720p in many aspects, and any length.
GROWTH = (
    Growth(share=0.15, size=256, frames=(1, 5), image_share=0.5),
    Growth(share=0.25, size=512, frames=(1, 9), image_share=0.4),
    Growth(share=0.25, size=768, frames=(1, 21), image_share=0.35),
    Growth(share=0.35, size=960, image_share=0.3),
)
RECIPES = {
    "nano": Pretraining(
        model=NANO_DIT,
        run=RunConfig(steps=3600, seed=2, validate_every=600),
        optim=OptimConfig(lr=1e-3, final_lr=5e-5, betas=(0.9, 0.95)),
        batch=16,
        condition_noise=0.1,
        pure_noise=0.2,
    )
}
# From released weights a tenth of the rate is enough.
_3B = Pretraining(
    model=SEEDVR2_3B,
    run=LARGE_RUN,
    optim=OptimConfig(lr=1e-5, final_lr=1e-6, betas=(0.9, 0.95), warmup=1000, decay=0.2),
    init="3b",
    batch=1,
    batch_tokens=90_000,
    image_share=0.3,
    text=TextConfig(negative_fraction=0.05, negative="3b"),
)
_7B = replace(_3B, model=SEEDVR2_7B, init="7b", text=replace(_3B.text, negative="7b"))
RECIPES |= {
    "3b": _3B,
    "7b": _7B,
    # As the paper began: random weights, ten times the rate, and samples that grow.
    "7b_scratch": replace(_7B, init=None, optim=replace(_3B.optim, lr=1e-4, final_lr=1e-5), curriculum=GROWTH),
}
# All weights on one GPU, which bounds the batch: 49 frames of 720p.
_ONE_GPU = {"run": ONE_GPU_RUN, "optim": replace(_3B.optim, kind="adamw8bit"), "batch_tokens": 46_800}
RECIPES |= {"3b_48gb": replace(_3B, **_ONE_GPU), "7b_80gb": replace(_7B, **_ONE_GPU)}


def noised_condition(lq: Tensor, seed: int, step: int, most: float, micro: int = 0) -> Tensor:
    """The degraded latent b c t h w with a random amount of noise, so that the model also learns to doubt it."""
    draw = torch_rng(seed, "condition_noise", step, micro)
    levels = torch.rand(len(lq), generator=draw) * most
    noise = torch.randn(lq.shape, generator=draw)
    return torch.cat([augment(z[None], n[None], u.item()) for z, n, u in zip(lq, noise, levels, strict=True)])


class PretrainStage:
    """Flow matching: mean (v(x_u, condition, u) - (noise - data))^2. Source: released configuration, loss "v_lerp"."""

    averaged = "g"

    def __init__(self, config: Pretraining, latents: Latents, restorer: Restorer | None = None):
        """`restorer` is trained in place; None: a fresh one."""
        self.config, self.latents = config, latents
        if restorer is None:
            torch.manual_seed(config.run.seed)
            restorer = Restorer(config.model)
        if config.curriculum:
            check_phases(config.curriculum, latents.shapes)
        # A published prompt, or one that was learnt before, stays what it is.
        self.modules: Mapping[str, Restorer] = {"g": for_training(restorer, config.init is None)}
        self.texts = Texts.of_run(config.text, restorer, latents, config.run.seed, config.text_dropout)

    def backward(self, name: str, step: int, micro: int, scale: float) -> dict[str, float]:
        restorer = self.modules[name]
        (x, condition, u, target, texts), waited = timed(self.draw, step, micro, restorer.device)
        loss = (texts.velocity(restorer, x, condition, u) - target).square().mean()
        (scale * loss).backward()
        return {"loss": loss.item(), "frames": x.shape[2], "data_seconds": waited, **cost(x)}

    def draw(self, step: int, micro: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Chosen]:
        """Noisy latent, condition, time, true velocity and texts of a micro-batch."""
        config, seed = self.config, self.config.run.seed
        phase = phase_at(step, config.run.steps, config.curriculum) if config.curriculum else None
        hq, lq, captions = draw_batch(config, self.latents, step, micro, phase=phase)
        texts = self.texts.choose(step, micro, len(hq), captions)
        hq = texts.target(hq, lq)
        noise = torch.randn(hq.shape, generator=torch_rng(seed, "noise", step, micro))
        draw = torch_rng(seed, "timestep", step, micro)
        factor = max(MIN_SHIFT, shift_factor(*hq.shape[2:]))
        u = shift(torch.sigmoid(torch.randn(len(hq), generator=draw)), factor)
        u[torch.rand(len(hq), generator=draw) < config.pure_noise] = 1
        condition = noised_condition(lq, seed, step, config.condition_noise, micro)
        x = interpolate(hq, noise, u.view(-1, 1, 1, 1, 1))
        target = velocity(hq, noise)
        return *(tensor.to(device) for tensor in (x, condition, u, target)), texts

    def validate(self, module: nn.Module) -> dict[str, float]:
        return latent_errors(module, self.latents, (1, 8), captions=self.config.text.mode == "caption")

    def preview(self, module: nn.Module) -> list[Preview]:
        return latent_previews(module, self.latents, 8, captions=self.config.text.mode == "caption")


def draw_batch(
    config: Batches, latents: Latents, step: int, micro: int, at: int = 0, phase: Growth | None = None
) -> tuple[Tensor, Tensor, Captions | None]:
    """Clean and degraded latents b c t h w of a micro-batch, and the captions of its samples where the run uses them.

    Args:
        at: the step of the plan where the run begins.
        phase: of the curriculum, where there is one.
    """
    share = config.image_share if phase is None else phase.image_share
    deal = Deal(samples=config.batch, tokens=config.batch_tokens, micros=config.run.micro_batches, image_share=share,
                phase=phase)  # fmt: skip
    found = latents.batch(at + step, deal, micro)
    return found.hq, found.lq, found.texts if config.text.mode == "caption" else None


def cost(latent: Tensor) -> dict[str, int]:
    """How much work a micro-batch b c t h w is: samples, and video tokens."""
    b, _, t, h, w = latent.shape
    return {"samples": b, "tokens": b * t * (h // PATCH) * (w // PATCH)}


def load_run(where: str | Path, config: DiTConfig) -> Restorer:
    """The averaged weights of a run of this stage or of the next, a checkpoint file, or a published model by name.

    Raises:
        CheckpointError: there is none, or it is of other sizes than the config.
    """
    found = open_restorer(where)
    # Windows have no weights, so a model may be given others than it was trained with.
    if replace(found.dit.config, windows=config.windows) != config:
        raise CheckpointError(
            f"{where} holds a transformer of dim {found.dit.config.dim} and depth "
            f"{found.dit.config.depth}, and the recipe is for dim {config.dim} and depth "
            f"{config.depth}; choose a recipe with this model, or another start."
        )
    restorer = empty_restorer(config, len(found.prompt))
    restorer.load_state_dict(found.state_dict(), assign=True)
    return restorer


def main() -> None:
    command = parse_command("pretrain", RECIPES)
    config: Pretraining = command.config
    if command.dry_run:
        print(doctor.estimate(config, doctor.of_restorer(config)))
        return
    session = loop.open_session(command, config)
    start = load_run(config.init, config.model) if config.init else None
    latents = Latents(command.data, config.run.seed, session.processes.device)
    stage = PretrainStage(loop.resolved(config, session), latents, start)
    loop.run(stage, config, {"g": config.optim}, command.out, session)


if __name__ == "__main__":
    run_main(main)
