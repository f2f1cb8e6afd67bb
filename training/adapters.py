"""Low-rank adapters on a frozen transformer: the layers, the networks made of them, and their files.

Every linear layer of every block gets an adapter, y = W x + (alpha / r) B A x, of which only A and B are trained. One
frozen base can have several sets of them, of which one at a time is in use.

peft is not used: our linear layers fuse an activation or a factor with the product, and peft would add to what comes
after those. Files are in peft's format and names.

    b clips   c channels   t h w latent frames, height, width   i o channels in and out of a layer   r rank

Source: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seedvr2_core.diffusion.conditioning import with_mask
from seedvr2_core.errors import CheckpointError, SettingError
from seedvr2_core.memory.streaming import StreamedBlocks
from seedvr2_core.models.dit import DiT, Projection
from seedvr2_core.models.linear import Activation, Linear, finish, from_fp8, to_fp8

from .config import setting
from .discriminator import Discriminator, Readout, tap_blocks
from .parallel import Arranged
from .restorer import Restorer, embeddings

BaseType = Literal["fp32", "bf16", "fp8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
# peft's names of a folder's files, and what it puts in front of a tensor's name.
ADAPTER_FILE, ADAPTER_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
# Our own entry in peft's config.
PROMPTED = "seedvr2_prompted"
# In front of the same tensors among those of an `AdaptedRestorer`.
IN_RESTORER = "adapters."


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Size and strength of the adapters."""

    rank: int = setting(32, "inner width r of an adapter", least=1, frozen=True)
    alpha: float | None = setting(None, "numerator of the strength alpha / r; none: r", least=0)
    base: BaseType = setting("bf16", "type of the frozen weights; fp8: e4m3 with a scale for every row")
    offload_blocks: int = setting(
        0, "frozen blocks that wait in host memory; needs run.parallel.activation_checkpoint", least=0
    )

    @property
    def strength(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Adapter(nn.Module):
    """What is added to one layer: B A x, nothing at first."""

    def __init__(self, i: int, o: int, rank: int):
        super().__init__()
        self.lora_A = nn.Linear(i, rank, bias=False)
        self.lora_B = nn.Linear(rank, o, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        # The masters are fp32 and small; what passes through them is in the type of the base.
        return F.linear(F.linear(x, self.lora_A.weight.to(x.dtype)), self.lora_B.weight.to(x.dtype))


class Adapters(nn.Module):
    """One set of adapters, for all layers of a base. Its tensors have peft's names, less the prefix."""

    def __init__(self, base: Base, config: LoraConfig):
        super().__init__()
        self.strength = config.strength
        self.of_layer: dict[str, Adapter] = {}
        for path, layer in base.layers.items():
            adapter = Adapter(layer.in_features, layer.out_features, config.rank)
            self.of_layer[path] = adapter
            *folders, name = path.split(".")
            place: nn.Module = self
            for folder in folders:
                if not hasattr(place, folder):
                    place.add_module(folder, nn.Module())
                place = place.get_submodule(folder)
            place.add_module(name, adapter)

    def added(self, path: str, x: Tensor) -> Tensor | None:
        """What the adapter of a layer adds to its product; None at strength 0, where the base is itself to the bit."""
        return self.strength * self.of_layer[path](x) if self.strength else None

    def weight_of(self, path: str) -> Tensor:
        """The same as a matrix o i, in fp32."""
        adapter = self.of_layer[path]
        return self.strength * (adapter.lora_B.weight.float() @ adapter.lora_A.weight.float())


class AdaptedLinear(Linear):
    """A frozen layer to whose product the set of adapters in use adds its part, before activation and factor."""

    def __init__(self, layer: Linear, path: str, switch: Switch, fp8: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.path, self.switch = path, switch
        self.bias = layer.bias
        weight, scale = to_fp8(layer.weight.detach()) if fp8 else (layer.weight.detach(), None)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("row_scale", scale, persistent=False)

    def forward(self, x: Tensor, activation: Activation = "none", factor: Tensor | None = None) -> Tensor:
        if self.row_scale is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = _Fp8Product.apply(x, self.weight, self.row_scale)
            y = y if self.bias is None else y + self.bias
        adapters = self.switch.adapters
        added = None if adapters is None else adapters.added(self.path, x)
        return finish(y if added is None else y + added, activation, factor)

    def plain_weight(self) -> Tensor:
        """The frozen weight o i in fp32."""
        return self.weight.float() if self.row_scale is None else from_fp8(self.weight, self.row_scale, torch.float32)


class _Fp8Product(torch.autograd.Function):
    """x W^T of a frozen weight in fp8, which the backward pass unpacks again instead of keeping it unpacked."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        # Saved in torch's way, so that a block that is recomputed has the weight that is there then.
        ctx.save_for_backward(weight, scale)
        return F.linear(x, from_fp8(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ from_fp8(weight, scale, gradient.dtype), None, None


class Switch:
    """Which set of adapters the layers of a base use at the moment."""

    def __init__(self) -> None:
        self.adapters: Adapters | None = None

    @contextmanager
    def use(self, adapters: Adapters | None) -> Iterator[None]:
        before, self.adapters = self.adapters, adapters
        try:
            yield
        finally:
            self.adapters = before


class Base:
    """A restorer that is frozen and has room for adapters in every linear layer of its blocks.

    Not a module: what holds it does not train, average or save it.
    """

    def __init__(self, restorer: Restorer, dtype: BaseType = "fp32"):
        """The restorer is converted and changed in place; where its type stays, so do its results, to the bit."""
        self.restorer = restorer.to(DTYPES[dtype]).requires_grad_(False).eval()
        self.switch = Switch()
        self.layers: dict[str, AdaptedLinear] = {}
        # Of the discriminator, which shows samples that differ by less than bf16 can tell.
        self.exact_vid_in = _exact(restorer.dit.vid_in)
        for path, layer in list(_linear_layers(restorer.dit)):
            adapted = AdaptedLinear(layer, path, self.switch, fp8=dtype == "fp8")
            parent, _, name = path.rpartition(".")
            restorer.dit.get_submodule(parent).add_module(name, adapted)
            self.layers[path] = adapted
        self.streamed = StreamedBlocks(restorer.dit.blocks, restorer.device, 0)

    @property
    def dit(self) -> DiT:
        return self.restorer.dit

    def to(self, device: torch.device, offloaded: int = 0) -> Base:
        """Move it to a device, but for the weights of so many blocks, which wait in host memory. What reads those with
        gradients has to recompute its activations, and they come again for that.

        Raises:
            SettingError: there are not so many blocks.
        """
        depth = len(self.dit.blocks)
        if offloaded > depth:
            raise SettingError(f"lora.offload_blocks is {offloaded}, and the base has {depth} blocks; choose at most "
                               "as many.")
        self.streamed = StreamedBlocks(self.dit.blocks, device, offloaded)
        self.restorer.to(device)
        self.exact_vid_in.to(device)
        return self

    def blocks(self, adapters: Adapters | None) -> list[Callable[..., tuple[Tensor, Tensor]]]:
        """The layers of the transformer with a set of adapters, which a backward pass that recomputes them uses too."""
        return [partial(self._run, adapters, index) for index in range(len(self.dit.blocks))]

    def _run(self, adapters: Adapters | None, index: int, *args: object) -> tuple[Tensor, Tensor]:
        with self.switch.use(adapters):
            return self.streamed.at(index)(*args)

    @torch.no_grad()
    def merge(self, adapters: Adapters) -> Restorer:
        """The restorer with the adapters added into its weights, in ordinary layers again. Ends this base."""
        self.streamed.close()
        for path, layer in self.layers.items():
            merged = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            weight = layer.plain_weight() + adapters.weight_of(path).to(layer.weight.device)
            dtype = layer.weight.dtype if layer.row_scale is None else DTYPES["fp8"]
            merged.weight, merged.bias = nn.Parameter(weight.to(dtype)), layer.bias
            parent, _, name = path.rpartition(".")
            self.dit.get_submodule(parent).add_module(name, merged)
        self.layers = {}
        return self.restorer


def _linear_layers(dit: DiT) -> Iterator[tuple[str, Linear]]:
    yield from ((f"blocks.{path}", part) for path, part in dit.blocks.named_modules() if isinstance(part, Linear))


def _exact(projection: Projection) -> Projection:
    weight = projection.proj.weight
    copy = Projection(weight.shape[1], weight.shape[0]).to(weight.device)
    copy.load_state_dict(projection.state_dict())
    return copy.requires_grad_(False)


@dataclass(frozen=True)
class _Blocks:
    """What `parallel.Layers` takes as a transformer."""

    blocks: Sequence[Callable[..., tuple[Tensor, Tensor]]]


class AdaptedRestorer(Arranged):
    """A base with a set of adapters, used like a `Restorer`. Its parameters are the adapters'."""

    def __init__(self, base: Base, config: LoraConfig):
        super().__init__()
        self.adapters = Adapters(base, config)
        self.shared = (base,)

    @property
    def base(self) -> Base:
        return self.shared[0]

    @property
    def device(self) -> torch.device:
        return self.base.restorer.device

    @property
    def prompt(self) -> Tensor:
        return self.base.restorer.prompt

    def velocity(
        self,
        x: Tensor,
        condition: Tensor,
        u: Tensor,
        dropped: Tensor | None = None,
        texts: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """See `Restorer.velocity`."""
        prompts = embeddings(self.prompt, len(x), dropped, texts)
        latents = torch.cat([x, with_mask(condition)], dim=1).to(self.prompt.dtype)
        blocks = self.layers.of(_Blocks(self.base.blocks(self.adapters)))
        return torch.stack(self.base.dit(latents, prompts, u, blocks=blocks)).to(x.dtype)


class AdaptedDiscriminator(Discriminator):
    """A base with a set of adapters and a readout. Its parameters are those two."""

    def __init__(self, base: Base, config: LoraConfig):
        Arranged.__init__(self)
        self.shared = (base,)
        self.config = base.dit.config
        self.taps = tap_blocks(self.config.depth)
        self.adapters = Adapters(base, config)
        self.readout = Readout(self.config.dim, self.config.heads, len(self.taps))

    @property
    def base(self) -> Base:
        return self.shared[0]

    @property
    def vid_in(self) -> nn.Module:
        return self.base.exact_vid_in

    @property
    def txt_in(self) -> nn.Module:
        return self.base.dit.txt_in

    @property
    def emb_in(self) -> nn.Module:
        return self.base.dit.emb_in

    @property
    def blocks(self) -> list[Callable[..., tuple[Tensor, Tensor]]]:
        return self.base.blocks(self.adapters)


# Adapters as files.


def merged(restorer: Restorer, config: LoraConfig, tensors: Mapping[str, Tensor], where: Path) -> Restorer:
    """A restorer in fp32 with adapters added into its weights.

    Args:
        restorer: is used up.
        config: of the adapters.
        tensors: of an `AdaptedRestorer`.
        where: they came from, for the errors.

    Raises:
        CheckpointError: they are for another model.
    """
    base = Base(restorer)
    # What a file says of itself takes no memory before it turns out to be true.
    with torch.device("meta"):
        adapters = Adapters(base, config)
    own = {name.removeprefix(IN_RESTORER): tensor for name, tensor in tensors.items() if name.startswith(IN_RESTORER)}
    try:
        adapters.load_state_dict(own, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"The adapters in {where} are for another model: {str(error).splitlines()[-1].strip()}"
                              ) from error
    return base.merge(adapters)


def save_adapters(
    folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig, base: str, prompted: bool = True
) -> None:
    """Write adapters as peft does: adapter_model.safetensors and adapter_config.json.

    Args:
        tensors: the state of `Adapters`, whole.
        base: what they were trained on, as `weights.open_restorer` takes it.
        prompted: whether that had its prompt, or zeros in its place.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    named = {f"{PEFT_PREFIX}{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    about = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.strength * config.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".lora_")[0] for name in tensors}),
        "inference_mode": True,
        PROMPTED: prompted,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{ADAPTER_FILE}.part"
        save_file(named, part, metadata={"format": "pt"})
        part.replace(folder / ADAPTER_FILE)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(about, indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written ({error}); choose another folder.") from error


@dataclass(frozen=True)
class AboutAdapters:
    """What is known of adapters beside their weights."""

    base: str  # what they were trained on, as `weights.open_restorer` takes it
    config: LoraConfig
    prompted: bool = True  # whether that had its prompt, or zeros in its place

    @classmethod
    def in_folder(cls, folder: Path) -> AboutAdapters | None:
        """What a folder says about itself that `save_adapters`, or peft, wrote; None: it is no such folder.

        Raises:
            CheckpointError: nothing can be made of it.
        """
        path = folder / ADAPTER_CONFIG
        if not path.is_file():
            return None
        try:
            about = json.loads(path.read_text("utf-8"))
            base, rank, alpha = str(about["base_model_name_or_path"]), int(about["r"]), float(about["lora_alpha"])
            prompted = bool(about.get(PROMPTED, True))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error!r}); expected what peft writes, with "
                                  "base_model_name_or_path, r and lora_alpha.") from error
        if rank < 1:
            raise CheckpointError(f"{path} says that its adapters have rank {rank}; expected at least 1.")
        return cls(base, LoraConfig(rank=rank, alpha=alpha), prompted)


def load_adapters(folder: Path) -> dict[str, Tensor]:
    """The weights that `save_adapters`, or peft, wrote, by their names in an `AdaptedRestorer`.

    Raises:
        CheckpointError: the file is missing, truncated or of another kind.
    """
    path = folder / ADAPTER_FILE
    try:
        return {IN_RESTORER + name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); expected the adapters that the {ADAPTER_CONFIG} "
                              "beside it is about.") from error
