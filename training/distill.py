"""Stage 2: progressive distillation to one step. `python -m training.distill --config nano --out runs/distill`

Every halving teaches a student to do in one Euler step what its teacher does in two, until one step is left. The next
teacher is the averaged student.

Source: SeedVR2, arXiv 2506.05301, section 3.4, after Salimans and Ho, arXiv 2202.00512.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from seedvr2_core.diffusion.schedule import interpolate, velocity
from seedvr2_core.models.dit import DiTConfig

from . import loop
from .config import OptimConfig, RunConfig, parse_command
from .pretrain import NANO_DIT, Latents, latent_errors, load_run, noised_condition
from .randomness import rng, torch_rng
from .restorer import Restorer


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Everything a run of this stage depends on. `run` and `optim` are those of one halving."""

    model: DiTConfig
    run: RunConfig
    optim: OptimConfig
    teacher: Path  # run directory of the stage before
    steps: int = 64  # of the first teacher; a power of two
    # Weight of the clean latent itself in the last halving. A student of its teacher alone draws a sample. Above 0 it
    # is pulled towards the mean of all samples: more fidelity, less texture. Below 0 (and above -1) it is pushed away
    # from it, which mends samples of less texture than the data.
    w_data: float = 0.0
    batch: int = 8
    condition_noise: float = 0.25


RECIPES = {
    "nano": Distillation(
        model=NANO_DIT,
        run=RunConfig(steps=300, seed=3, ema=0.99, validate_every=300, save_every=100),
        optim=OptimConfig(lr=3e-4, final_lr=3e-5, warmup=20),
        teacher=Path("runs/pretrain"),
        steps=8,
        w_data=-0.15,
        batch=16,
        condition_noise=0.1,
    )
}


class HalvingStage:
    """One halving: the student's step of 2/N against two steps of 1/N of the teacher."""

    def __init__(self, config: Distillation, latents: Latents, teacher: Restorer, steps: int):
        """`steps` is N, the number of steps of the teacher; the student will have half as many."""
        self.config, self.latents, self.steps = config, latents, steps
        self.teacher = teacher.eval().requires_grad_(False)
        self.module = copy.deepcopy(teacher).train().requires_grad_(True)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        config, seed = self.config, self.config.run.seed + self.steps
        hq, lq = self.latents.batch(step + config.run.steps * self.steps, config.batch)
        noise = torch.randn(hq.shape, generator=torch_rng(seed, "noise", step))
        index = rng(seed, "timestep", step).integers(1, self.steps // 2 + 1, len(hq))
        u = torch.from_numpy(2 * index / self.steps).float()
        condition = noised_condition(lq, seed, step, config.condition_noise)
        x = interpolate(hq, noise, u.view(-1, 1, 1, 1, 1))
        target = two_steps(self.teacher, x, condition, u, 1 / self.steps)
        predicted = self.module.velocity(x, condition, u)
        to_teacher = (predicted - target).square().mean()
        to_data = (predicted - velocity(hq, noise)).square().mean()
        w_data = config.w_data if self.steps == 2 else 0.0
        scalars = {"to_teacher": to_teacher.item(), "to_data": to_data.item(), "frames": hq.shape[2]}
        return to_teacher + w_data * to_data, scalars

    def validate(self, module: nn.Module) -> dict[str, float]:
        return latent_errors(module, self.latents, steps=(max(1, self.steps // 2), 1))


@torch.no_grad()
def two_steps(teacher: Restorer, x: Tensor, condition: Tensor, u: Tensor, delta: float) -> Tensor:
    """Velocity of the one step that lands where two Euler steps of `delta` do: their mean."""
    first = teacher.velocity(x, condition, u)
    return 0.5 * (first + teacher.velocity(x - delta * first, condition, u - delta))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = parse_command("distill", RECIPES)
    torch.set_num_threads(command.threads)
    config: Distillation = command.config
    latents = Latents(command.data, config.run.seed)
    teacher, steps = load_run(config.teacher, config.model), config.steps
    while steps > 1:
        stage = HalvingStage(config, latents, teacher, steps)
        teacher = loop.run(stage, config.run, config.optim, command.out / f"{steps // 2:02d}")
        steps //= 2


if __name__ == "__main__":
    main()
