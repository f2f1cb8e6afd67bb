"""Stage 2: progressive distillation to one step. `python -m training.distill --config nano --out runs/distill`

Every halving teaches a student to do in one Euler step what its teacher does in two, until one step is left. The next
teacher is the averaged student.

Source: SeedVR2, arXiv 2506.05301, section 3.4, after Salimans and Ho, arXiv 2202.00512.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from seedvr2_core.diffusion.sampler import guide
from seedvr2_core.diffusion.schedule import interpolate, velocity
from seedvr2_core.errors import SettingError
from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiTConfig

from . import doctor, loop, state
from .config import LARGE_RUN, ONE_GPU_RUN, OptimConfig, RunConfig, parse_command, run_main, setting
from .guards import GuardConfig, Guards
from .journal import timed
from .pretrain import NANO_DIT, cost, draw_batch, load_run, noised_condition
from .previews import Preview
from .randomness import rng, torch_rng
from .restorer import Restorer, for_training
from .shards import Latents
from .text import Chosen, TextConfig, Texts, refuse_bad_targets
from .validation import latent_errors, latent_previews

# Steps whose mean loss is held against that of as many before them; with `Distillation.plateau`.
PLATEAU_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Everything a run of this stage depends on. `run` and `optim` are those of one halving."""

    model: DiTConfig
    run: RunConfig
    optim: OptimConfig
    guard: GuardConfig = GuardConfig()
    teacher: Path = setting(about="run directory of the stage before")
    student: Path | None = setting(None, "run directory the first student starts from; none: its teacher's weights")
    teacher_model: DiTConfig | None = setting(None, "sizes of the first teacher; none: those of the student")
    steps: int = setting(64, "of the first teacher; a power of two", source="S2", least=2, frozen=True)
    cfg: float = setting(1.0, "guidance of the first teacher, distilled into its student", source="S2", least=0)
    # Weight of the clean latent itself in the last halving. A student of its teacher alone draws a sample. Above 0 it
    # is pulled towards the mean of all samples: more fidelity, less texture. Below 0 (and above -1) it is pushed away
    # from it, which mends samples of less texture than the data.
    w_data: float = setting(0.0, "weight of the clean latent in the last halving", least=-1)
    plateau: float | None = setting(
        None, "share by which the loss falls in 1000 steps, or the halving ends; none: never", least=0, most=1
    )
    batch_tokens: int | None = setting(
        None, "of a micro-batch; none: `batch` samples", source="S2", least=1, frozen=True
    )
    image_share: float | None = setting(
        None, "share of the steps of pictures; none: the kinds of latents take turns", least=0, most=1
    )
    batch: int = setting(8, "samples of a micro-batch", least=1, frozen=True)
    # What the teacher was trained with. Its negative prompt, if it has one, is what guidance leads away from.
    text: TextConfig = TextConfig()
    text_dropout: float = setting(0.0, "share of samples with the null prompt, in the first halving", least=0, most=1)
    condition_noise: float = setting(
        0.25, "most noise in the condition, drawn from 0..this", source="RC", least=0, most=1
    )

    def __post_init__(self) -> None:
        if self.steps & (self.steps - 1):
            raise SettingError(f"steps is {self.steps}; it is halved to 1, so it has to be a power of two.")
        refuse_bad_targets(self.text)


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
_3B = Distillation(
    model=SEEDVR2_3B,
    run=replace(LARGE_RUN, steps=10_000),
    optim=OptimConfig(lr=1e-6, final_lr=1e-6, warmup=200, decay=0.0),
    teacher=Path("runs/pretrain"),
    cfg=7.5,
    plateau=0.005,
    batch=1,
    batch_tokens=90_000,
    image_share=0.3,
    text=TextConfig(negative="3b"),
)
_7B = replace(_3B, model=SEEDVR2_7B, text=TextConfig(negative="7b"))
RECIPES |= {
    "3b": _3B,
    "7b": _7B,
    # Guided by the 7B at first; a many-step 3B is what learns.
    "7b_to_3b": replace(
        _7B,
        model=SEEDVR2_3B,
        teacher=Path("runs/pretrain_7b"),
        teacher_model=SEEDVR2_7B,
        student=Path("runs/pretrain"),
    ),
}
_ONE_GPU = {"run": replace(ONE_GPU_RUN, steps=10_000), "optim": replace(_3B.optim, kind="adamw8bit")}
RECIPES |= {
    # 49 frames of 720p, and 21: the teacher needs room, too.
    "3b_48gb": replace(_3B, **_ONE_GPU, batch_tokens=46_800),
    "7b_80gb": replace(_7B, **_ONE_GPU, batch_tokens=21_600),
}


class HalvingStage:
    """One halving: the student's step of 2/N against two steps of 1/N of the teacher."""

    averaged = "g"
    looks_every = PLATEAU_STEPS

    def __init__(
        self, config: Distillation, latents: Latents, teacher: Restorer, steps: int, student: Restorer | None = None
    ):
        """`steps` is N, the number of steps of the teacher; the student will have half as many.

        The teacher is only read. `student` is trained in place; None: a copy of the teacher.
        """
        self.config, self.latents, self.steps = config, latents, steps
        self.teacher = teacher.eval().requires_grad_(False)
        student = student or copy.deepcopy(teacher)
        self.modules: Mapping[str, Restorer] = {"g": for_training(student)}
        # Only the first teacher is guided; its student needs no guidance any more.
        first = steps == config.steps
        self.cfg = config.cfg if first else 1.0
        seed, dropout = config.run.seed + steps, config.text_dropout if first and config.text_dropout else None
        self.texts = Texts.of_run(config.text, student, latents, seed, dropout)

    def backward(self, name: str, step: int, micro: int, scale: float) -> dict[str, float | None]:
        student = self.modules[name]
        (x, condition, u, to_clean, texts), waited = timed(self.draw, step, micro, student.device)
        opposed = self.texts.opposed(len(x))
        target = two_steps(self.teacher, x, condition, u, 1 / self.steps, self.cfg, texts, opposed)
        predicted = texts.velocity(student, x, condition, u)
        errors = (predicted - target).square().mean(dim=(1, 2, 3, 4))
        to_teacher = errors.mean()
        to_data = (predicted - to_clean).square().mean()
        w_data = self.config.w_data if self.steps == 2 else 0.0
        loss = to_teacher + w_data * to_data
        (scale * loss).backward()
        return {
            "loss": loss.item(),
            "to_teacher": to_teacher.item(),
            "to_data": to_data.item(),
            # The first step of sampling has the largest error, and in the last halvings shows first whether it learns.
            **errors_by_time(errors.detach(), u, self.steps // 2),
            "frames": x.shape[2],
            "data_seconds": waited,
            **cost(x),
        }

    def draw(self, step: int, micro: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Chosen]:
        """Noisy latent, condition, time, velocity to the clean latent and texts of a micro-batch."""
        config, seed = self.config, self.config.run.seed + self.steps
        hq, lq, captions = draw_batch(config, self.latents, step, micro, at=config.run.steps * self.steps)
        texts = self.texts.choose(step, micro, len(hq), captions)
        noise = torch.randn(hq.shape, generator=torch_rng(seed, "noise", step, micro))
        index = rng(seed, "timestep", step, micro).integers(1, self.steps // 2 + 1, len(hq))
        u = torch.from_numpy(2 * index / self.steps).float()
        condition = noised_condition(lq, seed, step, config.condition_noise, micro)
        x = interpolate(hq, noise, u.view(-1, 1, 1, 1, 1))
        return *(tensor.to(device) for tensor in (x, condition, u, velocity(hq, noise))), texts

    def ends(self, losses: Sequence[float]) -> bool:
        """Whether the loss has hardly fallen: its mean of the last steps, by that of as many before."""
        if self.config.plateau is None or len(losses) < 2 * PLATEAU_STEPS:
            return False
        before, now = fmean(losses[-2 * PLATEAU_STEPS : -PLATEAU_STEPS]), fmean(losses[-PLATEAU_STEPS:])
        return now > before - self.config.plateau * abs(before)

    def validate(self, module: nn.Module) -> dict[str, float]:
        steps = max(1, self.steps // 2), 1
        return latent_errors(module, self.latents, steps, captions=self.config.text.mode == "caption")

    def preview(self, module: nn.Module) -> list[Preview]:
        steps = max(1, self.steps // 2)
        return latent_previews(module, self.latents, steps, captions=self.config.text.mode == "caption")


def errors_by_time(errors: Tensor, u: Tensor, steps: int) -> dict[str, float | None]:
    """Mean error by "at_U", for every time U at which a student of so many steps is asked; None: no sample is there.

    Args:
        errors: b, of samples.
        u: b, their times.
    """
    errors, u = errors.cpu(), u.cpu()
    chosen = {i / steps: errors[u == i / steps] for i in range(1, steps + 1)}
    return {f"at_{time:g}": found.mean().item() if len(found) else None for time, found in chosen.items()}


@torch.no_grad()
def two_steps(
    teacher: Restorer,
    x: Tensor,
    condition: Tensor,
    u: Tensor,
    delta: float,
    cfg: float = 1.0,
    texts: Chosen | None = None,
    opposed: Chosen | None = None,
) -> Tensor:
    """Velocity of the one step that lands where two Euler steps of `delta` do: their mean.

    Args:
        cfg: strength of guidance from the `opposed` texts to `texts`; 1: none, and no `opposed` needed.
        texts: None: the teacher's prompt for all samples.
    """
    texts = texts or Chosen.prompts(len(x))

    def velocity(x: Tensor, u: Tensor) -> Tensor:
        positive = texts.velocity(teacher, x, condition, u)
        # Without guidance there is no second pass.
        return positive if cfg == 1.0 else guide(positive, opposed.velocity(teacher, x, condition, u), cfg)

    first = velocity(x, u)
    return 0.5 * (first + velocity(x - delta * first, u - delta))


def ways_on(resume: str, folders: Sequence[Path], steps: int) -> list[str]:
    """`Session.resume` of every halving, when `resume` is that of the command.

    A checkpoint is of one halving: of the one in whose directory it lies, else of the first that is not finished. The
    others go on from what they have.

    Args:
        folders: run directories of the halvings, in their order.
        steps: of one halving.

    Raises:
        SettingError: there is no halving left that could begin at the checkpoint; or none is to be used, and there is
            one.
    """
    if resume == "auto":
        return ["auto"] * len(folders)
    if resume == "none":
        for folder in folders:
            if found := state.newest_meta(folder):
                raise SettingError(
                    f"{folder} holds a checkpoint of step {found['step']}, and --resume none begins every halving "
                    "anew. Choose another --out, or move it away first."
                )
        return ["none"] * len(folders)
    path = Path(resume).resolve()
    inside = [folder for folder in folders if path.is_relative_to(folder.resolve())]
    metas = [(folder, state.newest_meta(folder)) for folder in folders]
    unfinished = [folder for folder, meta in metas if meta.get("step", 0) < steps and not meta.get("ended")]
    if not inside and not unfinished:
        raise SettingError(
            f"All halvings are finished, and none is left to begin at {resume}. Leave --resume out, or choose another "
            "--out."
        )
    own = (inside or unfinished)[0]
    return [resume if folder == own else "auto" for folder in folders]


def main() -> None:
    command = parse_command("distill", RECIPES)
    config: Distillation = command.config
    if command.dry_run:
        print(doctor.estimate(config, doctor.of_distillation(config)))
        return
    session = loop.open_session(command, config)
    latents = Latents(command.data, config.run.seed, session.processes.device)
    halvings = [config.steps >> i for i in range(config.steps.bit_length() - 1)]
    folders = [command.out / f"{steps // 2:02d}" for steps in halvings]
    # Before the first is begun: what is refused would else be after days. And as the first process finds it: others
    # may see its files later.
    ways = session.processes.agree(ways_on(command.resume, folders, config.run.steps))
    taught = None
    for steps, folder, way in zip(halvings, folders, ways, strict=True):
        teacher = load_run(taught or config.teacher, config.model if taught else config.teacher_model or config.model)
        starts_at = taught or config.student
        student = load_run(starts_at, config.model) if starts_at else None
        stage = HalvingStage(loop.resolved(config, session), latents, teacher, steps, student)
        session.processes.place(teacher, train=False)
        # What one halving got used to says nothing about the next.
        session = replace(session, resume=way, guards=Guards(config.guard))
        loop.run(stage, config, {"g": config.optim}, folder, session)
        taught = folder


if __name__ == "__main__":
    run_main(main)
