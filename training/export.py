"""Weights of a run -> a checkpoint. `python -m training.export --run runs/distill/01 --out model.safetensors`

The file has the published tensor names, the config in its metadata and the prompts beside the weights, so the nodes
and the command line load it at once. Adapters, of a run or of a folder in peft's format, are merged into the model that
they were trained on. `--toward RUN --share S` takes every weight a share of the way to that of another run, as between
one that was trained on fidelity and one trained on realism (ESRGAN, arXiv 1809.00219, section 3.4).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from seedvr2_core.checkpoints import save
from seedvr2_core.errors import CheckpointError, SeedVR2Error, SettingError

from . import state, weights
from .adapters import AboutAdapters, load_adapters
from .restorer import Restorer
from .shards import Latents

log = logging.getLogger(__name__)

What = Literal["ema", "raw"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Prefixes of a checkpoint's tensors: averaged weights, and those of the module that is averaged.
PREFIXES = {"ema": "ema", "raw": "g"}


def read(run: Path, step: int | None = None, what: What = "ema") -> dict[str, Tensor]:
    """Weights of a run, by name.

    Args:
        run: its directory, or a folder of adapters, which are of no step.
        step: of a checkpoint, or of averaged weights that were kept for good; None: the last checkpoint.
        what: averaged, or as they were trained.

    Raises:
        CheckpointError: nothing was kept of that step.
    """
    if AboutAdapters.in_folder(run):
        return load_adapters(run)
    found = {int(path.name.removeprefix("step_")): path for path in state.complete(run / state.FOLDER)}
    kept = {int(path.stem.removeprefix("step_")): path for path in (run / state.AVERAGED).glob("step_*.safetensors")}
    averages = what == "ema"
    at = step if step is not None else max({**found, **(kept if averages else {})}, default=None)
    if at in found:
        prefix = f"{PREFIXES[what]}/"
        names = {name: size for name, size in state.stored(found[at]).items() if name.startswith(prefix)}
        tensors = {name: torch.empty(size) for name, size in names.items()}
        state.quietly(dcp.load, tensors, checkpoint_id=found[at], no_dist=True)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if averages and at in kept:
        return state.load_kept(kept[at])
    there = ", ".join(map(str, sorted({**found, **(kept if averages else {})})))
    if not there:
        raise CheckpointError(f"{run} holds no {what} weights of any step; run the stage that writes them first.")
    raise CheckpointError(f"{run} holds no {what} weights of step {step}; there are those of {there}.")


@dataclass(frozen=True)
class Toward:
    """Where the weights of a run are moved: `share` of the way, 0..1, to those that `run` ended with."""

    run: Path
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise SettingError(f"The share of the way to another run is a number in 0..1, got {self.share:g}.")

    def move(self, tensors: Mapping[str, Tensor], what: What) -> dict[str, Tensor]:
        """`tensors`, moved, in fp32; averaged ones to averaged ones, others to others.

        Raises:
            CheckpointError: the other run has none, or is of another model.
        """
        others = read(self.run, what=what)
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in others.items()}:
            raise CheckpointError(f"{self.run} has other tensors than the run; --toward takes a run of the same model.")
        return {name: torch.lerp(t.float(), others[name].float(), self.share) for name, t in tensors.items()}


def export(
    run: Path,
    out: Path,
    step: int | None = None,
    what: What = "ema",
    dtype: torch.dtype = torch.bfloat16,
    latents: Path | None = None,
    title: str | None = None,
    toward: Toward | None = None,
) -> None:
    """Write the checkpoint of a run, of whatever stage.

    Args:
        run: its directory, or a folder of adapters.
        out: the file to write.
        step: see `read`.
        what: see `read`.
        dtype: of the weights in the file.
        latents: of an autoencoder's: the data set whose deviation becomes its scale; if not given, it keeps
            that of what it began with.
        title: what the model is called; its size or the name of the run if not given.
        toward: another run of the model, that the weights are moved to.

    Raises:
        CheckpointError: there is nothing to export, or the file cannot be written.
        SettingError: adapters were to be moved.
    """
    adapted = weights.about_adapters(run)
    if adapted and toward:
        raise SettingError("--toward takes runs of whole models, and this one is of adapters.")
    tensors = read(run, step, what)
    of = f"{run.name}, {what}" + ("" if step is None else f", step {step}")
    if toward:
        tensors = toward.move(tensors, what)
        of += f", {toward.share:g} of the way to {toward.run.name}"
    metadata = {"modelspec.title": title or f"SeedVR2 {run.name}", "seedvr2_run": of}
    if "prompt" not in tensors and not adapted:
        vae = weights.build_vae(run, tensors)
        scale = weights.latent_scale(run, vae) if latents is None else round(Latents(latents, seed=0).scale, 4)
        if scale is None:
            scale = vae.config.scale
            log.warning("The scale of the latents stays %g; give --latents to set it to theirs.", scale)
        save(out, vae.to(dtype), replace(vae.config, scale=scale), metadata=metadata)
        return
    _save_restorer(weights.build_restorer(run, tensors), out, dtype, weights.open_negative(run), metadata)


def _save_restorer(
    restorer: Restorer, out: Path, dtype: torch.dtype, negative: Tensor | None, metadata: dict[str, str]
) -> None:
    prompt = restorer.prompt.detach()
    prompts = {
        "positive_conditioning": prompt.to(dtype),
        # What a dropped prompt was in training, where there is no negative one.
        "negative_conditioning": (torch.zeros_like(prompt) if negative is None else negative).to(dtype),
    }
    save(out, restorer.dit.to(dtype), restorer.dit.config, extra_tensors=prompts, metadata=metadata)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory of any stage, or a folder of adapters")
    parser.add_argument("--step", type=int, help="of the weights (default: the last)")
    parser.add_argument("--what", choices=tuple(PREFIXES), default="ema", help="averaged weights, or raw ones")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--latents", type=Path, help="for an autoencoder: the latents that its scale is made for")
    parser.add_argument("--title", help="what the model is called")
    parser.add_argument("--toward", type=Path, help="another run of the same model, that the weights are moved to")
    parser.add_argument("--share", type=float, help="of the way to it, 0..1")
    args = parser.parse_args(argv)
    if (args.toward is None) != (args.share is None):
        parser.error("--toward and --share go together: another run, and how much of the way to it.")
    try:
        toward = Toward(args.toward, args.share) if args.toward else None
        export(args.run, args.out, args.step, args.what, DTYPES[args.dtype], args.latents, args.title, toward)
    except SeedVR2Error as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
