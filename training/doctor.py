"""What a stage will cost, before it starts. `python -m training.doctor pretrain --config 3b`

Parameters are counted on modules without memory. Activations and operations are counted, not guessed: one micro-batch
runs forwards and backwards through the same code on the meta device, where tensors have shapes but no values, and every
tensor is followed from its birth to its end.

Printed are bytes of weights, gradients, optimiser and averages for one process, of what one micro-batch keeps for the
backward pass, of all that is there at the fullest moment, and the operations of a step. After that the stage makes two
steps on made-up data, if the machine can hold it, and says how much memory they really took.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from seedvr2_core.device import free_bytes
from seedvr2_core.models.dit import Block
from seedvr2_core.video.geometry import PATCH

from .config import OptimConfig, ParallelConfig, parse_command, run_main, to_yaml
from .journal import METRICS, read
from .parallel import WORLD, Arranged, Layers, Processes, halve, weight_parts
from .restorer import Restorer

GIB = 2**30
LONG_WAY = F.scaled_dot_product_attention
STATUS = Path("/proc/self/status")
# glibc's number of the size from which an allocation is a mapping of its own, and the size.
MMAP_THRESHOLD, OWN_MAPPING = -3, 1 << 16
# Bytes of optimiser state a parameter, in fp32; of 8 bits, with an fp32 scale for each 256.
OPTIMIZER_BYTES = {"adamw": 8, "rmsprop": 4, "adamw8bit": 2 * (1 + 4 / 256)}
# Where a stage takes more than this in each process, the estimate says what it takes on a machine of so many cards.
CARD_BYTES, CARDS = 80 * 2**30, 8
# A backward pass does twice the operations of the forward pass; with recomputation the forward pass runs once more.
BACKWARD = 2
# Latent t h w that a restorer is costed on: the 192 x 192 pictures of nano. Others are given in its place.
DEFAULT_SAMPLE = (1, 24, 24)
# And where a recipe counts in tokens: as many latent frames of 720p as they are.
FRAME_720P = (90, 160)
TOKENS_720P = 90 * 160 // PATCH**2


@dataclass(frozen=True)
class Workload:
    """What one step asks for: modules on the meta device, and the passes of one micro-batch through them."""

    trained: Mapping[str, tuple[nn.Module, OptimConfig]]
    helpers: Mapping[str, nn.Module]  # read, never trained
    forward: Callable[[], Tensor]  # one micro-batch, up to its loss, with gradients
    assists: Callable[[], object]  # passes without gradients that go with it
    samples: int  # of a micro-batch
    # Forward passes of the other halves of a step, each with the module that is frozen in it; only their memory counts.
    others: tuple[tuple[Callable[[], Tensor], nn.Module], ...] = ()
    host: int = 0  # bytes of helpers that wait in host memory


@dataclass(frozen=True)
class Cost:
    """Bytes of one process, and operations of one micro-batch."""

    parameters: Mapping[str, int]
    states: int  # weights, gradients, optimiser, averages
    gradients: int  # of these: what is there only between two halves of a step
    helpers: int
    activations: int  # kept for the backward pass
    peak: int  # most that a step takes beside weights, optimiser and averages: activations, gradients, temporaries
    flops: int
    samples: int
    processes: int = 1
    host: int = 0  # of helpers that wait in host memory, beside the total

    @property
    def total(self) -> int:
        return self.states - self.gradients + self.helpers + self.peak


def sample_of(config: Any) -> tuple[int, int, int]:
    """Latent t h w that a stage is costed on: 97 frames of 720p for the 90 000 tokens of the paper's batch."""
    if config.batch_tokens is None:
        return DEFAULT_SAMPLE
    return (max(1, config.batch_tokens // TOKENS_720P), *FRAME_720P)


def of_restorer(config: Any, sample: tuple[int, int, int] | None = None) -> Workload:
    """Flow matching: one pass with gradients."""
    sample = sample or sample_of(config)
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
    sample = sample or sample_of(config)
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


def largest(crops: Sequence[Any]) -> Any:
    """The crops of most pixels."""
    return max(crops, key=lambda kind: kind.batch * kind.frames * kind.size**2)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


@dataclass(frozen=True)
class Passes:
    """What one micro-batch asks for, counted once for any number of processes."""

    flops: int
    halves: Sequence[Followed]


def processes_of(parallel: ParallelConfig) -> int:
    """As many as torchrun says there are, else as few as there can be.

    Raises:
        SettingError: they cannot share a run in this way.
    """
    world = int(os.environ.get(WORLD, parallel.replicate * (parallel.shard or 1) * parallel.sp))
    weight_parts(parallel, world)
    return world


def measure(config: Any, workload: Workload) -> Cost:
    """Count everything about one micro-batch and one process; raises as `costs`."""
    return costs(config, workload)[0]


def costs(config: Any, workload: Workload) -> list[Cost]:
    """For the processes that there are, and where that is too much for a card, for a machine of several.

    Raises:
        SettingError: they cannot share the run as its config says.
    """
    parallel = config.run.parallel
    if parallel.precision == "pure_bf16":
        for module in modules_of(workload):
            halve(module)
    world = processes_of(parallel)
    micros = Processes(world=world, config=parallel).micros(config.run.micro_batches)
    half = parallel.precision == "bf16"
    counted = passes(workload, parallel.activation_checkpoint, accumulates=len(micros) > 1, half=half)
    cost = share(config, workload, counted, world)
    fits = parallel.shard is None and CARDS % (parallel.replicate * parallel.sp) == 0
    if cost.total <= CARD_BYTES or world >= CARDS or not fits:
        return [cost]
    return [cost, share(config, workload, counted, CARDS)]


def passes(workload: Workload, recompute: bool, accumulates: bool, half: bool) -> Passes:
    """Make the passes of one micro-batch, or of two that add up their gradients, without values; `half`: in bf16."""
    arrange(workload, Layers(recompute=recompute))
    with FlopCounterMode(display=False) as counter:
        workload.forward()
        once = counter.get_total_flops()
        with torch.no_grad():
            workload.assists()
        assists = counter.get_total_flops() - once
    modules = modules_of(workload)
    halves = [followed(workload.forward, modules, accumulates, half=half)]
    halves += [followed(forward, modules, accumulates, frozen, half) for forward, frozen in workload.others]
    return Passes(once * (1 + BACKWARD + recompute) + assists, halves)


def share(config: Any, workload: Workload, counted: Passes, processes: int) -> Cost:
    """What each of so many processes has of it."""
    parallel = config.run.parallel
    trained = list(workload.trained.values())
    shards = weight_parts(parallel, processes)
    half = parallel.precision == "bf16"
    learning = {name: count(module, learns=True) for name, (module, _) in workload.trained.items()}
    gradients = sum(weight_bytes(module, learns=True) for module, _ in trained)
    states = gradients + sum(weight_bytes(module) for module, _ in trained)
    states += sum(int(OPTIMIZER_BYTES[optim.kind] * learning[name]) for name, (_, optim) in workload.trained.items())
    if config.run.ema_device == "same":
        states += 4 * list(learning.values())[-1]
    helpers = sum(stored_bytes(module, half) for module in workload.helpers.values())
    scale = 1 / parallel.sp
    peak = max(half_step.peak(scale, 1 / shards) for half_step in counted.halves)
    if half or shards > 1:
        peak += layer_bytes(modules_of(workload)) // (2 if half else 1)
    return Cost(
        parameters={
            **{name: count(module) for name, (module, _) in workload.trained.items()},
            **{name: count(module) for name, module in workload.helpers.items()},
        },
        states=states // shards,
        gradients=gradients // shards,
        helpers=helpers // shards,
        activations=int(counted.halves[0].kept * scale),
        peak=int(peak),
        flops=counted.flops,
        samples=workload.samples,
        processes=processes,
        host=workload.host,
    )


def modules_of(workload: Workload) -> list[nn.Module]:
    return [*(module for module, _ in workload.trained.values()), *workload.helpers.values()]


def arrange(workload: Workload, layers: Layers) -> None:
    for module, _ in workload.trained.values():
        for part in module.modules():
            if isinstance(part, Arranged):
                part.layers = layers


def count(module: nn.Module, learns: bool = False) -> int:
    """Parameters; with `learns` those that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not learns)


def weight_bytes(module: nn.Module, learns: bool = False) -> int:
    """Of the parameters in their own types; with `learns` of those that are trained, and so of their gradients."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not learns)


def stored_bytes(module: nn.Module, half: bool) -> int:
    """Of a module that is only read, in its own types; where the run is in bf16 its fp32 weights are too. What shares
    memory is there once."""
    memory = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        memory[storage._cdata] = storage.nbytes() // (2 if half and tensor.dtype == torch.float32 else 1)
    return sum(memory.values())


def layer_bytes(modules: Sequence[nn.Module]) -> int:
    """Weights of the two largest neighbouring layers: what a sharded module gathers at a time."""
    layers = [weight_bytes(part) for module in modules for part in module.modules() if isinstance(part, Block)]
    return 2 * max(layers, default=0)


# Tensors without values, from their birth to their end.


class Lives(TorchDispatchMode):
    """Follows every storage that is made while the mode is on; those of `known` tensors are not counted. What is made
    in fp32 counts half with `half`, for a run that makes it in bf16."""

    def __init__(self, known: Sequence[Tensor], half: bool = False):
        super().__init__()
        self.half = half
        self.alive: dict[int, int] = {tensor.untyped_storage()._cdata: -1 for tensor in known}  # number of a storage
        self.sizes: list[int] = []  # bytes that count, by number
        self.whole: list[int] = []  # all bytes
        self.events: list[tuple[int, int]] = []  # number, and 1 for its birth or -1 for its end

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage(), tensor.dtype)
        return result

    def _meet(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        number = len(self.sizes)
        self.alive[key] = number
        self.sizes.append(storage.nbytes() // (2 if self.half and dtype == torch.float32 else 1))
        self.whole.append(storage.nbytes())
        self.events.append((number, 1))
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.events.append((self.alive.pop(key), -1))

    @property
    def now(self) -> int:
        """Bytes alive."""
        return sum(self.sizes[number] for number in self.alive.values() if number >= 0)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as it is computed where there are values. Without, torch takes the long way, and keeps every score."""
    if q.ndim < 4:  # here it takes the long way in earnest
        return LONG_WAY(q, k, v)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


@dataclass(frozen=True)
class Followed:
    """What one or more forward and backward passes had in memory, event by event."""

    kept: int  # bytes between the first forward and its backward
    events: Sequence[tuple[int, bool]]  # bytes made, or freed where negative; whether they are of a gradient

    def peak(self, activations: float = 1.0, gradients: float = 1.0) -> float:
        """Most bytes at a time, with activations and gradients as so many times larger than they were here."""
        now = most = 0.0
        for size, is_gradient in self.events:
            now += size * (gradients if is_gradient else activations)
            most = max(most, now)
        return most


def followed(
    forward: Callable[[], Tensor],
    modules: Sequence[nn.Module],
    accumulates: bool = False,
    frozen: nn.Module | None = None,
    half: bool = False,
) -> Followed:
    """Follow a forward pass and its backward pass.

    Args:
        forward: up to the loss.
        modules: all that take part; their weights are there already, and their gradients are told from activations.
        accumulates: follow two of both, which add up their gradients.
        frozen: module that does not learn meanwhile.
        half: what is computed in fp32 here will be in bf16; gradients of weights stay what they are.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    resting = [parameter for parameter in (frozen.parameters() if frozen else ()) if parameter.requires_grad]
    lives = Lives([*parameters, *(buffer for module in modules for buffer in module.buffers())], half)
    for parameter in resting:
        parameter.requires_grad_(False)
    # Replaced, because a mode of torch's would not reach what a backward pass computes again.
    with patch.object(F, "scaled_dot_product_attention", fused_attention), lives:
        loss = forward()
        kept = lives.now
        loss.backward()
        if accumulates:
            forward().backward()
        del loss
    for parameter in resting:
        parameter.requires_grad_(True)
    # All that is left.
    own = {parameter.grad.untyped_storage()._cdata for parameter in parameters if parameter.grad is not None}
    gradients = {number for key, number in lives.alive.items() if key in own}
    sizes = [lives.whole[number] if number in gradients else size for number, size in enumerate(lives.sizes)]
    events = [(sizes[number] * sign, number in gradients) for number, sign in lives.events]
    for parameter in parameters:
        parameter.grad = None
    return Followed(kept, events)


def estimate(config: Any, workload: Workload) -> str:
    """The config, and its cost in words; raises as `costs`."""
    return f"{to_yaml(config)}\n{in_words(*costs(config, workload))}"


def in_words(cost: Cost, *others: Cost) -> str:
    """A cost, and of others of the same what each process takes."""
    lines = ["parameters"]
    lines += [f"  {name:<10} {number / 1e6:10.2f} M" for name, number in cost.parameters.items()]
    lines += [
        f"memory of {'one process' if cost.processes == 1 else f'each of {cost.processes} processes'}",
        f"  states      {cost.states / GIB:9.3f} GiB   weights, gradients, optimiser, averages",
        f"  helpers     {cost.helpers / GIB:9.3f} GiB",
        f"  activations {cost.activations / GIB:9.3f} GiB   of {cost.samples} samples",
        f"  peak        {cost.peak / GIB:9.3f} GiB   activations, gradients and temporaries at the fullest moment",
        f"  total       {cost.total / GIB:9.3f} GiB   all but the gradients that make room for activations",
    ]
    lines += [f"  host        {cost.host / GIB:9.3f} GiB   weights that wait there, beside the total"] * (cost.host > 0)
    lines += [
        "operations of one micro-batch",
        f"  {cost.flops / 1e12:.4f} TFLOP; {cost.samples / (cost.flops / 400e12):.1f} samples/s at 400 TFLOP/s",
    ]
    lines += [f"{other.processes} processes: {other.total / GIB:.1f} GiB each" for other in others]
    return "\n".join(lines)


# What the doctor knows by heart; another stage says itself what it asks for, in a function `workload`.
WORKLOADS = {"pretrain": of_restorer, "distill": of_distillation}
STAGES = ("vae", "pretrain", "distill", "apt", "lora")


def workload_of(name: str, config: Any) -> Workload:
    """What one step of a stage asks for."""
    make = WORKLOADS.get(name) or importlib.import_module(f"training.{name}").workload
    return make(config)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES, help="training.STAGE")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="as for the stage: --config NAME key=value ...")
    args = parser.parse_args()
    stage = importlib.import_module(f"training.{args.stage}")
    command = parse_command(args.stage, stage.RECIPES, [*args.rest, "--dry-run"])
    torch.set_num_threads(command.threads)
    cost, *others = costs(command.config, workload_of(args.stage, command.config))
    print(to_yaml(command.config))
    print(in_words(cost, *others))
    give_back_at_once()
    free = free_bytes(torch.device("cpu"))
    # Here the host is the device.
    taken = cost.total + cost.host
    if taken > 0.8 * free:
        print(f"no fake steps: they take {taken / GIB:.1f} GiB, and this machine has {free / GIB:.1f} GiB")
        return
    fake = fake_steps(args.stage, command.config)
    print(f"2 fake steps on this CPU: {fake.seconds:.2f} s each, {fake.speed}, {fake.held / GIB:.3f} GiB; "
          f"estimated are {taken / fake.held:.2f} times as much")  # fmt: skip


@dataclass(frozen=True)
class FakeSteps:
    """What training on noise took."""

    seconds: float  # of the second step
    speed: str  # of it, with its unit
    held: int  # bytes, the most at a time, on top of what the data and this program take


def fake_steps(name: str, config: Any) -> FakeSteps:
    """Train for two steps on noise, on the CPU and in a folder that is removed again."""
    from . import loop  # it knows the stages, which know this file

    run = replace(config.run, steps=2, validate_every=2, preview_every=None, async_save=False, tensorboard=False)
    # Weights in fp32 have no other type without being sharded.
    precision = "pure_bf16" if run.parallel.precision == "pure_bf16" else "fp32"
    run = replace(run, parallel=replace(run.parallel, precision=precision), judge=None)
    session = loop.Session(processes=Processes(config=ParallelConfig(precision=precision)))
    config = loop.resolved(replace(config, run=run), session)
    with tempfile.TemporaryDirectory() as folder:
        make = _fake_stage(name, config, Path(folder))
        before = new_peak()
        stage, optims = make()
        # What is read and decoded for a look is not the cost of a step.
        stage.validate = lambda module: {}
        loop.run(stage, config, optims, Path(folder) / "run", session)
        row = read(Path(folder) / "run" / METRICS)[-1]
    unit = "tokens" if "tokens_per_second" in row else "samples"
    return FakeSteps(row["seconds"], f"{row[f'{unit}_per_second']:.4g} {unit}/s", peak_bytes() - before)


def _fake_stage(name: str, config: Any, folder: Path) -> Callable[[], tuple[Any, Mapping[str, OptimConfig]]]:
    """Make the data of a stage; what is returned makes the stage itself, and says how its modules are optimised."""
    if name == "vae":
        from .data import DataConfig, Dataset
        from .vae import VAEStage, optims

        crops = largest((*config.crops, *(crops for phase in config.curriculum for crops in phase.crops)))
        data = Dataset.load(None, DataConfig(stills=4, still_size=2 * max(128, crops.size)))
        # From random weights: to find better ones takes more memory than to train.
        fake = replace(config, crops=(crops,), curriculum=(), init=None, start="random", adv_from=0.0)
        return lambda: (VAEStage(fake, data, []), optims(fake))
    from .shards import HELD_OUT, Latents
    from .text import TextConfig

    noise = torch.randn(HELD_OUT + config.batch, 16, *DEFAULT_SAMPLE)
    save_file({"hq": noise, "lq": noise.clone()}, folder / "noise.safetensors")
    latents = Latents(folder, seed=0)
    if name == "pretrain":
        from .pretrain import PretrainStage

        fake = replace(config, init=None, batch_tokens=None, text=TextConfig())
        return lambda: (PretrainStage(fake, latents), {"g": fake.optim})
    if name == "distill":
        from .distill import HalvingStage

        fake = replace(config, batch_tokens=None, text=TextConfig())
        teacher = fake.teacher_model or fake.model
        return lambda: (HalvingStage(fake, latents, Restorer(teacher), fake.steps, Restorer(fake.model)),
                        {"g": fake.optim})  # fmt: skip
    from .apt import AdversarialStage, Phase

    pictures = (Phase(share=1.0, frames=(1,)),)
    if name == "apt":
        fake = replace(config, batch_tokens=None, curriculum=pictures, text=TextConfig())
        return lambda: (AdversarialStage(fake, latents, *(Restorer(fake.model) for _ in range(2))),
                        {"d": fake.d, "g": fake.g})  # fmt: skip
    from .adapters import Base
    from .lora import AdaptedAdversarialStage, flow_matching, players

    fake = replace(config, curriculum=pictures, text=TextConfig())

    def adapted(where: str) -> Base:
        return Base(Restorer(fake.model), fake.lora.base).to(torch.device("cpu"), fake.lora.offload_blocks)

    if config.objective == "flow":
        return lambda: (flow_matching(fake, latents, adapted(fake.init)), {"g": fake.g})
    return lambda: (AdaptedAdversarialStage(fake, latents, *players(fake, adapted, lambda where: Restorer(fake.model))),
                    {"d": fake.d or fake.g, "g": fake.g})  # fmt: skip


def give_back_at_once() -> None:
    """From now on memory that is let go of is the system's again, where the C library can.

    glibc keeps what was freed in pieces that later tensors do not fit into. For small tensors of many sizes that is up
    to a third of what a process seems to take, and says nothing about the stage.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, OWN_MAPPING)


def peak_bytes() -> int:
    """The most memory this process has held, since `new_peak` where the system can tell; 0 on Windows."""
    if STATUS.exists():
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def new_peak() -> int:
    """Forget the peak so far, where the system can; what is held now, after giving back what is not."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")
    return peak_bytes()


if __name__ == "__main__":
    run_main(main)
