"""Stage 0: the causal video autoencoder. `python -m training.vae --config nano --out runs/vae --data DIR`

Training starts from a linear codec (see `linear_start`) and takes pictures and clips in turn; a picture goes through
the causal network as through a 2-D one, at a third of the cost.

Source: SeedVR, arXiv 2501.01320, section 3; loss terms as there, weights and curriculum ours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from seedvr2_core.models.vae import VAEConfig, VideoVAE, posterior

from . import loop, losses, state
from .config import OptimConfig, RunConfig, parse_command
from .data import CLIP_SUFFIXES, IMAGE_SUFFIXES, Dataset, decode, list_media
from .linear_start import start_linear
from .randomness import torch_rng

# Small enough for a CPU and for the repository; the same code as the published autoencoder.
NANO_VAE = VAEConfig(widths=(16, 32, 64, 96), blocks=1, groups=4, scale=1.0)


@dataclass(frozen=True, kw_only=True)
class Crops:
    """One kind of batch: `batch` crops of `frames` x `size` x `size` pixels."""

    batch: int
    size: int
    frames: int = 1


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """Everything a run of this stage depends on."""

    model: VAEConfig
    run: RunConfig
    optim: OptimConfig
    crops: tuple[Crops, ...]  # taken in turn, one kind a step
    init: Path | None = None  # run directory whose averaged weights to start from; None: a linear codec
    # Train the decoder alone: the encoder defines what every transformer was trained on.
    freeze_encoder: bool = False
    w_kl: float = 1e-6
    w_spectral: float = 0.01


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

    def __init__(self, config: VAETraining, data: Dataset, held_out: Sequence[Tensor]):
        self.config, self.data, self.held_out = config, data, held_out
        torch.manual_seed(config.run.seed)
        if config.init:
            self.module = load_run(config.init, config.model).train()
        else:
            self.module = VideoVAE(config.model)
            start_linear(self.module, data.sample_batch(0, batch=256, size=128).squeeze(2))
        self.module.encoder.requires_grad_(not config.freeze_encoder)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        crops = config.crops[step % len(config.crops)]
        kind = "image" if crops.frames == 1 else "clip"
        clip = self.data.sample_batch(step, kind=kind, batch=crops.batch, size=crops.size, frames=crops.frames)
        mean, std = posterior(self.module.encode(clip, None))
        noise = torch.randn(mean.shape, generator=torch_rng(config.run.seed, "posterior", step))
        restored = self.module.decode(mean + std * noise, None)
        l1 = (restored - clip).abs().mean()
        spectral = losses.spectral(restored, clip)
        kl = losses.kl(mean, std)
        scalars = {"l1": l1.item(), "spectral": spectral.item(), "kl": kl.item(), "frames": crops.frames}
        return l1 + config.w_spectral * spectral + config.w_kl * kl, scalars

    def validate(self, module: nn.Module) -> dict[str, float]:
        errors = {"image": [], "clip": []}
        for clip in self.held_out:
            restored = module.decode(posterior(module.encode(clip))[0]).clamp(-1, 1)
            mse = (restored - clip).square().mean() / 4
            errors["image" if clip.shape[2] == 1 else "clip"].append(-10 * torch.log10(mse).item())
        return {f"psnr_{kind}": sum(values) / len(values) for kind, values in errors.items() if values}


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
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = parse_command("vae", RECIPES)
    torch.set_num_threads(command.threads)
    # Numbers below 1e-38 appear in dying channels and are a hundred times slower on a CPU.
    torch.set_flush_denormal(True)
    stage = VAEStage(command.config, Dataset.load(command.data), held_out_crops(command.data))
    loop.run(stage, command.config.run, command.config.optim, command.out)


if __name__ == "__main__":
    main()
