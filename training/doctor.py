"""What a stage will cost, before it starts. `python -m training.doctor pretrain --config 3b`

Parameters are counted on modules without memory. Activations and operations are counted, not guessed: one micro-batch
runs through the same code on the meta device, where tensors have shapes but no values.

Printed are bytes of weights, gradients, optimiser and averages for one process, of what one micro-batch keeps for the
backward pass, and the operations of a step. After that the stage makes two steps on made-up data, if the machine can
hold it.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seedvr2_core.device import free_bytes
from seedvr2_core.models.dit import Block
from seedvr2_core.models.vae import VideoVAE, posterior

from . import losses
from .config import OptimConfig, parse_command, to_yaml
from .journal import METRICS, read
from .parallel import Arranged, Layers
from .restorer import Restorer

GIB = 2**30
STATUS = Path("/proc/self/status")
# Bytes of optimiser state a parameter, in fp32.
OPTIMIZER_BYTES = {"adamw": 8, "rmsprop": 4}
# Tensors of the largest kind that a backward pass holds at once: gradients of inputs and outputs and, in convolutions
# on a CPU, both again in another layout. Measured on nano: 8 of its autoencoder, 3 of its transformer.
SCRATCH = 8
# A backward pass does twice the operations of the forward pass; with recomputation the forward pass runs once more.
BACKWARD = 2
# Latent t h w that a restorer is costed on: the 192 x 192 pictures of nano. Others are given in its place.
DEFAULT_SAMPLE = (1, 24, 24)
# And where a recipe counts in tokens: 97 frames of 720p, the 90 000 tokens of the paper's batch.
LARGEST_SAMPLE = (25, 90, 160)


@dataclass(frozen=True)
class Workload:
    """What one step asks for: modules on the meta device, and the passes of one micro-batch through them."""

    trained: Mapping[str, tuple[nn.Module, OptimConfig]]
    helpers: Mapping[str, nn.Module]  # read, never trained
    forward: Callable[[], Tensor]  # one micro-batch, up to its loss, with gradients
    assists: Callable[[], object]  # passes without gradients that go with it
    samples: int  # of a micro-batch


@dataclass(frozen=True)
class Cost:
    """Bytes of one process, and operations of one micro-batch."""

    parameters: Mapping[str, int]
    states: int  # weights, gradients, optimiser, averages
    helpers: int
    activations: int  # kept for the backward pass
    workspace: int  # of the layer that is being computed
    flops: int
    samples: int

    @property
    def total(self) -> int:
        return self.states + self.helpers + self.activations + self.workspace


def of_restorer(config: Any, sample: tuple[int, int, int] | None = None) -> Workload:
    """Flow matching: one pass with gradients."""
    sample = sample or (DEFAULT_SAMPLE if config.batch_tokens is None else LARGEST_SAMPLE)
    restorer = on_meta(lambda: Restorer(config.model))
    x, u = torch.empty(config.batch, 16, *sample, device="meta"), torch.empty(config.batch, device="meta")
    return Workload(
        trained={"g": (restorer, config.optim)},
        helpers={},
        forward=lambda: restorer.velocity(x, x, u).square().mean(),
        assists=lambda: None,
        samples=config.batch,
    )


def of_distillation(config: Any, sample: tuple[int, int, int] | None = None) -> Workload:
    """One pass of the student, and two of the teacher, four where it is guided."""
    sample = sample or (DEFAULT_SAMPLE if config.batch_tokens is None else LARGEST_SAMPLE)
    own = of_restorer(config, sample)
    teacher = on_meta(lambda: Restorer(config.teacher_model or config.model)).requires_grad_(False)
    x, u = torch.empty(config.batch, 16, *sample, device="meta"), torch.empty(config.batch, device="meta")
    passes = 4 if config.cfg != 1 else 2
    return Workload(
        trained=own.trained,
        helpers={"teacher": teacher},
        forward=own.forward,
        assists=lambda: [teacher.velocity(x, x, u) for _ in range(passes)],
        samples=config.batch,
    )


def of_autoencoder(config: Any) -> Workload:
    """Encode and decode the largest of the crops."""
    vae = on_meta(lambda: VideoVAE(config.model))
    vae.encoder.requires_grad_(not config.freeze_encoder)
    crops = largest(config.crops)
    clip = torch.empty(crops.batch, 3, crops.frames, crops.size, crops.size, device="meta")

    def forward() -> Tensor:
        mean, std = posterior(vae.encode(clip, None))
        restored = vae.decode(mean + std * mean, None)
        return (restored - clip).abs().mean() + losses.spectral(restored, clip) + losses.kl(mean, std)

    return Workload({"g": (vae, config.optim)}, {}, forward, lambda: None, crops.batch)


def largest(crops: Sequence[Any]) -> Any:
    """The crops of most pixels."""
    return max(crops, key=lambda kind: kind.batch * kind.frames * kind.size**2)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def measure(config: Any, workload: Workload) -> Cost:
    """Count everything about one micro-batch and one process."""
    parallel = config.run.parallel
    trained = list(workload.trained.values())
    arrange(workload, Layers(recompute=parallel.activation_checkpoint))
    shards = (parallel.shard or 1) * parallel.sp
    half = parallel.precision == "bf16"
    states = 0
    for module, optim in trained:
        for parameter in module.parameters():
            extra = 4 + OPTIMIZER_BYTES[optim.kind] if parameter.requires_grad else 0
            states += parameter.numel() * (4 + extra)
    averaged = trained[-1][0]
    if config.run.ema_device == "same":
        states += 4 * count(averaged)
    helpers = sum(count(module) for module in workload.helpers.values()) * (2 if half else 4)
    with FlopCounterMode(display=False) as counter:
        saved = saved_sizes(workload.forward)
        forward = counter.get_total_flops()
        with torch.no_grad():
            workload.assists()
        assists = counter.get_total_flops() - forward
    scale = (0.5 if half else 1.0) / parallel.sp
    scratch = SCRATCH * max(saved, default=0)
    if parallel.activation_checkpoint:
        # The layer that is being recomputed has all its activations, once.
        arrange(workload, Layers())
        scratch += (saved_bytes(workload.forward) - sum(saved)) / max(1, sum(layers(m) for m, _ in trained))
    return Cost(
        parameters={
            **{name: count(module) for name, (module, _) in workload.trained.items()},
            **{name: count(module) for name, module in workload.helpers.items()},
        },
        states=states // shards,
        helpers=helpers // shards,
        activations=int(sum(saved) * scale),
        workspace=int(scratch * scale) + max(layer_bytes(module) for module, _ in trained),
        flops=forward * (1 + BACKWARD + parallel.activation_checkpoint) + assists,
        samples=workload.samples,
    )


def arrange(workload: Workload, layers: Layers) -> None:
    for module, _ in workload.trained.values():
        for part in module.modules():
            if isinstance(part, Arranged):
                part.layers = layers


def layers(module: nn.Module) -> int:
    return sum(isinstance(part, Block) for part in module.modules())


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def layer_bytes(module: nn.Module) -> int:
    """Weights of the largest layer: what a sharded module gathers, two layers at a time."""
    layers = [count(part) for part in module.modules() if isinstance(part, Block)]
    return 2 * 4 * max(layers, default=0)


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, parameters not counted."""
    return sum(saved_sizes(forward))


def saved_sizes(forward: Callable[[], Tensor]) -> list[int]:
    """The same, tensor by tensor."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            # Views share their storage; holding on to them keeps the identities apart.
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    parameters = {id(tensor) for tensor in _leaves(loss)}
    return [tensor.untyped_storage().nbytes() for tensor in kept.values() if id(tensor) not in parameters]


def _leaves(loss: Tensor) -> list[Tensor]:
    """The parameters that a loss depends on, and views of which it may hold."""
    seen, waiting, found = set(), [loss.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


def estimate(config: Any, workload: Workload) -> str:
    """The config, and its cost in words."""
    cost = measure(config, workload)
    lines = [to_yaml(config), "parameters"]
    lines += [f"  {name:<10} {number / 1e6:10.2f} M" for name, number in cost.parameters.items()]
    lines += [
        "memory of one process",
        f"  states      {cost.states / GIB:9.3f} GiB   weights, gradients, optimiser, averages",
        f"  helpers     {cost.helpers / GIB:9.3f} GiB",
        f"  activations {cost.activations / GIB:9.3f} GiB   of {cost.samples} samples",
        f"  workspace   {cost.workspace / GIB:9.3f} GiB",
        f"  total       {cost.total / GIB:9.3f} GiB",
        "operations of one micro-batch",
        f"  {cost.flops / 1e12:.4f} TFLOP; {cost.samples / (cost.flops / 400e12):.1f} samples/s at 400 TFLOP/s",
    ]
    return "\n".join(lines)


STAGES = {"vae": of_autoencoder, "pretrain": of_restorer, "distill": of_distillation}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=sorted(STAGES), help="training.STAGE")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="as for the stage: --config NAME key=value ...")
    args = parser.parse_args()
    stage = importlib.import_module(f"training.{args.stage}")
    command = parse_command(args.stage, stage.RECIPES, [*args.rest, "--dry-run"])
    torch.set_num_threads(command.threads)
    make = STAGES[args.stage]
    print(estimate(command.config, make(command.config)))
    needed, free = measure(command.config, make(command.config)).total, free_bytes(torch.device("cpu"))
    if needed > 0.8 * free:
        print(f"no fake steps: they take {needed / GIB:.1f} GiB, and this machine has {free / GIB:.1f} GiB")
        return
    seconds, held = fake_steps(args.stage, command.config)
    print(f"2 fake steps on this CPU: {seconds:.2f} s each, {held / GIB:.3f} GiB")


def fake_steps(name: str, config: Any) -> tuple[float, int]:
    """Train for two steps on noise, on the CPU and in a folder that is removed again.

    Returns:
        seconds of the second step, and the most bytes that were held on top of what was held before.
    """
    from . import loop  # it knows the stages, which know this file

    run = replace(config.run, steps=2, validate_every=2, preview_every=None, async_save=False, tensorboard=False)
    run = replace(run, parallel=replace(run.parallel, precision="fp32"), judge=None)
    config = replace(config, run=run)
    with tempfile.TemporaryDirectory() as folder:
        stage = _fake_stage(name, config, Path(folder))
        # What was read and decoded so far is data, not the cost of a step.
        stage.validate = lambda module: {}
        before = new_peak()
        loop.run(stage, config, {"g": config.optim}, Path(folder) / "run")
        rows = read(Path(folder) / "run" / METRICS)
    return rows[-1]["seconds"], peak_bytes() - before


def _fake_stage(name: str, config: Any, folder: Path) -> Any:
    if name == "vae":
        from .data import DataConfig, Dataset
        from .vae import VAEStage

        side = 2 * max(128, *(crops.size for crops in config.crops))
        data = Dataset.load(None, DataConfig(stills=4, still_size=side))
        return VAEStage(replace(config, crops=(largest(config.crops),)), data, [])
    from .shards import HELD_OUT, Latents

    noise = torch.randn(HELD_OUT + config.batch, 16, *DEFAULT_SAMPLE)
    save_file({"hq": noise, "lq": noise.clone()}, folder / "noise.safetensors")
    latents = Latents(folder, seed=0)
    if name == "pretrain":
        from .pretrain import PretrainStage

        return PretrainStage(replace(config, init=None, batch_tokens=None), latents)
    from .distill import HalvingStage

    models = [Restorer(model) for model in (config.teacher_model or config.model, config.model)]
    return HalvingStage(config, latents, models[0], config.steps, models[1])


def peak_bytes() -> int:
    """The most memory this process has held, since `new_peak` where the system can tell."""
    if STATUS.exists():
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def new_peak() -> int:
    """Forget the peak so far, where the system can; what is held now."""
    if STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")
    return peak_bytes()


if __name__ == "__main__":
    main()
