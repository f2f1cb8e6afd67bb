"""Stage 0: the causal video autoencoder. `python -m training.vae --config nano --out runs/vae --data DIR`

Training starts from a linear codec (see `linear_start`) and takes pictures and clips in turn; a picture goes through
the causal network as through a 2-D one, at a third of the cost. Where `w_g` is above 0 a discriminator of pixels joins
after a share of the steps: one step then updates it on one batch and the autoencoder on another.

    b clips   c channels   T H W pixel frames, height, width

Source: SeedVR, arXiv 2501.01320, section 3; loss terms as there, weights and curriculum ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from seedvr2_core.errors import SettingError
from seedvr2_core.models.vae import SEEDVR2_VAE, VAEConfig, VideoVAE, posterior

from . import doctor, loop, losses
from .config import OptimConfig, ParallelConfig, RunConfig, parse_command, run_main, setting
from .data import CLIP_SUFFIXES, IMAGE_SUFFIXES, DataConfig, Dataset, decode, list_media
from .guards import GuardConfig
from .journal import timed
from .linear_start import start_linear
from .patch_discriminator import PatchConfig, PatchDiscriminator
from .perceptual import NO_WEIGHTS, MetricMissing, library
from .previews import Preview
from .randomness import key, torch_rng
from .weights import open_vae

# Small enough for a CPU and for the repository; the same code as the published autoencoder.
NANO_VAE = VAEConfig(widths=(16, 32, 64, 96), blocks=1, groups=4, scale=1.0)
# Held-out crops shown while training.
PREVIEWS = 3
# Frames of a micro-batch that LPIPS looks at: enough for its mean, and it would be most of the memory otherwise.
LPIPS_FRAMES = 8
# Of the adversarial term's weight, where that is adaptive. Source: as `losses.gradient_ratio`, by common practice.
ADAPTIVE_SHARE = 0.5
# By name: the discriminator's loss and the autoencoder's, of logits of real and of restored patches.
GAMES = {
    "hinge": (losses.hinge_d, losses.hinge_g),
    "rp": (losses.relativistic_d, losses.relativistic_g),
}
# The name under which the discriminator's loss is logged. Guards know what to expect of "d_adv", with ln 2 where real
# and restored look alike; a hinge has other values, and no guard.
LOGGED = {"hinge": "d_hinge", "rp": "d_adv"}


@dataclass(frozen=True, kw_only=True)
class Crops:
    """One kind of batch: `batch` crops of `frames` x `size` x `size` pixels."""

    batch: int = setting(about="crops of a micro-batch", least=1)
    size: int = setting(about="side in pixels, a multiple of 16", least=16)
    frames: int = setting(1, "frames of a clip, 4n+1; 1: pictures", least=1)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch at the beginning of a run, and its crops."""

    share: float = setting(about="of the steps", least=0, most=1)
    crops: tuple[Crops, ...] = setting(about="taken in turn, one kind a step")


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The term that asks for the right texture beside the right pixels."""

    kind: Literal["spectral", "lpips-vgg", "none"] = setting("spectral", "LPIPS needs torchmetrics")
    weight: float = setting(0.01, "of the term", least=0)


@dataclass(frozen=True, kw_only=True)
class DiscConfig:
    """The discriminator of pixels, and its game."""

    model: PatchConfig = PatchConfig()
    optim: OptimConfig = OptimConfig(lr=1e-4, final_lr=1e-4, betas=(0.5, 0.9), weight_decay=0.0, warmup=0, decay=0.0)
    loss: Literal["hinge", "rp"] = setting("hinge", "hinge, or relativistic pairing of patches at one place")


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """Everything a run of this stage depends on."""

    model: VAEConfig
    run: RunConfig
    optim: OptimConfig
    crops: tuple[Crops, ...] = setting(about="taken in turn, one kind a step", frozen=True)
    curriculum: tuple[Phase, ...] = setting((), "stretches before that of `crops`, which has the rest", frozen=True)
    guard: GuardConfig = GuardConfig()
    init: Path | None = setting(None, "run, checkpoint or published name to start from; none: see start")
    # The linear codec is made for one block a stage and widths that all differ.
    start: Literal["linear", "random"] = setting("linear", "without init: the best linear codec, or random weights")
    # The encoder defines what every transformer was trained on.
    freeze_encoder: bool = setting(False, "train the decoder alone")
    data: DataConfig = DataConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    w_kl: float = setting(1e-6, "weight of the KL divergence", least=0)
    w_g: float = setting(0.0, "weight of the adversarial term; 0: there is no discriminator", least=0)
    adv_from: float = setting(0.4, "share of the steps after which there is a discriminator", least=0, most=1)
    adaptive: bool = setting(False, "multiply w_g by half the ratio of both gradients at the restored clip")
    disc: DiscConfig = DiscConfig()


NANO = VAETraining(
    model=NANO_VAE,
    run=RunConfig(steps=2400, ema=0.995, validate_every=300, parallel=ParallelConfig(precision="bf16")),
    optim=OptimConfig(lr=4e-4, final_lr=1e-5, weight_decay=0.0, full_rate_inputs=50),
    crops=(Crops(batch=2, size=128, frames=5), Crops(batch=8, size=128), Crops(batch=2, size=96, frames=9)),
)
# Of the published size. Pictures are every fifth batch beside clips, as in open recipes.
_PICTURES, _SHORT = Crops(batch=8, size=256), Crops(batch=3, size=256, frames=5)
_LONG = Crops(batch=1, size=256, frames=17)
RECIPES = {
    "nano": NANO,
    # More texture for a little fidelity, behind the same latents.
    "nano_decoder": replace(
        NANO,
        run=replace(NANO.run, steps=800, seed=4, validate_every=100),
        # Gently: at NANO's rates and batches the marks that its four frames a latent leave in moving wool get stronger.
        optim=replace(NANO.optim, lr=2e-4, final_lr=2e-5, betas=(0.5, 0.9), decay=0.3),
        crops=(Crops(batch=1, size=128, frames=5), Crops(batch=4, size=128)),
        init=Path("runs/vae"),
        freeze_encoder=True,
        perceptual=PerceptualConfig(weight=0.3),
    ),
    # 160 clips a step as in the paper, five micro-batches on each of 32 GPUs: a clip takes 20 GiB of activations.
    "published": VAETraining(
        model=SEEDVR2_VAE,
        run=RunConfig(
            steps=115_000, micro_batches=160, ema=0.999, save_every=500, parallel=ParallelConfig(precision="bf16")
        ),
        optim=OptimConfig(lr=1e-4, final_lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, warmup=1000, decay=0.0),
        crops=(_LONG, _LONG, _LONG, _LONG, _PICTURES),
        curriculum=(
            Phase(share=0.3, crops=(_PICTURES,)),
            Phase(share=0.2, crops=(_SHORT, _SHORT, _SHORT, _SHORT, _PICTURES)),
        ),
        guard=GuardConfig(on_spike="alert"),
        start="random",
        perceptual=PerceptualConfig(kind="lpips-vgg", weight=1.0),
        w_g=0.05,
    ),
}


def crops_at(step: int, config: VAETraining) -> Crops:
    """The kind of batch of a step: of its phase, taken in turn."""
    done = 0.0
    for phase in config.curriculum:
        done += phase.share
        if step < config.run.steps * done:
            return phase.crops[step % len(phase.crops)]
    return config.crops[step % len(config.crops)]


def optims(config: VAETraining) -> dict[str, OptimConfig]:
    """Of every module that is trained, for the loop."""
    return {"d": config.disc.optim, "g": config.optim} if config.w_g else {"g": config.optim}


class VAEStage:
    """Reconstruct: L1 + perceptual + KL, and from `adv_from` on a discriminator's opinion."""

    averaged = "g"

    def __init__(self, config: VAETraining, data: Dataset, held_out: Sequence[Tensor]):
        self.config, self.data, self.held_out = config, data, held_out
        self.compute = torch.float32 if config.run.parallel.precision == "fp32" else torch.bfloat16
        torch.manual_seed(config.run.seed)
        self.vae = start(config, data)
        self.vae.encoder.requires_grad_(not config.freeze_encoder)
        self.lpips = open_lpips() if config.perceptual.kind == "lpips-vgg" else None
        self.modules: Mapping[str, nn.Module] = {"g": self.vae}
        if config.w_g:
            torch.manual_seed(key(config.run.seed, "vae/patches"))
            self.critic = PatchDiscriminator(config.disc.model)
            self.modules = {"d": self.critic, "g": self.vae}

    def is_game(self, step: int) -> bool:
        """Whether there is a discriminator in this step."""
        return bool(self.config.w_g) and step >= self.config.adv_from * self.config.run.steps

    def backward(self, name: str, step: int, micro: int, scale: float) -> dict[str, float]:
        """See `loop.Stage`; {} where the discriminator's time has not come."""
        if name == "d":
            return self._discriminate(step, micro, scale) if self.is_game(step) else {}
        if not self.is_game(step):
            return self._reconstruct(step, micro, scale)
        # Frozen: the gradient goes through it to the restored clip, and leaves nothing in it.
        self.critic.requires_grad_(False)
        try:
            return self._reconstruct(step, micro, scale)
        finally:
            self.critic.requires_grad_(True)

    def _discriminate(self, step: int, micro: int, scale: float) -> dict[str, float]:
        # Batches of the discriminator are counted down from -1, those of the autoencoder up from 0: none is shared.
        clip, waited = timed(self.draw, step, -1 - self.place(step, micro))
        with torch.no_grad():
            restored = self.restore(clip, "d", step, micro)[0]
        r, f = self.critic(clip), self.critic(restored)
        game = self.config.disc.loss
        loss = GAMES[game][0](r, f)
        (scale * loss).backward()
        gap = (r - f).detach()
        return {
            "d_loss": loss.item(),
            LOGGED[game]: loss.item(),
            "r": r.mean().item(),
            "f": f.mean().item(),
            "gap": gap.mean().item(),
            "accuracy": ((gap > 0).double() + 0.5 * (gap == 0)).mean().item(),
            "data_seconds": waited,
        }

    def _reconstruct(self, step: int, micro: int, scale: float) -> dict[str, float]:
        config = self.config
        clip, waited = timed(self.draw, step, self.place(step, micro))
        restored, mean, std = self.restore(clip, "posterior", step, micro)
        l1, kl = losses.l1(restored, clip), losses.kl(mean, std)
        scalars = {"l1": l1.item(), "kl": kl.item(), "std": std.mean().item()}
        loss = l1
        if config.perceptual.kind != "none":
            term = self.perceptual(restored, clip, step, micro)
            scalars[config.perceptual.kind.partition("-")[0]] = term.item()
            loss = loss + config.perceptual.weight * term
        if self.is_game(step):
            weight, adv = self.adversarial(loss, restored, clip)
            scalars |= {"g_adv": adv.item(), "adv_weight": float(weight)}
            loss = loss + weight * adv
        loss = loss + config.w_kl * kl
        (scale * loss).backward()
        scalars["high_frequency_ratio"] = losses.high_frequency_ratio(restored.detach(), clip).item()
        return {"loss": loss.item(), **scalars, "frames": clip.shape[2], "data_seconds": waited, "samples": len(clip)}

    def place(self, step: int, micro: int) -> int:
        """Number of a micro-batch within the run."""
        return step * self.config.run.micro_batches + micro

    def draw(self, step: int, place: int) -> Tensor:
        """A batch of a step's kind: b 3 T H W in -1..1."""
        crops = crops_at(step, self.config)
        kind = "image" if crops.frames == 1 else "clip"
        clip = self.data.sample_batch(place, kind=kind, batch=crops.batch, size=crops.size, frames=crops.frames)
        return clip.to(next(self.vae.parameters()).device)

    def restore(self, clip: Tensor, purpose: str, step: int, micro: int) -> tuple[Tensor, Tensor, Tensor]:
        """A clip through the autoencoder and back, with posterior noise; and mean and deviation of the posterior."""
        mean, std = posterior(self.vae.encode(clip.to(self.compute), None).float())
        noise = torch.randn(mean.shape, generator=torch_rng(self.config.run.seed, purpose, step, micro))
        latent = mean + std * noise.to(mean.device)
        return self.vae.decode(latent.to(self.compute), None).float(), mean, std

    def perceptual(self, restored: Tensor, clip: Tensor, step: int, micro: int) -> Tensor:
        """The perceptual term between clips b 3 T H W; LPIPS of a few frames drawn at random."""
        if self.lpips is None:
            return losses.spectral(restored, clip)
        restored, clip = (rearrange(x, "b c t h w -> (b t) c h w") for x in (restored, clip))
        order = torch.randperm(len(clip), generator=torch_rng(self.config.run.seed, "lpips", step, micro))
        index = order[:LPIPS_FRAMES].to(clip.device)
        return self.lpips.to(clip.device)(restored[index], clip[index]).mean()

    def adversarial(self, reconstruction: Tensor, restored: Tensor, clip: Tensor) -> tuple[Tensor | float, Tensor]:
        """The weight and the value of the adversarial term; `reconstruction` is the loss of all terms on pixels."""
        with torch.no_grad():
            r = self.critic(clip)
        adv = GAMES[self.config.disc.loss][1](r, self.critic(restored))
        if not self.config.adaptive:
            return self.config.w_g, adv
        return self.config.w_g * ADAPTIVE_SHARE * losses.gradient_ratio(reconstruction, adv, restored), adv

    def validate(self, module: nn.Module) -> dict[str, float]:
        """PSNR, and how much fine detail there is (1: as much as in the real ones), of pictures and of clips."""
        scores: dict[str, list[float]] = {}
        for clip in self.held_out:
            restored = reconstruct(module, clip, self.compute)
            kind = "image" if clip.shape[2] == 1 else "clip"
            mse = (restored - clip).square().mean() / 4
            scores.setdefault(f"psnr_{kind}", []).append(-10 * torch.log10(mse).item())
            scores.setdefault(f"detail_{kind}", []).append(losses.high_frequency_ratio(restored, clip).item())
        return {name: sum(values) / len(values) for name, values in sorted(scores.items())}

    def preview(self, module: nn.Module) -> list[Preview]:
        """The first pictures and clips; nothing is degraded here, so the given ones are the wanted ones."""
        shown = []
        for index, clip in enumerate(self.held_out[:PREVIEWS]):
            restored = reconstruct(module, clip, self.compute)
            given, restored = (x[0].transpose(0, 1) / 2 + 0.5 for x in (clip, restored))
            shown.append(Preview(f"{index:02d}", given, restored, given))
        return shown


def start(config: VAETraining, data: Dataset) -> VideoVAE:
    """The autoencoder as training finds it.

    Raises:
        CheckpointError: there is nothing at `init`.
        SettingError: what is there has other sizes than `model`.
    """
    if config.init:
        vae = open_vae(config.init).train()
        # How latents are scaled is of no concern here, and known only after training.
        if replace(vae.config, scale=config.model.scale) != config.model:
            raise SettingError(f"{config.init} holds an autoencoder of other sizes than asked for: {vae.config}, not "
                               f"{config.model}; set model to the first, or init to none.")
        return vae
    vae = VideoVAE(config.model)
    if config.start == "linear":
        # One latent is of the first frame of a clip, the next of four; a picture is four frames that do not move.
        pictures = data.sample_batch(0, batch=192, size=128).expand(-1, -1, 4, -1, -1)
        clips = data.sample_batch(0, kind="clip", batch=64, size=128, frames=5)[:, :, 1:]
        start_linear(vae, torch.cat([pictures, clips]))
    return vae


def open_lpips() -> nn.Module:
    """LPIPS on VGG: frames n 3 H W in -1..1, twice, to distances with gradients.

    Raises:
        MetricMissing: torchmetrics or its weights are not on this machine, nor to be had.
    """
    build = library("torchmetrics.image.lpip", "torchmetrics[image]").LearnedPerceptualImagePatchSimilarity
    try:
        return build(net_type="vgg").net.eval().requires_grad_(False)
    except (ImportError, *NO_WEIGHTS) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MetricMissing(f"LPIPS cannot be opened ({reason}); install torchmetrics[image] and download its weights, "
                            "or set perceptual.kind=spectral.") from error


def reconstruct(vae: VideoVAE, clip: Tensor, compute: torch.dtype = torch.float32) -> Tensor:
    """A clip b 3 T H W in -1..1 through the autoencoder and back, without posterior noise; fp32, on the CPU."""
    mean, _ = posterior(vae.encode(clip.to(next(vae.parameters()).device, compute)))
    return vae.decode(mean).float().clamp(-1, 1).cpu()


def held_out_crops(root: Path, size: int = 256, frames: int = 9) -> list[Tensor]:
    """The middle of every evaluation picture and clip, 1 3 T size size in -1..1."""
    crops = []
    held_out = root / "eval"
    paths = [*list_media(held_out / "images", IMAGE_SUFFIXES), *list_media(held_out / "clips", CLIP_SUFFIXES)]
    for path in paths:
        pixels = torch.from_numpy(decode(path)[:frames].copy()).permute(3, 0, 1, 2)
        top, left = ((side - size) // 2 for side in pixels.shape[2:])
        crops.append(pixels[None, :, :, top : top + size, left : left + size] / 127.5 - 1)
    return crops


def workload(config: VAETraining) -> doctor.Workload:
    """The autoencoder's half of a step on the largest crops, with a discriminator if there ever is one."""
    vae = doctor.on_meta(lambda: VideoVAE(config.model))
    vae.encoder.requires_grad_(not config.freeze_encoder)
    crops = doctor.largest((*config.crops, *(crops for phase in config.curriculum for crops in phase.crops)))
    clip = torch.empty(crops.batch, 3, crops.frames, crops.size, crops.size, device="meta")

    def restore() -> tuple[Tensor, Tensor]:
        mean, std = posterior(vae.encode(clip, None))
        restored = vae.decode(mean + std * mean, None)
        return restored, losses.l1(restored, clip) + losses.spectral(restored, clip) + losses.kl(mean, std)

    if not config.w_g:
        return doctor.Workload({"g": (vae, config.optim)}, {}, lambda: restore()[1], lambda: None, crops.batch)
    critic = doctor.on_meta(lambda: PatchDiscriminator(config.disc.model))

    def forward() -> Tensor:
        restored, loss = restore()
        return loss + critic(restored).mean()

    def assists() -> None:
        # The discriminator's half: one restoration, and forward and backward of two clips; a real one in the other.
        restore()
        for _ in range(2 * (1 + doctor.BACKWARD) + 1):
            critic(clip)

    trained = {"d": (critic, config.disc.optim), "g": (vae, config.optim)}
    return doctor.Workload(trained, {}, forward, assists, crops.batch)


def main() -> None:
    command = parse_command("vae", RECIPES)
    config: VAETraining = command.config
    if command.dry_run:
        print(doctor.estimate(config, workload(config)))
        return
    session = loop.open_session(command, config)
    data = Dataset.load(command.data, config.data)
    stage = VAEStage(loop.resolved(config, session), data, held_out_crops(command.data))
    loop.run(stage, config, optims(config), command.out, session)


if __name__ == "__main__":
    run_main(main)
