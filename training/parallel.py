"""Processes that share a run: where this one stands, how weights are sharded, and how a sample's tokens are split.

There are replicate x shard x sp processes. Weights are sharded over shard x sp of them (FSDP2) and replicated over the
rest (HSDP); the sp processes of one data-parallel group work on the same micro-batch, each on a part of its tokens. A
single process in fp32 or pure bf16 runs as it is, without any of this.

Tokens are split in the order of the raster, padded to equal parts. Around attention an all-to-all exchanges tokens for
heads (Ulysses), so that every process sees the whole sequence with a part of the heads and windows do not matter.
Gradients: a gathered tensor adds up what all processes ask of it, and FSDP averages over all of them, so a loss that
every process of a group computes counts once.

    n video tokens of all samples   l text tokens   m, k of these in one part, with padding   p processes of a group
    heads, d attention heads and their width   c channels

Source: DeepSpeed-Ulysses, arXiv 2309.14509; the released configuration of SeedVR trains in this way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from seedvr2_core.device import pick_device
from seedvr2_core.errors import SettingError
from seedvr2_core.kernels import Choices
from seedvr2_core.models.dit import Block, Conditioning, WindowAttention, WindowLayout

from .config import ParallelConfig

T = TypeVar("T")

# Ways into a module other than calling it. FSDP has to know them, to gather the weights in time.
ENTRANCES = ("velocity", "encode", "decode")
# The variables in which torchrun tells a process where it stands.
RANK, WORLD, LOCAL_RANK, ATTEMPT = "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and this one's place among them. The default is a process on its own."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    config: ParallelConfig = field(default_factory=ParallelConfig)
    weights: DeviceMesh | None = None  # replicate x shard*sp, or the latter alone; None: nothing is sharded
    tokens: dist.ProcessGroup | None = None  # the sp processes of this group; None: tokens stay together
    control: dist.ProcessGroup | None = None  # all, over gloo, for numbers and flags
    saving: dist.ProcessGroup | None = None  # all, over gloo, for checkpoints that are written meanwhile

    @property
    def first(self) -> bool:
        """Whether this is the process that writes logs."""
        return self.rank == 0

    @property
    def groups(self) -> int:
        """Data-parallel groups."""
        return self.world // self.config.sp

    @property
    def group(self) -> int:
        """The data-parallel group that this process belongs to."""
        return self.rank // self.config.sp

    def total_micros(self, micro_batches: int | None) -> int:
        """Micro-batches of a step in all processes; None: one for every data-parallel group."""
        return self.groups if micro_batches is None else micro_batches

    def micros(self, micro_batches: int | None) -> range:
        """The micro-batches of a step that fall to this process; their numbers do not depend on who computes them.

        Raises:
            SettingError: they cannot be dealt out evenly.
        """
        total = self.total_micros(micro_batches)
        if total % self.groups:
            raise SettingError(
                f"{total} micro-batches cannot be dealt to {self.groups} data-parallel groups; "
                "set run.micro_batches to a multiple of them, or to none for one each."
            )
        share = total // self.groups
        return range(self.group * share, (self.group + 1) * share)

    def mean(self, values: Sequence[float]) -> list[float]:
        """Means over all processes, the same in each of them to the bit."""
        if self.control is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return (tensor / self.world).tolist()

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        values: list[T] = [value] * self.world
        if self.control is not None:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, value: object) -> object:
        """The first process's value."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def place(self, module: nn.Module, train: bool = True) -> nn.Module:
        """Move a module to the device and, with several processes or the precision bf16, shard it; in place.

        The weights stay fp32, and become bf16 in pure_bf16. Layers of a transformer are sharded one by one, what is
        around them as a whole. Names of submodules in a module's `in_fp32` compute, and are kept, in fp32 whatever the
        precision of the rest.

        Args:
            module: the same in every process.
            train: False for a module that only helps and has no gradients; in bf16 all its weights are bf16 too.

        Raises:
            SettingError: the heads cannot be split over the processes of a group.
        """
        bf16 = self.config.precision != "fp32"
        if bf16 and not train:
            module.to(torch.bfloat16)
        elif self.config.precision == "pure_bf16":
            halve(module)
        module.to(self.device)
        for part in module.modules():
            if isinstance(part, Arranged):
                part.layers = Layers(self.tokens, self.config.activation_checkpoint and train)
            if isinstance(part, Block) and self.tokens is not None:
                part.attn = UlyssesAttention(part.attn, self.tokens)
            if isinstance(part, Block) and self.config.compile:
                part.compile()
        if self.weights is None:
            return module
        # Inputs are cast where they are used: a timestep in bf16 would be off by up to 4 of 1000.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        shard = partial(fully_shard, mesh=self.weights, reshard_after_forward=self.config.reshard_after_forward)
        for name in getattr(module, "in_fp32", ()):
            shard(module.get_submodule(name), mp_policy=exact)
        for part in module.modules():
            if isinstance(part, Block):
                shard(part, mp_policy=policy if bf16 else exact)
        shard(module, mp_policy=policy if bf16 else exact)
        for name in ENTRANCES:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)
        return module


def halve(module: nn.Module) -> None:
    """Round the weights of a module to bf16, in place; those of its `in_fp32` stay as they are."""
    exact = {id(p) for name in getattr(module, "in_fp32", ()) for p in module.get_submodule(name).parameters()}
    for parameter in module.parameters():
        if id(parameter) not in exact:
            parameter.data = parameter.data.to(torch.bfloat16)


def weight_parts(config: ParallelConfig, world: int) -> int:
    """Processes that one copy of the weights is split over: shard x sp.

    Raises:
        SettingError: `world` is not replicate x shard x sp.
    """
    others = config.replicate * config.sp
    shard = config.shard if config.shard is not None else world // others
    if shard * others != world or shard == 0:
        raise SettingError(
            f"{world} processes cannot be replicate {config.replicate} x shard {shard} x sp {config.sp}; "
            "start as many as their product, or leave parallel.shard at none."
        )
    return shard * config.sp


def connect(config: ParallelConfig, device: torch.device, init_method: str = "env://") -> Processes:
    """Join the processes that torchrun started, or stand alone where it did not.

    Args:
        config: what the processes share, and how.
        device: of this process.
        init_method: where the processes find each other.

    Raises:
        SettingError: their number is not replicate x shard x sp.
    """
    rank, world = int(os.environ.get(RANK, 0)), int(os.environ.get(WORLD, 1))
    parts = weight_parts(config, world)
    if world == 1 and config.precision != "bf16":
        return Processes(device=device, config=config)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if world == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            store, rank, world = next(dist.rendezvous(init_method, rank, world))
            # torchrun keeps its store when it restarts processes; the addresses in it are those of the dead.
            store = dist.PrefixStore(f"attempt_{attempt()}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    if config.replicate > 1:
        shape, names = (config.replicate, parts), ("replicate", "shard")
    else:
        shape, names = (world,), ("shard",)
    tokens = None
    if config.sp > 1:
        by_group = init_device_mesh(device.type, (world // config.sp, config.sp), mesh_dim_names=("data", "sp"))
        tokens = by_group["sp"].get_group()
    return Processes(
        rank=rank,
        world=world,
        device=device,
        config=config,
        weights=init_device_mesh(device.type, shape, mesh_dim_names=names),
        tokens=tokens,
        control=dist.new_group(backend="gloo"),
        saving=dist.new_group(backend="gloo"),
    )


def attempt() -> int:
    """How often torchrun has begun these processes anew, because one of them died."""
    return int(os.environ.get(ATTEMPT, 0))


def local_device(name: str) -> torch.device:
    """The device of this process: "cuda", and "auto" where there is one, is the one that torchrun numbers it with.

    Raises:
        SettingError: as `pick_device`.
    """
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        # Named before it is tried: whoever tries "cuda" takes memory of the first.
        name = f"cuda:{os.environ.get(LOCAL_RANK, 0)}"
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def set_last_micro(module: nn.Module, last: bool) -> None:
    """Reduce gradients over copies of the weights only in the last micro-batch of a step.

    Over shards they are reduced in each: whole gradients are more than a device has room for.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(last)


def reshard(module: nn.Module) -> None:
    """Free gathered weights: whoever changes the shards makes them stale."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


# How the layers of a transformer are run.


class Trunk(Protocol):
    """What has the layers of a transformer."""

    blocks: Sequence[Block]


class Arranged(nn.Module):
    """A module that runs a transformer by `self.layers.of(dit)`, so that `Processes.place` can arrange its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()


class Layers:
    """The layers of a transformer as they are run: plainly, recomputed in the backward pass, over several processes."""

    def __init__(self, tokens: dist.ProcessGroup | None = None, recompute: bool = False):
        self.tokens, self.recompute = tokens, recompute

    def of(self, trunk: Trunk) -> list[Callable[..., tuple[Tensor, Tensor]]]:
        """For `DiT.forward(blocks=...)`, to be asked for in every forward pass.

        Over several processes the first layer takes all tokens and the last one returns all video tokens; in between
        each holds its part, see `whole`.
        """
        layers: list[Callable[..., tuple[Tensor, Tensor]]] = list(trunk.blocks)
        if self.recompute:
            layers = [partial(self._recomputed, block) for block in layers]
        if self.tokens is not None:
            part = Part(self.tokens)
            last = len(layers) - 1
            layers = [partial(part.run, block, index == 0, index == last) for index, block in enumerate(layers)]
        return layers

    def whole(self, vid: Tensor, n: int) -> Tensor:
        """All n video tokens, of what any layer returned."""
        return vid if self.tokens is None or len(vid) == n else gather(vid, self.tokens)[:n]

    @staticmethod
    def _recomputed(block: Block, *args: object) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class Part:
    """One process's part of the tokens, in one forward pass."""

    def __init__(self, tokens: dist.ProcessGroup):
        self.tokens = tokens
        self.n = 0
        self.vid_cond: Conditioning | None = None
        self.txt_cond: Conditioning | None = None

    def run(
        self,
        block: Callable[..., tuple[Tensor, Tensor]],
        first: bool,
        last: bool,
        vid: Tensor,
        txt: Tensor,
        vid_cond: Conditioning,
        txt_cond: Conditioning,
        *rest: object,
    ) -> tuple[Tensor, Tensor]:
        """A layer; `rest` is what it takes beside tokens and their conditioning."""
        if first:
            self.n = len(vid)
            self.vid_cond, self.txt_cond = (
                PartConditioning(cond, len(x), self.tokens) for cond, x in ((vid_cond, vid), (txt_cond, txt))
            )
            vid, txt = split(vid, self.tokens), split(txt, self.tokens)
        vid, txt = block(vid, txt, self.vid_cond, self.txt_cond, *rest)
        return (gather(vid, self.tokens)[: self.n] if last else vid), txt


class PartConditioning(Conditioning):
    """What a part of the tokens reads off the timestep embedding. Padding belongs to the last sample."""

    def __init__(self, whole: Conditioning, count: int, tokens: dist.ProcessGroup):
        self.embedding, self.sample = whole.embedding, None
        samples = whole.embedding.shape[2]
        if samples > 1:
            sample = whole.sample
            if sample is None:
                sample = torch.arange(samples, device=whole.embedding.device).repeat_interleave(count // samples)
            length = part_length(count, tokens)
            sample = F.pad(sample, (0, length * tokens.size() - count), value=samples - 1)
            self.sample = sample[length * tokens.rank() :][:length]


class UlyssesAttention(WindowAttention):
    """A layer's attention over tokens of which every process holds a part, and heads of which it computes a part."""

    def __init__(self, attn: WindowAttention, tokens: dist.ProcessGroup):
        """Takes over the weights of `attn`, under the same names.

        Raises:
            SettingError: the heads cannot be split over the processes.
        """
        nn.Module.__init__(self)
        self.head_dim, self.tokens = attn.head_dim, tokens
        for name, child in attn.named_children():
            self.add_module(name, child)
        heads = attn.proj_out["vid"].in_features // attn.head_dim
        if heads % tokens.size():
            fit = [p for p in range(2, heads + 1) if heads % p == 0]
            raise SettingError(
                f"{heads} attention heads cannot be split over parallel.sp={tokens.size()} processes; "
                f"choose one of {', '.join(map(str, fit))}."
            )

    def forward(
        self,
        vid: Tensor,
        txt: Tensor,
        layout: WindowLayout,
        attention: str,
        rows: int | None = None,
        choices: Choices | None = None,
        answers: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """m c and k c in and out, else as `WindowAttention`; never by kernels without gradients."""
        m, k, p = len(vid), len(txt), self.tokens.size()
        texts = [length for _, length in layout.texts]
        n = len(layout.spread) - sum(windows * length for windows, length in layout.texts)
        projected = torch.cat(self._project(vid, txt), dim=1)
        projected = exchange(rearrange(projected, "three x (p heads) d -> p three x heads d", p=p), self.tokens)
        vid, txt = (
            rearrange(part, "p three x heads d -> three (p x) heads d")[:, :count]
            for part, count in ((projected[:, :, :m], n), (projected[:, :, m:], sum(texts)))
        )
        out = self._gathered([vid, txt], layout, attention, answers, rows)
        parts = [padded(x, length * p).unflatten(0, (p, length)) for x, length in zip(out, (m, k), strict=False)]
        out = rearrange(exchange(torch.cat(parts, dim=1), self.tokens), "p x c -> x (p c)")
        return self.proj_out["vid"](out[:m]), out[m:] if answers else None


# Tokens between processes. Every function is differentiable.


def part_length(count: int, tokens: dist.ProcessGroup) -> int:
    """Tokens in one part, with padding."""
    return math.ceil(count / tokens.size())


def padded(x: Tensor, count: int) -> Tensor:
    """x with zeros after its end, `count` long."""
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, count - len(x)))


def split(x: Tensor, tokens: dist.ProcessGroup) -> Tensor:
    """This process's part of x, which all hold. Its gradient is this part's; the sum over processes is that of x."""
    length = part_length(len(x), tokens)
    return padded(x, length * tokens.size())[length * tokens.rank() :][:length]


def gather(x: Tensor, tokens: dist.ProcessGroup) -> Tensor:
    """All parts, padding included, in every process. The gradients of all of them add up."""
    return _Gather.apply(x, tokens)


def exchange(x: Tensor, tokens: dist.ProcessGroup) -> Tensor:
    """x p ...: entry i goes to process i, and what comes back at i is from process i."""
    return _Exchange.apply(x, tokens)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tokens: dist.ProcessGroup) -> Tensor:
        ctx.tokens = tokens
        out = x.new_empty(len(x) * tokens.size(), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=tokens)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        out = gradient.new_empty(len(gradient) // ctx.tokens.size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(out, gradient.contiguous(), group=ctx.tokens)
        return out, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tokens: dist.ProcessGroup) -> Tensor:
        ctx.tokens = tokens
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=tokens)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradient, ctx.tokens), None
