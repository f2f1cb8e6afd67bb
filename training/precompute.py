"""Latents of (clean, degraded) pairs, computed once. `python -m training.precompute --config nano --out runs/latents`

Degrading and encoding take longer than the step that uses them. For every kind of crop the run directory gets a file of
pixel pairs and one of latents; whatever is there already is kept.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from seedvr2_core.device import pick_dtype
from seedvr2_core.models.vae import VideoVAE, posterior

from .config import parse_command
from .data import DataConfig, Kind, PairJob, write_pairs
from .vae import RECIPES as VAE_RECIPES
from .vae import load_run

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PairCrops:
    """`count` pairs of `frames` x `size` x `size` pixels."""

    kind: Kind
    count: int
    size: int
    frames: int = 1


@dataclass(frozen=True, kw_only=True)
class Precompute:
    """Everything the latents depend on."""

    vae: Path
    crops: tuple[PairCrops, ...]
    degradation: str = "nano_mixed"
    batch: int = 16
    seed: int = 1
    workers: int = 2


RECIPES = {
    "nano": Precompute(
        vae=Path("runs/vae"),
        crops=(
            PairCrops(kind="image", count=10_000, size=192),
            PairCrops(kind="clip", count=2_500, size=128, frames=5),
        ),
    )
}


@torch.no_grad()
def encode_pairs(vae: VideoVAE, pairs: np.ndarray, batch: int) -> dict[str, Tensor]:
    """Posterior means of pairs n 2 3 T s s, uint8: {"hq": n 16 t h w, "lq": the same} in fp32, not scaled."""
    weight = next(vae.parameters())
    latents: dict[str, list[Tensor]] = {"hq": [], "lq": []}
    for start in tqdm(range(0, len(pairs), batch), desc="encode"):
        pixels = torch.from_numpy(pairs[start : start + batch].copy()).to(weight) / 127.5 - 1
        for name, clip in zip(latents, pixels.unbind(1), strict=True):
            latents[name].append(posterior(vae.encode(clip))[0].float())
    return {name: torch.cat(parts) for name, parts in latents.items()}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = parse_command("precompute", RECIPES)
    config: Precompute = command.config
    torch.set_num_threads(command.threads)
    vae = load_run(config.vae, VAE_RECIPES["nano"].model).to(pick_dtype("auto", torch.device("cpu")))
    for crops in config.crops:
        name = f"{crops.kind}_{crops.frames}x{crops.size}"
        target = command.out / f"{name}.safetensors"
        if target.exists():
            log.info("%s is there already.", target)
            continue
        job = PairJob(
            root=command.data,
            cache_dir=command.out / "sources",
            count=crops.count,
            kind=crops.kind,
            size=crops.size,
            frames=crops.frames,
            degradation=config.degradation,
            data=DataConfig(seed=config.seed),
        )
        pairs = np.load(write_pairs(command.out / f"{name}.npy", job, config.workers), mmap_mode="r")
        partial = target.with_suffix(".partial")
        save_file(encode_pairs(vae, pairs, config.batch), partial)
        partial.replace(target)
    (command.out / "config.json").write_text(json.dumps(asdict(config), indent=1, default=str))


if __name__ == "__main__":
    main()
