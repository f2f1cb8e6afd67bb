"""Stage 1: flow matching. `python -m training.pretrain --config nano --out runs/pretrain --data runs/latents`

The transformer learns the velocity noise - data at every point of the path, given the degraded latent.

Source: SeedVR, arXiv 2501.01320; loss, logit-normal times and resolution shift as in the released configuration.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from seedvr2_core.diffusion.conditioning import augment, frame_noise
from seedvr2_core.diffusion.sampler import sample
from seedvr2_core.diffusion.schedule import interpolate, shift, shift_factor, velocity
from seedvr2_core.errors import CheckpointError
from seedvr2_core.models.dit import DiTConfig
from seedvr2_core.models.windows import WindowConfig

from . import loop, state
from .config import OptimConfig, RunConfig, parse_command
from .randomness import rng, torch_rng
from .restorer import Restorer

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
# Latents kept out of training.
HELD_OUT = 16


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Everything a run of this stage depends on."""

    model: DiTConfig
    run: RunConfig
    optim: OptimConfig
    batch: int = 8
    text_dropout: float = 0.1
    # Condition noise is drawn from 0..this.
    condition_noise: float = 0.25
    # Share of samples at pure noise, where every sampler starts and a one-step sampler stays. Logit-normal times hardly
    # get near it.
    pure_noise: float = 0.0


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


class Latents:
    """Precomputed pairs, one kind of crop a step, scaled to unit variance as the transformer sees them."""

    def __init__(self, directory: Path, seed: int):
        self.kinds = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
        if not self.kinds:
            raise CheckpointError(f"{directory} holds no latents; run `python -m training.precompute` first.")
        self.seed = seed
        self.scale = 1 / torch.cat([kind["hq"].flatten() for kind in self.kinds]).std().item()

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Clean and degraded latents b 16 t h w of one step."""
        kind = self.kinds[step % len(self.kinds)]
        index = torch.from_numpy(rng(self.seed, "order", step).integers(HELD_OUT, len(kind["hq"]), size))
        return kind["hq"][index] * self.scale, kind["lq"][index] * self.scale

    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        return [(kind["hq"][:HELD_OUT] * self.scale, kind["lq"][:HELD_OUT] * self.scale) for kind in self.kinds]


def noised_condition(lq: Tensor, seed: int, step: int, most: float) -> Tensor:
    """The degraded latent b c t h w with a random amount of noise, so that the model also learns to doubt it."""
    draw = torch_rng(seed, "condition_noise", step)
    levels = torch.rand(len(lq), generator=draw) * most
    noise = torch.randn(lq.shape, generator=draw)
    return torch.cat([augment(z[None], n[None], u.item()) for z, n, u in zip(lq, noise, levels, strict=True)])


class PretrainStage:
    """Flow matching: mean (v(x_u, condition, u) - (noise - data))^2."""

    def __init__(self, config: Pretraining, latents: Latents):
        self.config, self.latents = config, latents
        torch.manual_seed(config.run.seed)
        self.module = Restorer(config.model)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        config, seed = self.config, self.config.run.seed
        hq, lq = self.latents.batch(step, config.batch)
        noise = torch.randn(hq.shape, generator=torch_rng(seed, "noise", step))
        draw = torch_rng(seed, "timestep", step)
        factor = max(MIN_SHIFT, shift_factor(*hq.shape[2:]))
        u = shift(torch.sigmoid(torch.randn(len(hq), generator=draw)), factor)
        u[torch.rand(len(hq), generator=draw) < config.pure_noise] = 1
        dropped = torch.rand(len(hq), generator=torch_rng(seed, "text_drop", step)) < config.text_dropout
        condition = noised_condition(lq, seed, step, config.condition_noise)
        x = interpolate(hq, noise, u.view(-1, 1, 1, 1, 1))
        predicted = self.module.velocity(x, condition, u, dropped)
        loss = (predicted - velocity(hq, noise)).square().mean()
        return loss, {"frames": hq.shape[2]}

    def validate(self, module: nn.Module) -> dict[str, float]:
        return latent_errors(module, self.latents, steps=(1, 8))


def latent_errors(module: Restorer, latents: Latents, steps: tuple[int, ...]) -> dict[str, float]:
    """RMS error and spread of restored held-out latents, relative to the clean ones; "lq" is the input's own error."""
    result: dict[str, list[float]] = {}
    for hq, lq in latents.held_out():
        noise = torch.stack([frame_noise(i, 0, *hq.shape[2:3], 16, *hq.shape[3:]) for i in range(len(hq))])
        result.setdefault("lq", []).append((lq - hq).square().mean().sqrt().item())
        for count in steps:
            restored = sample(lambda x, u, lq=lq: module.velocity(x, lq, torch.full((len(x),), u)), noise, count)
            result.setdefault(f"rms_{count}", []).append((restored - hq).square().mean().sqrt().item())
            result.setdefault(f"std_{count}", []).append((restored.std() / hq.std()).item())
    return {name: sum(values) / len(values) for name, values in result.items()}


def load_run(directory: Path, config: DiTConfig) -> Restorer:
    """The averaged weights of a run of this stage or of the next."""
    restorer = Restorer(config)
    restorer.load_state_dict(state.load_averaged(directory))
    return restorer


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = parse_command("pretrain", RECIPES)
    torch.set_num_threads(command.threads)
    config: Pretraining = command.config
    stage = PretrainStage(config, Latents(command.data, config.run.seed))
    loop.run(stage, config.run, config.optim, command.out)


if __name__ == "__main__":
    main()
