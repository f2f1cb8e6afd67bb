"""Memory of a restoration: what is predicted beside what is measured, and how it grows. `python -m tests.bench.memory`

Random weights. Measured is the resident memory of a fresh process above what it held before the call; predicted is what
the plan said. On a CPU that is a restoration at reduced widths; bytes by pixel at the true widths on a GPU are
predicted only, unless `--device cuda`.
"""
# T H W pixel frames, height, width

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from seedvr2_core.checkpoints import Prompts
from seedvr2_core.loading import Models, fast_options
from seedvr2_core.memory.plan import BY_THREAD
from seedvr2_core.memory.stages import Half, Portions, Work, try_autoencoder
from seedvr2_core.memory.streaming import DeviceState
from seedvr2_core.models.dit import SEEDVR2_3B, DiT, DiTConfig
from seedvr2_core.models.linear import pack
from seedvr2_core.models.vae import SEEDVR2_VAE, VAEConfig, VideoVAE
from seedvr2_core.models.vae_fast import FastVAE
from seedvr2_core.pipeline import restored
from seedvr2_core.planning import plan_clip
from seedvr2_core.settings import Settings
from seedvr2_core.video.geometry import latent_grid
from tests.bench.measure import RESULTS, Options, build, environment, random

# Reduced, but large enough for tensors to be most of what a process holds.
VAE = VAEConfig(widths=(32, 64, 128, 128), blocks=2)
DIT = replace(
    SEEDVR2_3B, dim=512, depth=4, heads=4, mlp_hidden=1536, separate_layers=1, text_dim=256
)  # fmt: skip
# What malloc gets by mmap goes back to the system when it is freed; glibc would raise this as it sees fit.
M_MMAP_THRESHOLD, THRESHOLD = -3, 1 << 16
TRUE_SIZES = {"720p": (720, 1280), "1080p": (1088, 1920), "4K": (2160, 3840)}
GOALS = {"encode": 1500, "decode": 2000}


@dataclass(frozen=True)
class Clip:
    """What is restored, at the size of the result."""

    frames: int
    height: int
    width: int
    dtype: str = "float32"
    chunk: int | None = None  # frames

    @property
    def name(self) -> str:
        return f"{self.frames}x{self.height}x{self.width} {self.dtype}" + (f" chunk {self.chunk}" if self.chunk else "")


CLIPS = (
    Clip(1, 512, 768),
    Clip(9, 160, 256),
    Clip(9, 256, 320, "bfloat16"),
    Clip(9, 384, 512, "bfloat16"),
    Clip(21, 96, 160, chunk=13),
)
QUICK_CLIPS = (Clip(1, 256, 256), Clip(5, 128, 192))


def make_models(vae: VAEConfig, dit: DiTConfig, dtype: torch.dtype, device: torch.device) -> Models:
    return Models(
        vae=FastVAE(build(lambda: VideoVAE(vae), dtype, device), fast_options(device)),
        dit=pack(build(lambda: DiT(dit), dtype, device)),
        prompts=Prompts(positive=random((58, dit.text_dim), torch.float32, device), negative=None),
        label="random",
        device=torch.empty(0, device=device).device,
    )


def restoration(clip: Clip, vae: VAEConfig = VAE, dit: DiTConfig = DIT, device: str = "cpu") -> tuple[int, int]:
    """Predicted and measured bytes of one restoration above its weights. To be called in a process of its own."""
    settle()
    models = make_models(vae, dit, getattr(torch, clip.dtype), torch.device(device))
    size = clip.height, clip.width
    settings = Settings(chunk=clip.chunk)
    # A first, tiny restoration: libraries load, threads start.
    for _ in stream(torch.zeros(5, 32, 32, 3), models, Settings(), (32, 32)):
        pass
    source = (clip.height // 2, clip.width // 2, 3)
    plan = plan_clip(models, settings, size, clip.frames, source=source[0] * source[1] * 3)
    frames = (torch.full(source, index % 256, dtype=torch.uint8) for index in range(clip.frames))

    def call() -> None:
        for _ in restored(frames, models, settings, size, clip.frames, None, plan):
            pass

    return plan.peak - plan.weights, peak_of(call, device)


def stream(frames: Tensor, models: Models, settings: Settings, size: tuple[int, int]) -> Iterator[Tensor]:
    plan = plan_clip(models, settings, size, len(frames))
    return (frame for frame, _ in restored(frames, models, settings, size, len(frames), None, plan))


def half(kind: Half, clip: Clip, vae: VAEConfig = VAE, device: str = "cpu") -> tuple[int, int]:
    """The same of one half of the autoencoder alone."""
    settle()
    models = make_models(vae, replace(DIT, depth=1), getattr(torch, clip.dtype), torch.device(device))
    size, net, dtype = (clip.height, clip.width), models.vae, models.dtype
    work = Work(vae=net, dit=models.dit, device=device, height=size[0], width=size[1], frames=clip.frames)
    latents = latent_grid(clip.frames, *size).t

    def call(h: int, w: int, latents: int) -> None:
        state = DeviceState()
        for index in range(latents):
            if kind == "encode":
                frames = 1 if index == 0 and latents == 1 else 5 if index == 0 else 4
                if index == latents - 1 and latents > 1:
                    break
                x, step = torch.zeros(1, 3, frames, h, w, dtype=dtype, device=device), net.encode_slice
            else:
                x = torch.zeros(1, vae.latent_channels, 1, h // 8, w // 8, dtype=dtype, device=device)
                step = net.decode_slice
            _, state = step(x, state, last=latents == 1)
            del x

    with torch.inference_mode():
        net.take(1, None)
        call(32, 32, 3)
        predicted = try_autoencoder(work, kind, Portions(1, None), "device").peak
        predicted += BY_THREAD * torch.get_num_threads() if device == "cpu" else 0
        return predicted, peak_of(lambda: call(*size, latents), device)


def settle() -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD)


def peak_of(call: Callable[[], None], device: str) -> int:
    """Bytes that a call takes at its peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    held = _resident("VmRSS")
    call()
    return _resident("VmHWM") - held


def _resident(name: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def apart(call: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """What a call returns, from a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(call).result()


def by_pixel() -> list[dict]:
    """Bytes by output pixel of the published autoencoder in bf16 on a GPU, predicted."""
    with torch.device("meta"):
        vae = VideoVAE(SEEDVR2_VAE).bfloat16().requires_grad_(False)
        dit = DiT(replace(SEEDVR2_3B, depth=1)).bfloat16().requires_grad_(False)
    rows = []
    net = FastVAE(vae, fast_options(torch.device("cuda")))
    for name, (height, width) in TRUE_SIZES.items():
        work = Work(vae=net, dit=dit, device="cuda", height=height, width=width, frames=None)
        for state in ("device", "host"):
            for block, bands in ((2, 1), (1, 1), (1, 8)):
                band = None if bands == 1 else work.pixels // bands
                for kind in GOALS:
                    footprint = try_autoencoder(work, kind, Portions(block, band), state)
                    each = {key: round(value / work.pixels) for key, value in footprint._asdict().items()}
                    rows.append({"size": name, "kind": kind, "state": state, "block": block, "bands": bands, **each})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    options = Options(device=torch.device(args.device), threads=2, warmups=0, runs=1, quick=args.quick)
    report = {"bench": "memory", "environment": environment(options), "restorations": [], "lengths": []}
    for clip in QUICK_CLIPS if args.quick else CLIPS:
        report["restorations"].append(compared(clip, partial(restoration, clip, device=args.device)))
    side = (64, 96) if args.quick else (192, 256)
    for kind in ("encode", "decode"):
        for frames in (9, 17) if args.quick else (9, 17, 37):
            clip = Clip(frames, *side, "bfloat16")
            report["lengths"].append(compared(clip, partial(half, kind, clip, device=args.device)) | {"kind": kind})
    report["by_pixel"] = [] if args.quick else by_pixel()
    for row in report["by_pixel"]:
        print(" ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        stamp = report["environment"]["date"][:16].replace(":", "").replace("-", "")
        path = args.out / f"memory-{args.device}-{stamp}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        draw(report["lengths"], path.with_suffix(".png"))
    print(json.dumps(report))


def compared(clip: Clip, call: Callable[[], tuple[int, int]]) -> dict:
    predicted, measured = apart(call)
    row = {**asdict(clip), "predicted": predicted, "measured": measured, "ratio": round(predicted / measured, 3)}
    print(f"{clip.name}: predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB, ratio {row['ratio']}",
          file=sys.stderr, flush=True)  # fmt: skip
    return row


def draw(rows: list[dict], path: Path) -> None:
    """Peak against length, as a picture, where matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="frames", ylabel="peak, MB", title="Peak memory against length")
    for kind in GOALS:
        of_kind = [row for row in rows if row["kind"] == kind]
        frames = [row["frames"] for row in of_kind]
        axes.plot(frames, [row["measured"] / 1e6 for row in of_kind], "o-", label=f"{kind}, measured")
        axes.plot(frames, [row["predicted"] / 1e6 for row in of_kind], "--", color="grey")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
