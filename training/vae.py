"""Stage 0: the causal video autoencoder. `python -m training.vae --config nano --out runs/vae --data DIR`

Training starts from a linear codec (see `linear_start`) and takes pictures and clips in turn; a picture goes through
the causal network as through a 2-D one, at a third of the cost.

Source: SeedVR, arXiv 2501.01320, section 3; loss terms as there, weights and curriculum ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from seedvr2_core.models.vae import VAEConfig, VideoVAE, posterior

from . import doctor, loop, losses, state
from .config import OptimConfig, RunConfig, parse_command, setting
from .data import CLIP_SUFFIXES, IMAGE_SUFFIXES, Dataset, decode, list_media
from .guards import GuardConfig
from .linear_start import start_linear
from .previews import Preview
from .randomness import torch_rng

# Small enough for a CPU and for the repository; the same code as the published autoencoder.
NANO_VAE = VAEConfig(widths=(16, 32, 64, 96), blocks=1, groups=4, scale=1.0)
# Held-out crops shown while training.
PREVIEWS = 3


@dataclass(frozen=True, kw_only=True)
class Crops:
    """One kind of batch: `batch` crops of `frames` x `size` x `size` pixels."""

    batch: int = setting(about="crops of a micro-batch", least=1)
    size: int = setting(about="side in pixels, a multiple of 16", least=16)
    frames: int = setting(1, "4n+1", least=1)


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """Everything a run of this stage depends on."""

    model: VAEConfig
    run: RunConfig
    optim: OptimConfig
    crops: tuple[Crops, ...] = setting(about="taken in turn, one kind a step", frozen=True)
    guard: GuardConfig = GuardConfig()
    init: Path | None = setting(None, "run directory whose averaged weights to start from; none: a linear codec")
    # The encoder defines what every transformer was trained on.
    freeze_encoder: bool = setting(False, "train the decoder alone")
    w_kl: float = setting(1e-6, "weight of the KL divergence", least=0)
    w_spectral: float = setting(0.01, "weight of the spectral loss", least=0)


NANO = VAETraining(
    model=NANO_VAE,
    run=RunConfig(steps=1500, ema=0.995, validate_every=250),
    optim=OptimConfig(lr=4e-4, final_lr=1e-5, weight_decay=0.0, full_rate_inputs=50),
    crops=(Crops(batch=2, size=128, frames=5), Crops(batch=8, size=128), Crops(batch=2, size=96, frames=9)),
)
RECIPES = {
    "nano": NANO,
    # More texture for a little fidelity, behind the same latents.
    "nano_decoder": replace(
        NANO,
        run=RunConfig(steps=300, seed=4, ema=0.98, validate_every=100),
        optim=replace(NANO.optim, lr=2e-4, warmup=30),
        init=Path("runs/vae"),
        freeze_encoder=True,
        w_spectral=0.1,
    ),
}


class VAEStage:
    """Reconstruct: L1 + spectral + KL."""

    averaged = "g"

    def __init__(self, config: VAETraining, data: Dataset, held_out: Sequence[Tensor]):
        self.config, self.data, self.held_out = config, data, held_out
        torch.manual_seed(config.run.seed)
        if config.init:
            vae = load_run(config.init, config.model).train()
        else:
            vae = VideoVAE(config.model)
            start_linear(vae, data.sample_batch(0, batch=256, size=128).squeeze(2))
        vae.encoder.requires_grad_(not config.freeze_encoder)
        self.modules: Mapping[str, VideoVAE] = {"g": vae}

    def backward(self, name: str, step: int, micro: int, scale: float) -> dict[str, float]:
        config, vae = self.config, self.modules[name]
        crops = config.crops[step % len(config.crops)]
        kind = "image" if crops.frames == 1 else "clip"
        place = step * config.run.micro_batches + micro
        clip = self.data.sample_batch(place, kind=kind, batch=crops.batch, size=crops.size, frames=crops.frames)
        clip = clip.to(next(vae.parameters()).device)
        mean, std = posterior(vae.encode(clip, None))
        noise = torch.randn(mean.shape, generator=torch_rng(config.run.seed, "posterior", step, micro))
        restored = vae.decode(mean + std * noise.to(mean.device), None)
        l1 = (restored - clip).abs().mean()
        spectral = losses.spectral(restored, clip)
        kl = losses.kl(mean, std)
        loss = l1 + config.w_spectral * spectral + config.w_kl * kl
        (scale * loss).backward()
        return {
            "loss": loss.item(),
            "l1": l1.item(),
            "spectral": spectral.item(),
            "kl": kl.item(),
            "std": std.mean().item(),
            "frames": crops.frames,
            "samples": crops.batch,
        }

    def validate(self, module: nn.Module) -> dict[str, float]:
        errors = {"image": [], "clip": []}
        for clip in self.held_out:
            restored = reconstruct(module, clip)
            mse = (restored - clip).square().mean() / 4
            errors["image" if clip.shape[2] == 1 else "clip"].append(-10 * torch.log10(mse).item())
        return {f"psnr_{kind}": sum(values) / len(values) for kind, values in errors.items() if values}

    def preview(self, module: nn.Module) -> list[Preview]:
        """The first pictures and clips; nothing is degraded here, so the given ones are the wanted ones."""
        shown = []
        for index, clip in enumerate(self.held_out[:PREVIEWS]):
            given, restored = (x[0].transpose(0, 1) / 2 + 0.5 for x in (clip, reconstruct(module, clip)))
            shown.append(Preview(f"{index:02d}", given, restored, given))
        return shown


def reconstruct(vae: VideoVAE, clip: Tensor) -> Tensor:
    """A clip b 3 T H W in -1..1 through the autoencoder and back, without posterior noise; on the CPU."""
    mean, _ = posterior(vae.encode(clip.to(next(vae.parameters()).device)))
    return vae.decode(mean).clamp(-1, 1).cpu()


def load_run(directory: Path, config: VAEConfig) -> VideoVAE:
    """The averaged weights of a run of this stage."""
    vae = VideoVAE(config)
    vae.load_state_dict(state.load_averaged(directory))
    return vae.eval()


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


def main() -> None:
    command = parse_command("vae", RECIPES)
    config: VAETraining = command.config
    if command.dry_run:
        print(doctor.estimate(config, doctor.of_autoencoder(config)))
        return
    session = loop.open_session(command, config)
    stage = VAEStage(config, Dataset.load(command.data), held_out_crops(command.data))
    loop.run(stage, config, {"g": config.optim}, command.out, session)


if __name__ == "__main__":
    main()
