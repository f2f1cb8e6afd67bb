"""Averaged weights of finished runs -> checkpoints. `python -m training.export --vae runs/vae --dit runs/distill/01`

Writes nano_vae.safetensors and nano_dit.safetensors, bf16, with the published tensor names, the config in the metadata
and the prompt beside the weights, so that the command line and the nodes load them at once.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from seedvr2_core.checkpoints import save

from . import pretrain, vae
from .pretrain import NANO_DIT, Latents
from .vae import NANO_VAE


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="run directory of training.vae")
    parser.add_argument("--dit", type=Path, required=True, help="run directory of training.pretrain or a halving")
    parser.add_argument("--latents", type=Path, required=True, help="run directory of training.precompute")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    args = parser.parse_args()
    autoencoder = vae.load_run(args.vae, NANO_VAE)
    scale = round(Latents(args.latents, seed=0).scale, 4)
    save(
        args.out / "nano_vae.safetensors",
        autoencoder.bfloat16(),
        replace(NANO_VAE, scale=scale),
        metadata={"modelspec.title": "SeedVR2 nano VAE"},
    )
    restorer = pretrain.load_run(args.dit, NANO_DIT)
    prompts = {
        "positive_conditioning": restorer.prompt.data.bfloat16(),
        "negative_conditioning": torch.zeros_like(restorer.prompt.data).bfloat16(),
    }
    save(
        args.out / "nano_dit.safetensors",
        restorer.dit.bfloat16(),
        NANO_DIT,
        extra_tensors=prompts,
        metadata={"modelspec.title": "SeedVR2 nano"},
    )


if __name__ == "__main__":
    main()
