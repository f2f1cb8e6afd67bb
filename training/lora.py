"""Fine-tuning on one GPU: low-rank adapters on a frozen transformer. `python -m training.lora --config 3b_lora_24gb`

They are trained by flow matching, or adversarially. In the latter, generator and discriminator are one frozen base
with two sets of adapters; the discriminator has its readout beside them. It may also have a base of its own, and the
generator train all its weights.

Source: SeedVR2 publishes nothing on adapters, all values here are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from seedvr2_core.errors import CheckpointError, SettingError
from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiTConfig

from . import doctor, loop, state
from .adapters import DTYPES, AdaptedDiscriminator, AdaptedRestorer, Base, LoraConfig, save_adapters
from .apt import (
    CURRICULUM,
    SMALL_BATCH,
    AdversarialStage,
    DiscConfig,
    LossConfig,
    PostTraining,
    adversarial_workload,
)
from .config import OptimConfig, ParallelConfig, RunConfig, parse_command, run_main, setting
from .curriculum import Phase, check_phases
from .guards import GuardConfig
from .parallel import Processes
from .pretrain import NANO_DIT, Pretraining, PretrainStage, load_run
from .randomness import key
from .restorer import Restorer, for_training
from .shards import Latents
from .text import TextConfig, Texts, refuse_bad_targets
from .weights import open_restorer

log = logging.getLogger(__name__)

# Latent size of the longest sample that the recipes of `precompute` for fine-tuning make: 21 frames of 512 x 512.
CLIP = (6, 64, 64)
Objective = Literal["flow", "apt"]
Trained = Literal["adapters", "full"]


@dataclass(frozen=True, kw_only=True)
class AdaptedDiscConfig(DiscConfig):
    """The same, and what the discriminator adapts."""

    # APT and SeedVR2 begin with the many-step model, which judges better than the distilled one.
    base: str | None = setting(None, "run, checkpoint or published name of its frozen weights; none: those of init")


@dataclass(frozen=True, kw_only=True)
class LoraTraining:
    """Everything a run of this stage depends on."""

    init: str = setting(about="what is adapted: run, checkpoint, folder of adapters or published name")
    model: DiTConfig = SEEDVR2_3B
    objective: Objective = setting("apt", "adversarial post-training of a one-step base, or flow matching of another")
    generator: Trained = setting(
        "adapters", "adversarial: what of it is trained; the discriminator always has adapters", frozen=True
    )
    lora: LoraConfig = LoraConfig()
    run: RunConfig
    g: OptimConfig
    d: OptimConfig | None = setting(None, "of the discriminator's adapters and readout; none: flow matching")
    guard: GuardConfig = GuardConfig(on_spike="alert")
    batch: int = setting(1, "samples of a micro-batch", least=1, frozen=True)
    text: TextConfig = TextConfig()
    text_dropout: float = setting(0.1, "flow matching: share of samples with the null prompt", least=0, most=1)
    condition_noise: float = setting(0.25, "most noise in the condition", source="RC", least=0, most=1)
    pure_noise: float = setting(0.0, "flow matching: share of samples at pure noise", least=0, most=1)
    loss: LossConfig = LossConfig()
    disc: AdaptedDiscConfig = AdaptedDiscConfig(backward="replay")
    curriculum: tuple[Phase, ...] = setting(CURRICULUM, "adversarial: how samples grow", source="S2")

    def __post_init__(self) -> None:
        if self.objective == "apt":
            refuse_bad_targets(self.text)
        elif self.generator == "full" or self.disc.base is not None:
            raise SettingError("generator=full and disc.base are for objective=apt; flow matching has no "
                               "discriminator, and of all weights it is training.pretrain.")
        if self.lora.offload_blocks and not self.run.parallel.activation_checkpoint:
            raise SettingError(f"lora.offload_blocks is {self.lora.offload_blocks}, and without recomputation the "
                               "backward pass wants all blocks at once; set run.parallel.activation_checkpoint=true.")
        if self.run.parallel.sp > 1:
            raise SettingError(f"run.parallel.sp is {self.run.parallel.sp}, and a frozen base takes whole samples; set "
                               "it to 1: more processes then take more samples.")


_RUN = RunConfig(
    steps=2000, micro_batches=8, ema=0.995, save_every=250, keep_averaged_every=1000,
    parallel=ParallelConfig(activation_checkpoint=True),
)  # fmt: skip
_GAN = OptimConfig(lr=2e-5, final_lr=2e-5, betas=(0.0, 0.99), weight_decay=0.0)
_SHORT = (Phase(share=0.3, frames=(1,)), Phase(share=0.7, frames=(1, 5, 9, 17)))
_MIDDLE = (Phase(share=0.3, frames=(1,)), Phase(share=0.7, frames=(1, 5, 9, 21)))
# Of a generator that trains all its weights: masters in fp32, averages that do not take memory of the device.
_WHOLE = replace(
    _RUN, ema_device="cpu", ema_every=10, parallel=ParallelConfig(precision="bf16", activation_checkpoint=True)
)
# The published 3B and 7B take one step, and stay sharp in it only if what they learn from is adversarial.
_3B = LoraTraining(init="3b", model=SEEDVR2_3B, run=_RUN, g=_GAN, d=_GAN, curriculum=_MIDDLE)
_7B = replace(_3B, init="7b", model=SEEDVR2_7B)
# For a base of many steps, one's own or SeedVR's. It would make the one step of a distilled base the mean of all
# answers: blurred.
_FLOW = replace(
    _3B,
    init="runs/pretrain",
    objective="flow",
    run=replace(_RUN, steps=5000, ema=0.999),
    g=OptimConfig(lr=1e-4, final_lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0),
    d=None,
    guard=GuardConfig(),
)
_NANO = {"model": NANO_DIT, "run": RunConfig(steps=400, seed=6, ema=0.99, save_every=100, validate_every=200),
         "lora": LoraConfig(rank=8, base="fp32"), "condition_noise": 0.1}  # fmt: skip
RECIPES = {
    "3b_lora_24gb": replace(_3B, curriculum=_SHORT),
    "3b_lora_48gb": replace(_3B, lora=LoraConfig(rank=64)),
    "7b_lora_24gb": replace(_7B, lora=LoraConfig(base="fp8"), curriculum=_SHORT),
    "7b_lora_48gb": _7B,
    "7b_lora_80gb": replace(_7B, lora=LoraConfig(rank=64)),
    "3b_full_80gb": replace(_3B, generator="full", run=_WHOLE, g=SMALL_BATCH),
    "3b_lora_flow_24gb": _FLOW,
    "7b_lora_flow_24gb": replace(_FLOW, model=SEEDVR2_7B, lora=LoraConfig(base="fp8")),
    "7b_lora_flow_48gb": replace(_FLOW, model=SEEDVR2_7B),
    "nano": replace(
        _3B, **_NANO, init="nano", batch=8, disc=AdaptedDiscConfig(), curriculum=(Phase(share=1.0, frames=(1, 5)),)
    ),
    "nano_flow": replace(_FLOW, **_NANO, g=replace(_FLOW.g, lr=5e-4, final_lr=5e-5), batch=16),
}


class AdaptedAdversarialStage(AdversarialStage):
    """Adversarial post-training of two sets of adapters, or of a whole generator and one set."""

    def __init__(self, config: LoraTraining, latents: Latents, generator: Base | Restorer, critic: Base):
        """`critic` is what the discriminator adapts; it may be the generator's base. A `Restorer` is trained in place.

        Raises:
            CheckpointError: generator and discriminator cannot be shown the same.
        """
        refuse_misfit(generator.dit.config, critic.dit.config)
        self.config, self.latents = post_training(config), latents
        check_phases(self.config.curriculum, latents.shapes)
        torch.manual_seed(key(config.run.seed, "lora/adapters"))
        adapts = isinstance(generator, Base)
        self.generator = AdaptedRestorer(generator, config.lora) if adapts else for_training(generator)
        self.discriminator = AdaptedDiscriminator(critic, config.lora)
        self.prompt = critic.restorer.prompt.detach()
        self.texts = Texts.of_run(config.text, self.generator, latents, config.run.seed)
        self.modules = {"d": self.discriminator, "g": self.generator}


def refuse_misfit(generator: DiTConfig, critic: DiTConfig) -> None:
    """Refuse a discriminator that cannot be shown what the generator makes; its size does not matter.

    Raises:
        CheckpointError: it takes other latents or texts.
    """
    (ours, our_texts), (theirs, their_texts) = ((each.out_channels, each.text_dim) for each in (generator, critic))
    if (ours, our_texts) != (theirs, their_texts):
        raise CheckpointError(f"disc.base takes latents of {theirs} channels and texts {their_texts} wide, and the "
                              f"generator those of {ours} channels and {our_texts} wide; name a model for the same.")


def players(
    config: LoraTraining, adapted: Callable[[str], Base], whole: Callable[[str], Restorer]
) -> tuple[Base | Restorer, Base]:
    """What generator and discriminator are made of.

    Args:
        config: of the run.
        adapted: opens a base, by its name.
        whole: opens a generator that is trained as a whole.
    """
    if config.generator == "full":
        return whole(config.init), adapted(config.disc.base or config.init)
    base = adapted(config.init)
    return base, base if config.disc.base is None else adapted(config.disc.base)


def flow_matching(config: LoraTraining, latents: Latents, base: Base) -> PretrainStage:
    """Flow matching of one set of adapters."""
    torch.manual_seed(key(config.run.seed, "lora/adapters"))
    as_pretraining = Pretraining(
        init=config.init, model=config.model, run=config.run, optim=config.g, guard=config.guard, batch=config.batch,
        text=config.text, text_dropout=config.text_dropout, condition_noise=config.condition_noise,
        pure_noise=config.pure_noise,
    )  # fmt: skip
    return PretrainStage(as_pretraining, latents, AdaptedRestorer(base, config.lora))


def post_training(config: LoraTraining) -> PostTraining:
    return PostTraining(
        model=config.model, run=config.run, g=config.g, d=config.d or config.g, distilled=config.init,
        pretrained=config.disc.base or config.init, loss=config.loss, disc=config.disc, curriculum=config.curriculum,
        batch=config.batch, text=config.text, condition_noise=config.condition_noise,
    )  # fmt: skip


def workload(config: LoraTraining) -> doctor.Workload:
    """What the doctor estimates: frozen bases as helpers, in the type they have in training, and a pass with gradients
    of what is trained. A discriminator's base is taken to be of the generator's size."""
    bases: list[Base] = []

    def adapted(where: str) -> Base:
        with torch.device("meta"):
            base = Base(Restorer(config.model), config.lora.base)
        bases.append(base.to(torch.device("meta"), config.lora.offload_blocks))
        return base

    generator, critic = players(config, adapted, lambda where: doctor.on_meta(lambda: Restorer(config.model)))
    sample = doctor.DEFAULT_SAMPLE if config.model == NANO_DIT else CLIP
    x, u = torch.empty(config.batch, 16, *sample, device="meta"), torch.empty(config.batch, device="meta")
    with torch.device("meta"):
        trained = AdaptedRestorer(generator, config.lora) if isinstance(generator, Base) else generator
        judge = AdaptedDiscriminator(critic, config.lora)
    helpers = {"base" if base is generator else "disc base": base.restorer for base in bases}
    if config.objective == "flow":
        asked = doctor.Workload(
            trained={"g": (trained, config.g)},
            helpers=helpers,
            forward=lambda: trained.velocity(x, x, u).square().mean(),
            assists=lambda: None,
            samples=config.batch,
        )
    else:
        prompt = critic.restorer.prompt.detach()
        asked = adversarial_workload(post_training(config), trained, judge, x, prompt, helpers)
    return replace(asked, host=sum(base.streamed.host_bytes for base in bases))


def open_base(where: str, config: LoraConfig, device: torch.device) -> Base:
    """The frozen base of a run, checkpoint or published model; raises as `open_restorer` and `Base.to`."""
    return Base(open_restorer(where, DTYPES[config.base]), config.base).to(device, config.offload_blocks)


def keep_adapters(trained: AdaptedRestorer, config: LoraTraining, folder: Path, processes: Processes) -> None:
    """Write the adapters of all processes to one folder; raises as `save_adapters`."""
    tensors = state.gathered(trained.adapters.state_dict(), processes)
    if processes.first:
        save_adapters(folder, tensors, config.lora, config.init, prompted=config.text.mode != "none")
        log.info("The adapters are in %s.", folder)


def main() -> None:
    command = parse_command("lora", RECIPES)
    config: LoraTraining = command.config
    if command.dry_run:
        print(doctor.estimate(config, workload(config)))
        return
    session = loop.open_session(command, config)
    adapted = partial(open_base, config=config.lora, device=session.processes.device)
    latents = Latents(command.data, config.run.seed, session.processes.device)
    if config.objective == "apt":
        both = players(config, adapted, partial(load_run, config=config.model))
        stage = AdaptedAdversarialStage(loop.resolved(config, session), latents, *both)
        optims = {"d": config.d or config.g, "g": config.g}
    else:
        stage, optims = flow_matching(loop.resolved(config, session), latents, adapted(config.init)), {"g": config.g}
    trained = loop.run(stage, config, optims, command.out, session)
    if isinstance(trained, AdaptedRestorer):
        keep_adapters(trained, config, command.out / "adapter", session.processes)
    if session.processes.first:
        log.info("For one file with all weights: python -m training.export --run %s --out model.safetensors",
                 command.out)  # fmt: skip


if __name__ == "__main__":
    run_main(main)
