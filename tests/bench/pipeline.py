"""Seconds and memory of every stage of a restoration, ours beside others'. `python -m tests.bench.pipeline CASE ...`

Random weights of the true sizes: nothing is downloaded. Each case fits into ten minutes on a large GPU; `--quick` runs
them all on a CPU at toy sizes. Another implementation takes part through an adapter: `--adapter FILE` names a Python
file with a function `make(sizes: Sizes, device, dtype) -> Contender`; nothing of it is kept here.
"""
# T H W pixel frames, height, width

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from seedvr2_core.errors import SettingError
from seedvr2_core.kernels import Choices, choices_for
from seedvr2_core.loading import fast_options
from seedvr2_core.memory.streaming import DeviceState
from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiT, DiTConfig, make_layout, token_grid
from seedvr2_core.models.linear import pack
from seedvr2_core.models.vae import SEEDVR2_VAE, VAEConfig, VideoVAE, posterior
from seedvr2_core.models.vae_fast import FastVAE
from seedvr2_core.models.windows import WindowConfig
from seedvr2_core.video.geometry import LATENT_FRAMES, padded_length
from tests.bench.measure import RESULTS, Options, build, environment, random, relative_l2

# Tokens of the published positive prompt.
TEXT_TOKENS = 58


@dataclass(frozen=True)
class Sizes:
    """The models that everyone builds; weights are drawn by `tests.bench.measure.build`, so they are the same."""

    vae: VAEConfig
    dit: DiTConfig


@dataclass(frozen=True)
class Workload:
    frames: int
    height: int
    width: int


FULL = {"3b": Sizes(SEEDVR2_VAE, SEEDVR2_3B), "7b": Sizes(SEEDVR2_VAE, SEEDVR2_7B)}
TOY = Sizes(
    VAEConfig(widths=(16, 32, 32, 32), blocks=1, groups=8),
    replace(
        SEEDVR2_3B, dim=64, depth=2, heads=2, head_dim=32, mlp_hidden=96, text_dim=48, separate_layers=1,
        windows=WindowConfig(train_area=(4, 4)),
    ),
)  # fmt: skip
CASES = {
    "720p_25": Workload(25, 720, 1280),
    "paper_100": Workload(100, 768, 1344),
    "1080p_25": Workload(25, 1088, 1920),
    "image_4k": Workload(1, 2160, 3840),
}
QUICK = Workload(9, 48, 64)


class Contender(Protocol):
    """An implementation: three stages on tensors of one device and type."""

    def encode(self, clip: Tensor) -> Tensor:
        """Clip 1 3 T H W in -1..1, T = 4n+1 -> mean latents 1 16 t h w, not scaled."""

    def restore(self, latent: Tensor, noise: Tensor, text: Tensor) -> Tensor:
        """One step from noise 1 16 t h w, given the degraded latent and a prompt l c -> clean latents, not scaled."""

    def decode(self, latent: Tensor) -> Tensor:
        """Latents 1 16 t h w, not scaled -> clip 1 3 T H W."""


class Ours:
    """This engine."""

    def __init__(self, vae: VideoVAE | FastVAE, dit: DiT, choices: Choices | None = None):
        self.vae, self.dit, self.choices = vae, dit, choices

    def encode(self, clip: Tensor) -> Tensor:
        return posterior(in_slices(self.vae.encode_slice, clip, 1 + LATENT_FRAMES, LATENT_FRAMES))[0]

    def restore(self, latent: Tensor, noise: Tensor, text: Tensor) -> Tensor:
        scale = self.vae.config.scale
        condition = torch.cat([latent * scale, torch.ones_like(latent[:, :1])], dim=1)
        layout = make_layout([token_grid(latent[0])], [len(text)], self.dit.config, latent.device)
        time = torch.ones(1, device=latent.device)
        latent = torch.cat([noise, condition], dim=1)
        velocity = self.dit(latent, [text], time, layout=layout, choices=self.choices)[0]
        return (noise - velocity) / scale

    def decode(self, latent: Tensor) -> Tensor:
        return in_slices(self.vae.decode_slice, latent, 1, 1)


def in_slices(step: Callable, x: Tensor, first: int, length: int) -> Tensor:
    """As a restoration does it: the first slice is so long, the others as long as given."""
    state, out = DeviceState(), []
    parts = [x[:, :, :first], *(part for part in x[:, :, first:].split(length, dim=2) if part.shape[2])]
    for part in parts:
        # As in a restoration: a picture leaves no state, which at 4K would not fit.
        y, state = step(part, state, last=part is parts[-1])
        out.append(y)
    return torch.cat(out, dim=2)


def ours(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Contender:
    """As users get it: with our kernels where they are faster."""
    choices = choices_for(device)
    vae = FastVAE(build(lambda: VideoVAE(sizes.vae), dtype, device), replace(fast_options(device), choices=choices))
    return Ours(vae, pack(build(lambda: DiT(sizes.dit), dtype, device)), choices)


def library(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Contender:
    """The same without our kernels."""
    vae = FastVAE(build(lambda: VideoVAE(sizes.vae), dtype, device), replace(fast_options(device), choices=None))
    return Ours(vae, pack(build(lambda: DiT(sizes.dit), dtype, device)))


def plain(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Contender:
    """The same with the autoencoder as it is defined."""
    return Ours(build(lambda: VideoVAE(sizes.vae), dtype, device), build(lambda: DiT(sizes.dit), dtype, device))


def load_adapter(file: Path) -> Callable[[Sizes, torch.device, torch.dtype], Contender]:
    """The `make` of a Python file.

    Raises:
        SettingError: there is no such file, or no `make` in it.
    """
    if not file.is_file():
        raise SettingError(f"{file} is not a file; name a Python file with a function make(sizes, device, dtype).")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "make", None)):
        raise SettingError(f"{file.name} has no function make(sizes, device, dtype).")
    return module.make


def run_stages(contender: Contender, sizes: Sizes, work: Workload, options: Options, dtype: torch.dtype) -> dict:
    """Seconds and peak bytes of each stage, and its output, on the CPU in fp32."""
    frames = padded_length(work.frames)
    clip = random((1, 3, frames, work.height, work.width), torch.float32, options.device).tanh().to(dtype)
    text = random((TEXT_TOKENS, sizes.dit.text_dim), dtype, options.device, seed=2)
    rows: dict[str, dict] = {}
    latent = measured("encode", lambda: contender.encode(clip), rows, options)
    noise = random(latent.shape, dtype, options.device, seed=3)
    clean = measured("restore", lambda: contender.restore(latent, noise, text), rows, options)
    measured("decode", lambda: contender.decode(clean), rows, options)
    return rows


def measured(stage: str, call: Callable[[], Tensor], rows: dict[str, dict], options: Options) -> Tensor:
    seconds, cuda, output = [], options.device.type == "cuda", None
    for run in range(options.warmups + options.runs):
        del output  # or two would be there at once
        if cuda and run == options.warmups:
            # Until then kernels have been tried, which nobody waits for again.
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        output = call()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if not output.isfinite().all():
        raise ArithmeticError(f"{stage} gave NaN or infinity")
    kept = sorted(seconds[options.warmups :])
    rows[stage] = {
        "first": seconds[0],
        "median": kept[len(kept) // 2],
        "minimum": kept[0],
        "maximum": kept[-1],
        "peak_bytes": torch.cuda.max_memory_allocated() - held if cuda else None,
        "output": output.float().cpu(),
    }
    return output


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--model", choices=FULL, default="3b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--adapter", type=Path, action="append", default=[], help="file of another implementation")
    parser.add_argument("--plain", action="store_true", help="also our autoencoder as it is defined")
    parser.add_argument("--library", action="store_true", help="also without kernels of our own")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="toy sizes on a CPU; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; choose of {', '.join(CASES)}")
    device = torch.device("cpu" if args.quick else args.device)
    options = Options(
        device=device, threads=torch.get_num_threads(), warmups=args.warmups, runs=args.runs, quick=args.quick
    )
    dtype = getattr(torch, args.dtype)
    makers = {"ours": ours}
    if args.library or args.quick:
        makers["library"] = library
    if args.plain or args.quick:
        makers["plain"] = plain
    makers |= {file.stem: load_adapter(file) for file in args.adapter}
    sizes = TOY if args.quick else FULL[args.model]
    report = {"bench": "pipeline", "model": args.model, "environment": environment(options), "rows": [], "errors": []}
    for name in args.cases or CASES:
        work = QUICK if args.quick else CASES[name]
        reference: dict[str, Tensor] = {}
        # One after the other: two models of this size need not fit beside each other.
        for label, make in makers.items():
            try:
                stages = run_stages(make(sizes, device, dtype), sizes, work, options, dtype)
            except Exception as error:  # whatever it is, the others shall be measured
                failed = f"{type(error).__name__}: {error}"
                report["errors"].append({"case": name, "contender": label, "error": failed})
                print(f"{name} {label} failed: {failed}", file=sys.stderr, flush=True)
                continue
            for stage, row in stages.items():
                output = row.pop("output")
                row["relative_l2"] = relative_l2(output, reference[stage]) if stage in reference else None
                reference.setdefault(stage, output)
            report["rows"].append({"case": name, **asdict(work), "contender": label, "stages": stages})
            print(line(report["rows"][-1]), file=sys.stderr, flush=True)
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        stamp = report["environment"]["date"][:16].replace(":", "").replace("-", "")
        (args.out / f"pipeline-{args.model}-{device.type}-{stamp}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    if report["errors"]:
        sys.exit(1)


def line(row: dict) -> str:
    """A row for reading."""
    stages: Sequence[tuple[str, dict]] = row["stages"].items()
    parts = [
        f"{stage} {values['median']:.3f} s"
        + (f" {values['peak_bytes'] / 1e9:.2f} GB" if values["peak_bytes"] is not None else "")
        + (f" ({values['relative_l2']:.1e} off)" if values["relative_l2"] is not None else "")
        for stage, values in stages
    ]
    total = sum(values["median"] for _, values in stages)
    return f"{row['case']} {row['contender']}: {', '.join(parts)}; {total:.3f} s in all"


if __name__ == "__main__":
    main()
