"""What fewer bits and shared products cost, at the level of whole models. `python -m tests.bench.fp8`

Contenders are fp8 linear layers in the transformer, and convolutions whose results share products in the autoencoder;
each beside bf16, and all against fp32. On a CPU fp8 is emulated: the rounding is that of a GPU, the speed is not, so
nothing is timed. Decoded frames are compared as they are shown, in 0..1.

Models are nano, whose numbers are those of trained weights, and parts of the published sizes with random weights.
"""
# T H W pixel frames, height, width

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from seedvr2_core.checkpoints import load_dit, load_prompts, load_vae
from seedvr2_core.checkpoints.folders import NANO_DIT, NANO_VAE
from seedvr2_core.diffusion.conditioning import with_mask
from seedvr2_core.models.dit import SEEDVR2_3B, DiT
from seedvr2_core.models.linear import pack
from seedvr2_core.models.vae import SEEDVR2_VAE, VAEConfig, VideoVAE, posterior
from seedvr2_core.models.vae_fast import FastOptions, FastVAE
from seedvr2_core.video.geometry import Grid
from tests.bench.dit import QUICK_LAYERS, make_inputs
from tests.bench.measure import RESULTS, Options, build, environment, random, relative_l2
from tests.bench.vae import QUICK_VAE

# One layer of each kind: text with weights of its own, and sharing those of the video.
TWO_LAYERS = replace(SEEDVR2_3B, depth=2, separate_layers=1)
GRID, QUICK_GRID = Grid(2, 18, 32), Grid(1, 4, 6)
# Frames, height and width of the clip; a small one of trained weights, and what random weights are tried on.
CLIP, QUICK_CLIP = (9, 192, 256), (5, 32, 48)
LATENT, QUICK_LATENT = (1, 16, 2, 12, 16), (1, 16, 2, 3, 4)
# How convolutions may share products. Nano is narrower than any layer where that pays, so it does from 16 channels.
SHARING = {
    "direct": FastOptions(winograd_from=None),
    "frames": FastOptions(winograd_rows_from=None),
    "frames and rows": FastOptions(),
}
NARROW = 16


def psnr(frames: Tensor, reference: Tensor) -> float:
    """Decibels, of values in 0..1."""
    return -10 * math.log10((frames.double() - reference.double()).square().mean().clamp_min(1e-20).item())


def shown(clip: Tensor) -> Tensor:
    """A decoded clip, about -1..1, as it is shown."""
    return (clip.float() / 2 + 0.5).clamp(0, 1)


def synthetic_clip(frames: int, height: int, width: int) -> Tensor:
    """1 3 T H W in -1..1: shapes that move over a shading, with fine stripes and grain."""
    t, y, x = torch.meshgrid(
        torch.linspace(0, 1, frames), torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij"
    )
    disc = ((x - 0.3 - 0.3 * t).square() + (y - 0.5).square() < 0.04).float()
    stripes = torch.sin(2 * math.pi * (24 * x + 9 * y + t)).sign() * (y > 0.7)
    colours = [
        0.6 * (x * weight - 0.5) + 0.5 * disc * sign + 0.3 * stripes for weight, sign in ((1, 1), (2, -1), (0, 1))
    ]
    clip = torch.stack(colours)[None]
    return (clip + 0.05 * random(clip.shape, torch.float32, clip.device)).clamp(-1, 1)


def transformer_rows(device: torch.device, quick: bool) -> Iterator[dict]:
    """Relative L2 of the velocity of a few layers of the published width."""
    config, grid = (QUICK_LAYERS, QUICK_GRID) if quick else (TWO_LAYERS, GRID)
    velocities = {}
    for name, dtype, packing in (("fp32", torch.float32, None), ("bf16", torch.bfloat16, None),
                                 ("fp8", torch.bfloat16, "fp8")):  # fmt: skip
        dit = build(lambda: DiT(config), dtype, device)
        if packing:
            pack(dit, packing)
        velocities[name] = torch.stack(dit(*make_inputs(config, grid, dtype, device))).float().cpu()
    model = f"{config.depth} layers of {config.dim} channels, random"
    for name in ("bf16", "fp8"):
        yield row(model, "velocity", name, relative_l2(velocities[name], velocities["fp32"]))


def nano_rows(device: torch.device, quick: bool) -> Iterator[dict]:
    """Nano from frames to frames, with its linear layers in fp8 and without."""
    wide, half = load_vae(NANO_VAE, torch.float32, device), load_vae(NANO_VAE, torch.bfloat16, device)
    prompt = load_prompts(NANO_DIT).positive
    clip = synthetic_clip(*(QUICK_CLIP if quick else CLIP)).to(device)
    condition = with_mask(posterior(wide.encode(clip))[0] * wide.config.scale)
    noise = random(condition[:, :-1].shape, torch.float32, device, seed=3)
    velocities, frames = {}, {}
    for name, dtype, packing, vae in (("fp32", torch.float32, None, wide), ("bf16", torch.bfloat16, None, half),
                                      ("fp8", torch.bfloat16, "fp8", half)):  # fmt: skip
        dit = load_dit(NANO_DIT, dtype, device)
        if packing:
            pack(dit, packing)
        latent = torch.cat([noise, condition], dim=1).to(dtype)
        velocity = torch.stack(dit(latent, [prompt.to(device, dtype)], torch.ones(1, device=device))).float()
        clean = (noise - velocity) / wide.config.scale
        velocities[name], frames[name] = velocity.cpu(), shown(vae.decode(clean.to(dtype))).cpu()
    for name in ("bf16", "fp8"):
        error = relative_l2(velocities[name], velocities["fp32"])
        beside = None if name == "bf16" else psnr(frames[name], frames["bf16"])
        yield row("nano", "velocity and frames", name, error, psnr(frames[name], frames["fp32"]), beside)


def autoencoder_rows(label: str, vae: VideoVAE, latent: Tensor, narrow: bool) -> Iterator[dict]:
    """Decoded frames where convolutions share products, in bf16, and in fp32 to show that it is exact."""
    expected = vae.decode(latent)
    half, direct = copy.deepcopy(vae).bfloat16(), None
    for name, options in SHARING.items():
        if narrow:
            options = replace(
                options,
                winograd_from=options.winograd_from and NARROW,
                winograd_rows_from=options.winograd_rows_from and NARROW,
            )
        exact = FastVAE(vae, options).decode(latent)
        yield row(label, "frames", f"fp32 {name}", relative_l2(exact, expected), psnr(shown(exact), shown(expected)))
        frames = FastVAE(half, options).decode(latent.bfloat16()).float()
        direct = frames if direct is None else direct
        beside = None if frames is direct else psnr(shown(frames), shown(direct))
        error = relative_l2(frames, expected)
        yield row(label, "frames", f"bf16 {name}", error, psnr(shown(frames), shown(expected)), beside)


def list_autoencoders(device: torch.device, quick: bool) -> Iterator[tuple[str, VideoVAE, Tensor, bool]]:
    """Label, model, latent to decode, and whether it is narrow."""
    nano = load_vae(NANO_VAE, torch.float32, device)
    clip = synthetic_clip(*(QUICK_CLIP if quick else CLIP)).to(device)
    yield "nano", nano, posterior(nano.encode(clip))[0], True
    config: VAEConfig = QUICK_VAE if quick else SEEDVR2_VAE
    published = build(lambda: VideoVAE(config), torch.float32, device)
    yield (
        f"widths {config.widths}, random",
        published,
        random(QUICK_LATENT if quick else LATENT, torch.float32, device),
        False,
    )


def row(
    model: str, what: str, contender: str, error: float, to_fp32: float | None = None, to_bf16: float | None = None
) -> dict:
    return {
        "model": model,
        "what": what,
        "contender": contender,
        "relative_l2": error,  # against fp32
        "psnr_fp32": to_fp32,
        "psnr_bf16": to_bf16,
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fp8", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny sizes, nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # or sharing in fp32 would seem to round as much as that does
    device = torch.device(args.device)
    options = Options(device=device, threads=args.threads, warmups=0, runs=1, quick=args.quick)
    report = {"bench": "fp8", "quick": args.quick, "environment": environment(options), "rows": []}

    def rows() -> Iterator[dict]:
        yield from nano_rows(device, args.quick)
        yield from transformer_rows(device, args.quick)
        for case in list_autoencoders(device, args.quick):
            yield from autoencoder_rows(*case)

    for entry in rows():
        report["rows"].append(entry)
        print(line(entry), file=sys.stderr, flush=True)
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        stamp = report["environment"]["date"][:16].replace(":", "").replace("-", "")
        (args.out / f"fp8-{device.type}-{stamp}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def line(entry: dict) -> str:
    """A row for reading."""
    decibels = "".join(
        f", {entry[key]:.1f} dB to {key[5:]}" for key in ("psnr_fp32", "psnr_bf16") if entry[key] is not None
    )
    return f"{entry['model']}, {entry['what']}, {entry['contender']}: relative L2 {entry['relative_l2']:.1e}{decibels}"


if __name__ == "__main__":
    main()
