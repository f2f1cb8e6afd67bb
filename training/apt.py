"""Stage 3: adversarial post-training. `python -m training.apt --config nano --out runs/apt --data runs/latents`

The generator restores in one step from pure noise. A discriminator that began as the same transformer compares, pair by
pair, what it makes with the original, and is kept smooth by penalties on how much it minds a little noise. One step of
training updates the discriminator on one batch and the generator on another.

    b clips   c channels   t h w latent frames, height, width

Source: SeedVR2, arXiv 2506.05301, section 3.3; what it leaves open as in APT, arXiv 2501.08316.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from seedvr2_core.diffusion.schedule import shift, to_data
from seedvr2_core.errors import SettingError
from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiTConfig
from seedvr2_core.video.geometry import LATENT_FRAMES, Grid

from . import doctor, loop, losses
from .buckets import BATCH_TOKENS, Deal
from .config import LARGE_RUN, ONE_GPU_RUN, OptimConfig, RunConfig, parse_command, run_main, setting
from .curriculum import Phase, check_phases, phase_at
from .discriminator import Discriminator
from .guards import GuardConfig
from .journal import timed
from .pretrain import NANO_DIT, cost, load_run, noised_condition
from .previews import Preview
from .randomness import key, torch_rng
from .restorer import Restorer, for_training
from .shards import LatentBatch, Latents
from .text import Chosen, TextConfig, Texts, refuse_bad_targets
from .validation import latent_errors, latent_previews

Half = Literal["d", "g"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """L_D = adv + r1 aR1 + r2 aR2;  L_G = w_adv adv + w_1 L1 + w_F feature matching. Weight 0 leaves a term out."""

    adv: Literal["rp", "ns"] = setting("rp", "relativistic pairing, or non-saturating", source="S2")
    r1: float = setting(1000.0, "weight of the penalty on real samples", source="S2", least=0)
    r2: float = setting(1000.0, "weight of the penalty on restored samples", source="S2", least=0)
    sigma: float = setting(0.1, "deviation of the perturbation, in latent units", source="AAPT", least=1e-3)
    w_adv: float = setting(1.0, "weight of the adversarial loss", source="S2", least=0)
    # 1.0 in the paper's ablation, 0.1 in its final models.
    w_1: float = setting(0.1, "weight of L1", source="S2", least=0)
    relative_1: bool = setting(False, "L1 as a share of what the degraded latent is off by, sample by sample")
    w_F: float = setting(0.1, "weight of feature matching", source="S2", least=0)  # noqa: N815, the paper's name

    def __post_init__(self) -> None:
        if not (self.w_adv or self.w_1 or self.w_F):
            raise SettingError("loss.w_adv, loss.w_1 and loss.w_F are all 0; the generator needs one of them.")


@dataclass(frozen=True, kw_only=True)
class DiscConfig:
    """How the discriminator is asked, and how its gradient is computed."""

    t_shift: tuple[float, float] = setting(
        (1.0, 12.0), "by which the times it is told are shifted: of images, of clips", source="APT", least=0
    )
    backward: Literal["joint", "replay"] = setting(
        "joint", "one graph; or a member at a time: a quarter of the memory, a quarter more compute"
    )
    # SeedVR2 keeps it: the degraded latent holds the game together.
    reset_on_phase: bool = setting(False, "start the discriminator again when clips join the images", source="APT")


# Clips grow during the stage (SeedVR2); the lengths and shares are ours.
CURRICULUM = (
    Phase(share=0.20, frames=(1,)),
    Phase(share=0.20, frames=(1, 5, 9)),
    Phase(share=0.25, frames=(1, 9, 21)),
    Phase(share=0.35, frames=(1, 21, 49, 97)),
)


@dataclass(frozen=True, kw_only=True)
class PostTraining:
    """Everything a run of this stage depends on."""

    model: DiTConfig
    run: RunConfig
    g: OptimConfig
    d: OptimConfig
    guard: GuardConfig = GuardConfig(on_spike="alert")
    pretrained: str = setting(about="run of stage 1, checkpoint or published name; the discriminator starts there")
    distilled: str = setting(about="run of the last halving of stage 2, checkpoint or published name")
    init: Literal["distilled", "pretrain"] = setting("distilled", "where the generator starts", source="S2")
    loss: LossConfig = LossConfig()
    disc: DiscConfig = DiscConfig()
    curriculum: tuple[Phase, ...] = CURRICULUM
    batch: int = setting(8, "pairs of a micro-batch", least=1, frozen=True)
    batch_tokens: int | None = setting(
        None, "of a micro-batch, which has as many pairs as fit, at least one", source="S2", least=1, frozen=True
    )
    text: TextConfig = TextConfig()
    condition_noise: float = setting(0.25, "most noise in the condition, from 0..this", source="RC", least=0, most=1)

    def __post_init__(self) -> None:
        refuse_bad_targets(self.text)


# Adam without momentum, as games want it, and with a long memory of squares, as small batches want it.
SMALL_BATCH = OptimConfig(lr=1e-6, final_lr=1e-6, betas=(0.0, 0.99), weight_decay=0.01, warmup=100, decay=0.0)
_3B = PostTraining(
    model=SEEDVR2_3B,
    run=replace(LARGE_RUN, keep_averaged_every=1000),
    g=SMALL_BATCH,
    d=SMALL_BATCH,
    # The one-step model is what is published. With a many-step one of one's own the discriminator starts better.
    pretrained="3b",
    distilled="3b",
    disc=DiscConfig(backward="replay"),
    batch_tokens=BATCH_TOKENS,
)
RECIPES = {
    "nano": replace(
        _3B,
        model=NANO_DIT,
        pretrained="runs/pretrain",
        distilled="runs/distill/01",
        run=RunConfig(steps=4200, seed=5, ema=0.995, save_every=100, validate_every=200),
        # A small model far from its goal: a hundred times the rate of the large ones until the last sixth, and L1 by
        # sample.
        g=replace(SMALL_BATCH, lr=1e-4, final_lr=1e-5, decay=0.1667),
        d=replace(SMALL_BATCH, lr=1e-4, final_lr=1e-5, decay=0.1667),
        loss=LossConfig(w_1=0.8, relative_1=True),
        disc=DiscConfig(),
        curriculum=(Phase(share=0.2, frames=(1,)), Phase(share=0.8, frames=(1, 5))),
        batch=4,
        batch_tokens=None,
        condition_noise=0.1,
    ),
    "3b": _3B,
    "7b": replace(_3B, model=SEEDVR2_7B, pretrained="7b", distilled="7b"),
    # All weights of both on one GPU, up to 49 frames of 720p.
    "3b_80gb": replace(
        _3B,
        run=replace(ONE_GPU_RUN, keep_averaged_every=1000),
        g=replace(SMALL_BATCH, kind="adamw8bit"),
        d=replace(SMALL_BATCH, kind="adamw8bit"),
        curriculum=(*CURRICULUM[:3], replace(CURRICULUM[3], frames=(1, 21, 49))),
        batch_tokens=46_800,
    ),
}


def deal_of(config: PostTraining, half: Half = "g", phase: Phase | None = None) -> Deal:
    """How half a step gets its pairs; each half goes through them in an order of its own."""
    return Deal(samples=config.batch, tokens=config.batch_tokens, micros=config.run.micro_batches, phase=phase,
                order=f"apt/{half}")  # fmt: skip


def draw_pairs(latents: Latents, config: PostTraining, half: Half, step: int, micro: int) -> LatentBatch:
    """Pairs for half a step, all of one shape in all its micro-batches, of a length of the step's phase."""
    phase = phase_at(step, config.run.steps, config.curriculum)
    return latents.batch(step, deal_of(config, half, phase), micro)


@dataclass(frozen=True)
class Sample:
    """What both halves of a step start from: pairs, the generator's noise, and the discriminator's timestep."""

    real: Tensor  # b c t h w, clean
    condition: Tensor  # b c t h w, degraded and noised; the same for generator and discriminator
    noise: Tensor  # b c t h w
    u: Tensor  # b, 0..1; the same for all members of a pair, or their difference would measure the time
    texts: Chosen  # of the pairs, the same for generator and discriminator
    seed: int


class AdversarialStage:
    """RpGAN with approximate R1 and R2, L1 and feature matching, or what the ablation leaves of it."""

    averaged = "g"

    def __init__(self, config: PostTraining, latents: Latents, generator: Restorer, pretrained: Restorer):
        """`generator` is trained in place; of `pretrained` the discriminator becomes a copy."""
        self.config, self.latents = config, latents
        torch.manual_seed(key(config.run.seed, "apt/heads"))
        check_phases(config.curriculum, latents.shapes)
        self.generator = for_training(generator)
        self.discriminator = Discriminator.of(pretrained.dit).train()
        self.prompt = pretrained.prompt.detach().clone()
        self.texts = Texts.of_run(config.text, generator, latents, config.run.seed)
        # In the order of their updates within a step.
        self.modules: Mapping[str, nn.Module] = {"d": self.discriminator, "g": self.generator}

    def backward(self, name: Half, step: int, micro: int, scale: float) -> dict[str, float]:
        """Add the gradient of scale x the loss of one micro-batch to module `name`; returns what is worth logging."""
        sample, waited = timed(self.draw, name, step, micro)
        if name == "d":
            return {**self._discriminate(sample, scale), "data_seconds": waited}
        # Frozen: the gradient goes through it to the restored sample, and leaves nothing in it.
        self.discriminator.requires_grad_(False)
        try:
            return {**self._generate(sample, scale), "data_seconds": waited}
        finally:
            self.discriminator.requires_grad_(True)

    @property
    def restarted(self) -> tuple[str, ...]:
        """See `loop.Restarting`."""
        return ("d",) if self.config.disc.reset_on_phase else ()

    def restarts(self, before: int, step: int) -> bool:
        """Whether images alone were what there was until `before`, and there are clips at `step`."""
        first, then = (phase_at(at, self.config.run.steps, self.config.curriculum) for at in (before, step))
        return first.frames == (1,) != then.frames

    def validate(self, module: nn.Module) -> dict[str, float]:
        return latent_errors(module, self.latents, steps=(1,), captions=self.config.text.mode == "caption")

    def preview(self, module: nn.Module) -> list[Preview]:
        return latent_previews(module, self.latents, steps=1, captions=self.config.text.mode == "caption")

    def draw(self, half: Half, step: int, micro: int) -> Sample:
        """The batch of half a step; the two halves never share one."""
        config, device = self.config, self.generator.device
        seed = key(config.run.seed, f"apt/{half}", step, micro)
        pairs = draw_pairs(self.latents, config, half, step, micro)
        real, captions = pairs.hq, pairs.texts if config.text.mode == "caption" else None
        u = torch.rand(len(real), generator=torch_rng(seed, "t_D"))
        return Sample(
            real=real.to(device),
            condition=noised_condition(pairs.lq, seed, step, config.condition_noise).to(device),
            noise=gaussian(real, seed, "noise").to(device),
            u=shift(u, config.disc.t_shift[real.shape[2] > 1]).to(device),
            texts=self.texts.choose(step, micro, len(real), captions),
            seed=seed,
        )

    def restore(self, sample: Sample) -> Tensor:
        """One step from pure noise: b c t h w."""
        u = torch.ones_like(sample.u)
        velocity = sample.texts.velocity(self.generator, sample.noise, sample.condition, u)
        return to_data(sample.noise, velocity, 1.0)

    def _judge(self, samples: Tensor, sample: Sample, copies: int = 1) -> tuple[Tensor, list[Tensor]]:
        """Logits and features of `copies` sets of samples that share conditions, texts and times."""
        condition = sample.condition.repeat(copies, 1, 1, 1, 1)
        texts = sample.texts.embeddings(self.prompt.to(samples)) * copies
        return self.discriminator(samples, condition, texts, sample.u.repeat(copies))

    def members(self, sample: Sample, restored: Tensor) -> dict[str, Tensor]:
        """What the discriminator is shown: real and restored samples, and both with a little noise if penalised."""
        loss, sigma = self.config.loss, self.config.loss.sigma
        shown = {"r": sample.real, "f": restored}
        if loss.r1:
            shown["r_near"] = sample.real + sigma * gaussian(sample.real, sample.seed, "eps_r1")
        if loss.r2:
            shown["f_near"] = restored + sigma * gaussian(restored, sample.seed, "eps_r2")
        return shown

    def _discriminate(self, sample: Sample, scale: float) -> dict[str, float]:
        with torch.no_grad():
            shown = self.members(sample, self.restore(sample))
        backward = self._joint if self.config.disc.backward == "joint" else self._replay
        return backward(sample, shown, scale)

    def _joint(self, sample: Sample, shown: dict[str, Tensor], scale: float) -> dict[str, float]:
        """All members in one packed sequence and one graph."""
        logits, _ = self._judge(torch.cat(list(shown.values())), sample, copies=len(shown))
        loss, scalars = discriminator_loss(dict(zip(shown, logits.chunk(len(shown)), strict=True)), self.config.loss)
        (scale * loss).backward()
        return scalars

    def _replay(self, sample: Sample, shown: dict[str, Tensor], scale: float) -> dict[str, float]:
        """The loss depends on a few logits a pair: take its gradient to those, then evaluate one member at a time."""
        with torch.no_grad():
            logits = {name: self._judge(samples, sample)[0] for name, samples in shown.items()}
        leaves = {name: logit.detach().requires_grad_() for name, logit in logits.items()}
        loss, scalars = discriminator_loss(leaves, self.config.loss)
        gradients = torch.autograd.grad(scale * loss, list(leaves.values()))
        for samples, gradient in zip(shown.values(), gradients, strict=True):
            self._judge(samples, sample)[0].backward(gradient=gradient)
        return scalars

    def _generate(self, sample: Sample, scale: float) -> dict[str, float]:
        config = self.config.loss
        with torch.no_grad():
            r, real_features = self._judge(sample.real, sample)
        restored = self.restore(sample)
        f, features = self._judge(restored, sample)
        adv = losses.relativistic_g(r, f) if config.adv == "rp" else losses.non_saturating_g(r, f)
        distances = losses.feature_distances(features, real_features)
        l1 = losses.l1(restored, sample.real)
        fidelity = losses.relative_l1(restored, sample.real, sample.condition) if config.relative_1 else l1
        # A term that is switched off is not multiplied by 0: nothing of it is kept or computed backwards.
        terms = ((config.w_adv, adv), (config.w_1, fidelity), (config.w_F, distances.mean()))
        loss = sum(weight * term for weight, term in terms if weight)
        (scale * loss).backward()
        taps = zip(self.discriminator.taps, distances.tolist(), strict=True)
        return {
            "g_loss": loss.item(),
            "g_adv": adv.item(),
            "l1": l1.item(),
            "feature_matching": distances.mean().item(),
            **{f"feature_{tap}": distance for tap, distance in taps},
            **comparison(restored.detach(), sample.real),
            "frames": LATENT_FRAMES * (restored.shape[2] - 1) + 1,
            **cost(restored),
        }


def gaussian(like: Tensor, seed: int, purpose: str) -> Tensor:
    """Unit Gaussian noise of a tensor's shape, the same on every device, never in less than fp32."""
    noise = torch.randn(like.shape, generator=torch_rng(seed, purpose))
    return noise.to(like.device, torch.promote_types(like.dtype, torch.float32))


def discriminator_loss(logits: Mapping[str, Tensor], config: LossConfig) -> tuple[Tensor, dict[str, float]]:
    """L_D of paired logits b of real "r" and restored "f" samples, and of the perturbed ones that are penalised."""
    r, f = logits["r"], logits["f"]
    adv = losses.relativistic_d(r, f) if config.adv == "rp" else losses.non_saturating_d(r, f)
    penalty = adv.new_zeros(())
    gap = (r - f).detach()
    scalars = {
        "r": r.mean().item(),
        "f": f.mean().item(),
        "gap": gap.mean().item(),
        "gap_std": gap.std(correction=0).item(),
        "accuracy": ((gap > 0).double() + 0.5 * (gap == 0)).mean().item(),
        "d_adv": adv.item(),
    }
    for name, member, weight in (("ar1", "r", config.r1), ("ar2", "f", config.r2)):
        if weight:
            value = losses.approximate_penalty(logits[member], logits[f"{member}_near"])
            penalty = penalty + weight * value
            scalars[name] = value.item()
    loss = adv + penalty
    return loss, {"d_loss": loss.item(), **scalars, "penalty_ratio": (penalty / adv).item()}


@torch.no_grad()
def comparison(restored: Tensor, real: Tensor) -> dict[str, float]:
    """How much there is of everything in restored latents b c t h w, against the real ones; 1 is right.

    The spread over height and width of a channel (mean, least and most over channels), and the energy of what a 3 x 3
    mean takes away.
    """
    spread, target = (x.std(dim=(-2, -1)).mean(dim=(0, 2)) for x in (restored, real))
    ratio = spread / target.clamp_min(1e-6)
    return {
        "std_ratio": ratio.mean().item(),
        "std_ratio_min": ratio.min().item(),
        "std_ratio_max": ratio.max().item(),
        "high_frequency_ratio": losses.high_frequency_ratio(restored, real).item(),
    }


def load_stage(config: PostTraining, latents: Latents) -> AdversarialStage:
    """The stage with the weights of the stages before it.

    Raises:
        CheckpointError: one of them has not been run.
    """
    start = config.distilled if config.init == "distilled" else config.pretrained
    generator, pretrained = load_run(start, config.model), load_run(config.pretrained, config.model)
    return AdversarialStage(config, latents, generator, pretrained)


def workload(config: PostTraining, sample: Grid | None = None) -> doctor.Workload:
    """Both halves of a step, for the estimate; `sample` is the size of a latent."""
    sample = sample or Grid(*doctor.sample_of(config))
    generator = doctor.on_meta(lambda: Restorer(config.model))
    discriminator = doctor.on_meta(lambda: Discriminator(config.model))
    x = torch.empty(deal_of(config).size(sample), 16, *sample, device="meta")
    return adversarial_workload(config, generator, discriminator, x, generator.prompt.detach())


def adversarial_workload(
    config: PostTraining,
    generator: nn.Module,
    discriminator: Discriminator,
    x: Tensor,
    prompt: Tensor,
    helpers: Mapping[str, nn.Module] | None = None,
) -> doctor.Workload:
    """The same for any two modules that play this game, on latents b 16 t h w."""
    u = torch.empty(len(x), device="meta")
    prompts = [prompt] * len(x)
    # Replay evaluates all four members, and then holds one at a time.
    copies = 4 if config.disc.backward == "joint" else 1

    def judge(count: int) -> Tensor:
        copied = x.repeat(count, 1, 1, 1, 1)
        return discriminator(copied, copied, prompts * count, u.repeat(count)).logits.sum()

    def generate() -> Tensor:
        with torch.no_grad():
            _, real = discriminator(x, x, prompts, u)
        critique = discriminator(generator.velocity(x, x, u), x, prompts, u)
        return critique.logits.sum() + losses.feature_distances(critique.features, real).mean()

    def assists() -> None:
        generator.velocity(x, x, u)
        if copies == 1:
            # The other three forwards and backwards are as much work as nine forwards.
            judge(4 + 9)

    return doctor.Workload(
        trained={"d": (discriminator, config.d), "g": (generator, config.g)},
        helpers=helpers or {},
        forward=lambda: judge(copies),
        assists=assists,
        samples=len(x),
        others=((generate, discriminator),),
    )


def main() -> None:
    command = parse_command("apt", RECIPES)
    config: PostTraining = command.config
    if command.dry_run:
        print(doctor.estimate(config, workload(config)))
        return
    session = loop.open_session(command, config)
    stage = load_stage(loop.resolved(config, session), Latents(command.data, config.run.seed, session.processes.device))
    loop.run(stage, config, {"d": config.d, "g": config.g}, command.out, session)


if __name__ == "__main__":
    run_main(main)
