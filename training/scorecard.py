"""The scorecard that ships beside a small model. `python -m training.scorecard --dit D --vae V --data DIR --out FILE`

On every held-out picture and clip, whole frames: how well the autoencoder reconstructs the original, and how the model
restores its degraded, four times smaller self through the ordinary pipeline, against bicubic enlargement of the same.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from seedvr2_core.device import pick_device, pick_dtype
from seedvr2_core.loading import Models, load_models
from seedvr2_core.models.vae import posterior
from seedvr2_core.pipeline import restore
from seedvr2_core.settings import Settings
from seedvr2_core.video.geometry import Target, crop, pad_to_multiple, to_clip, to_frames

from .config import run_main
from .degradation import upsample
from .evaluate import EvalItem, eval_items
from .metrics import means, measure, psnr

# Share of the difference to bicubic by which a metric has to fall, and the fidelity that may be lost for it, in dB.
REQUIRED_DROP, ALLOWED_LOSS = 0.4, 1.0


def score(item: EvalItem, models: Models, settings: Settings) -> dict[str, dict[str, float]]:
    """{"vae": PSNR, "bicubic": every metric, "restored": every metric} of one original with 4n+1 frames."""
    height, width = item.frames.shape[2:]
    degraded = item.degraded()
    frames = degraded.permute(0, 2, 3, 1)
    restored = restore(frames, models, replace(settings, target=Target.exact(height, width))).permute(0, 3, 1, 2)
    return {
        "vae": {"psnr": psnr(reconstruct(models, item.frames), item.frames)},
        "bicubic": measure(upsample(degraded, height, width), item.frames),
        "restored": measure(restored, item.frames),
    }


@torch.inference_mode()
def reconstruct(models: Models, frames: Tensor) -> Tensor:
    """Frames T 3 H W in 0..1 through the autoencoder and back; T = 4n+1."""
    clip = pad_to_multiple(to_clip(frames)).transpose(0, 1)[None].to(models.device, models.dtype)
    decoded = models.vae.decode(posterior(models.vae.encode(clip))[0])[0].transpose(0, 1)
    return to_frames(crop(decoded, *frames.shape[2:])).cpu()


def summary(rows: dict[str, dict[str, dict[str, float]]]) -> dict[str, float | bool]:
    """The figures a model is judged by, and whether it passes."""
    mean = {part: means({name: row[part] for name, row in rows.items()}) for part in ("bicubic", "restored")}
    drop = {name: 1 - mean["restored"][name] / mean["bicubic"][name] for name in ("lsd", "swd")}
    loss = mean["bicubic"]["psnr"] - mean["restored"]["psnr"]
    return {
        "lsd_below_bicubic": drop["lsd"],
        "swd_below_bicubic": drop["swd"],
        "psnr_lost_to_bicubic": loss,
        "passes": min(drop.values()) >= REQUIRED_DROP and loss < ALLOWED_LOSS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.scorecard", description=__doc__)
    parser.add_argument("--dit", type=Path, required=True, help="transformer checkpoint")
    parser.add_argument("--vae", type=Path, required=True, help="autoencoder checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder with eval/")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--frames", type=int, default=17, help="frames of a clip, 4n+1")
    parser.add_argument("--side", type=int, help="cut a centred square of at most this many pixels; default: whole")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--color", default=Settings.color)
    parser.add_argument("--strength", type=float, default=Settings.strength)
    args = parser.parse_args()
    device = pick_device(args.device)
    models = load_models(args.dit, args.vae, device, pick_dtype("auto", device))
    settings = Settings(color=args.color, steps=args.steps, strength=args.strength)
    rows, kinds = {}, {}
    for item in tqdm(eval_items(args.data, args.side, args.frames)):
        rows[item.name] = score(item, models, settings)
        kinds[item.name] = "image" if len(item.frames) == 1 else "clip"
    result = {
        "frames_of_a_clip": args.frames,
        "side": args.side,
        "color": args.color,
        "steps": args.steps,
        "strength": args.strength,
        "device": str(device),
        "dtype": str(models.dtype),
        "torch": torch.__version__,
        "summary": summary(rows),
    }
    for kind in ("image", "clip"):
        chosen = [row for name, row in rows.items() if kinds[name] == kind]
        result[kind] = {
            part: means({str(i): row[part] for i, row in enumerate(chosen)}) for part in ("vae", "bicubic", "restored")
        }
    args.out.write_text(json.dumps({**result, "items": rows}, indent=1) + "\n")
    print(json.dumps({"summary": result["summary"], "image": result["image"], "clip": result["clip"]}, indent=1))


if __name__ == "__main__":
    run_main(main)
