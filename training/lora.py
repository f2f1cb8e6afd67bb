"""Fine-tuning on one GPU: low-rank adapters on a frozen transformer. `python -m training.lora --config 3b_lora_24gb`

Every linear layer of every block gets an adapter, y = W x + (alpha / r) B A x, of which only A and B are trained: by
flow matching, or adversarially. In the latter, generator and discriminator are one frozen base with two sets of
adapters; the discriminator has its readout beside them. It may also have a base of its own, and the generator train all
its weights.

peft is not used: our linear layers fuse an activation or a factor with the product, and peft would add to what comes
after those. Files are in peft's format and names.

    b clips   c channels   t h w latent frames, height, width   i o channels in and out of a layer   r rank

Source: Hu et al., arXiv 2106.09685; SeedVR2 publishes nothing on adapters, all values here are ours.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seedvr2_core.diffusion.conditioning import with_mask
from seedvr2_core.errors import CheckpointError, SettingError
from seedvr2_core.memory.streaming import StreamedBlocks
from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiT, DiTConfig, Projection
from seedvr2_core.models.linear import Activation, Linear, finish, from_fp8, to_fp8

from . import config as configs
from . import doctor, loop
from .apt import (
    CURRICULUM,
    SMALL_BATCH,
    AdversarialStage,
    DiscConfig,
    LossConfig,
    PostTraining,
    adversarial_workload,
)
from .config import OptimConfig, ParallelConfig, RunConfig, parse_command, run_main, setting
from .curriculum import Phase, check_phases
from .discriminator import Discriminator, Readout, tap_blocks
from .guards import GuardConfig
from .parallel import Arranged
from .pretrain import NANO_DIT, Pretraining, PretrainStage, load_run
from .randomness import key
from .restorer import Restorer, embeddings, for_training
from .shards import Latents
from .text import TextConfig, Texts, refuse_bad_targets
from .weights import base_of, open_restorer

log = logging.getLogger(__name__)

# Latent size of the longest sample that the recipes of `precompute` for fine-tuning make: 21 frames of 512 x 512.
CLIP = (6, 64, 64)
BaseType = Literal["fp32", "bf16", "fp8"]
Objective = Literal["flow", "apt"]
Trained = Literal["adapters", "full"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
# peft's names of a folder's files, and what it puts in front of a tensor's name.
ADAPTER_FILE, ADAPTER_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


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


@dataclass(frozen=True, kw_only=True)
class AdaptedDiscConfig(DiscConfig):
    """The same, and what the discriminator adapts."""

    # APT and SeedVR2 begin with the many-step model, which judges better than the distilled one.
    base: str | None = setting(None, "run, checkpoint or published name of its frozen weights; none: those of init")


@dataclass(frozen=True, kw_only=True)
class LoraTraining:
    """Everything a run of this stage depends on."""

    init: str = setting(about="what is adapted: run, checkpoint or published name")
    model: DiTConfig = SEEDVR2_3B
    objective: Objective = setting("apt", "adversarial post-training of a one-step base, or flow matching of another")
    generator: Trained = setting(
        "adapters", "adversarial: what of it is trained; the discriminator always has adapters", frozen=True
    )
    lora: LoraConfig = LoraConfig()
    run: RunConfig
    g: OptimConfig
    d: OptimConfig | None = setting(None, "of the discriminator's adapters and readout; none: flow matching")
    guard: GuardConfig = GuardConfig(on_spike="alert")
    batch: int = setting(1, "samples of a micro-batch", least=1, frozen=True)
    text: TextConfig = TextConfig()
    text_dropout: float = setting(0.1, "flow matching: share of samples with the null prompt", least=0, most=1)
    condition_noise: float = setting(0.25, "most noise in the condition", source="RC", least=0, most=1)
    pure_noise: float = setting(0.0, "flow matching: share of samples at pure noise", least=0, most=1)
    loss: LossConfig = LossConfig()
    disc: AdaptedDiscConfig = AdaptedDiscConfig(backward="replay")
    curriculum: tuple[Phase, ...] = setting(CURRICULUM, "adversarial: how samples grow", source="S2")

    def __post_init__(self) -> None:
        if self.objective == "apt":
            refuse_bad_targets(self.text)
        elif self.generator == "full" or self.disc.base is not None:
            raise SettingError("generator=full and disc.base are for objective=apt; flow matching has no "
                               "discriminator, and of all weights it is training.pretrain.")
        if self.lora.offload_blocks and not self.run.parallel.activation_checkpoint:
            raise SettingError(f"lora.offload_blocks is {self.lora.offload_blocks}, and without recomputation the "
                               "backward pass wants all blocks at once; set run.parallel.activation_checkpoint=true.")
        if self.run.parallel.sp > 1:
            raise SettingError(f"run.parallel.sp is {self.run.parallel.sp}, and a frozen base takes whole samples; set "
                               "it to 1: more processes then take more samples.")


_RUN = RunConfig(
    steps=2000, micro_batches=8, ema=0.995, save_every=250, keep_averaged_every=1000,
    parallel=ParallelConfig(activation_checkpoint=True),
)  # fmt: skip
_GAN = OptimConfig(lr=2e-5, final_lr=2e-5, betas=(0.0, 0.99), weight_decay=0.0)
_SHORT = (Phase(share=0.3, frames=(1,)), Phase(share=0.7, frames=(1, 5, 9, 17)))
_MIDDLE = (Phase(share=0.3, frames=(1,)), Phase(share=0.7, frames=(1, 5, 9, 21)))
# Of a generator that trains all its weights: masters in fp32, averages that do not take memory of the device.
_WHOLE = replace(_RUN, ema_device="cpu", parallel=ParallelConfig(precision="bf16", activation_checkpoint=True))
# The published 3B and 7B take one step, and stay sharp in it only if what they learn from is adversarial.
_3B = LoraTraining(init="3b", model=SEEDVR2_3B, run=_RUN, g=_GAN, d=_GAN, curriculum=_MIDDLE)
_7B = replace(_3B, init="7b", model=SEEDVR2_7B)
# For a base of many steps, one's own or SeedVR's. It would make the one step of a distilled base the mean of all
# answers: blurred.
_FLOW = replace(
    _3B,
    init="runs/pretrain",
    objective="flow",
    run=replace(_RUN, steps=5000, ema=0.999),
    g=OptimConfig(lr=1e-4, final_lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0),
    d=None,
    guard=GuardConfig(),
)
_NANO = {"model": NANO_DIT, "run": RunConfig(steps=400, seed=6, ema=0.99, save_every=100, validate_every=200),
         "lora": LoraConfig(rank=8, base="fp32"), "condition_noise": 0.1}  # fmt: skip
RECIPES = {
    "3b_lora_24gb": replace(_3B, curriculum=_SHORT),
    "3b_lora_48gb": replace(_3B, lora=LoraConfig(rank=64)),
    "7b_lora_24gb": replace(_7B, lora=LoraConfig(base="fp8"), curriculum=_SHORT),
    "7b_lora_48gb": _7B,
    "7b_lora_80gb": replace(_7B, lora=LoraConfig(rank=64)),
    "3b_full_80gb": replace(_3B, generator="full", run=_WHOLE, g=SMALL_BATCH),
    "3b_lora_flow_24gb": _FLOW,
    "7b_lora_flow_24gb": replace(_FLOW, model=SEEDVR2_7B, lora=LoraConfig(base="fp8")),
    "7b_lora_flow_48gb": replace(_FLOW, model=SEEDVR2_7B),
    "nano": replace(
        _3B, **_NANO, init="nano", batch=8, disc=AdaptedDiscConfig(), curriculum=(Phase(share=1.0, frames=(1, 5)),)
    ),
    "nano_flow": replace(_FLOW, **_NANO, g=replace(_FLOW.g, lr=5e-4, final_lr=5e-5), batch=16),
}


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


class AdaptedAdversarialStage(AdversarialStage):
    """Adversarial post-training of two sets of adapters, or of a whole generator and one set."""

    def __init__(self, config: LoraTraining, latents: Latents, generator: Base | Restorer, critic: Base):
        """`critic` is what the discriminator adapts; it may be the generator's base. A `Restorer` is trained in place.

        Raises:
            CheckpointError: generator and discriminator cannot be shown the same.
        """
        refuse_misfit(generator.dit.config, critic.dit.config)
        self.config, self.latents = post_training(config), latents
        check_phases(self.config.curriculum, latents.shapes)
        torch.manual_seed(key(config.run.seed, "lora/adapters"))
        adapts = isinstance(generator, Base)
        self.generator = AdaptedRestorer(generator, config.lora) if adapts else for_training(generator)
        self.discriminator = AdaptedDiscriminator(critic, config.lora)
        self.prompt = critic.restorer.prompt.detach()
        self.texts = Texts.of_run(config.text, self.generator, latents, config.run.seed)
        self.modules = {"d": self.discriminator, "g": self.generator}


def refuse_misfit(generator: DiTConfig, critic: DiTConfig) -> None:
    """Refuse a discriminator that cannot be shown what the generator makes; its size does not matter.

    Raises:
        CheckpointError: it takes other latents or texts.
    """
    (ours, our_texts), (theirs, their_texts) = ((each.out_channels, each.text_dim) for each in (generator, critic))
    if (ours, our_texts) != (theirs, their_texts):
        raise CheckpointError(f"disc.base takes latents of {theirs} channels and texts {their_texts} wide, and the "
                              f"generator those of {ours} channels and {our_texts} wide; name a model for the same.")


def players(
    config: LoraTraining, adapted: Callable[[str], Base], whole: Callable[[str], Restorer]
) -> tuple[Base | Restorer, Base]:
    """What generator and discriminator are made of.

    Args:
        config: of the run.
        adapted: opens a base, by its name.
        whole: opens a generator that is trained as a whole.
    """
    if config.generator == "full":
        return whole(config.init), adapted(config.disc.base or config.init)
    base = adapted(config.init)
    return base, base if config.disc.base is None else adapted(config.disc.base)


def flow_matching(config: LoraTraining, latents: Latents, base: Base) -> PretrainStage:
    """Flow matching of one set of adapters."""
    torch.manual_seed(key(config.run.seed, "lora/adapters"))
    as_pretraining = Pretraining(
        init=config.init, model=config.model, run=config.run, optim=config.g, guard=config.guard, batch=config.batch,
        text=config.text, text_dropout=config.text_dropout, condition_noise=config.condition_noise,
        pure_noise=config.pure_noise,
    )  # fmt: skip
    return PretrainStage(as_pretraining, latents, AdaptedRestorer(base, config.lora))


def post_training(config: LoraTraining) -> PostTraining:
    return PostTraining(
        model=config.model, run=config.run, g=config.g, d=config.d or config.g, distilled=config.init,
        pretrained=config.disc.base or config.init, loss=config.loss, disc=config.disc, curriculum=config.curriculum,
        batch=config.batch, text=config.text, condition_noise=config.condition_noise,
    )  # fmt: skip


# Adapters as files.


def save_adapters(folder: Path, adapters: Adapters, config: LoraConfig, base: str) -> None:
    """Write adapters as peft does: adapter_model.safetensors and adapter_config.json.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    tensors = {f"{PEFT_PREFIX}{name}": tensor.detach().cpu().contiguous().clone()
               for name, tensor in adapters.state_dict().items()}  # fmt: skip
    about = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.strength * config.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(adapters.of_layer),
        "inference_mode": True,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{ADAPTER_FILE}.part"
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(folder / ADAPTER_FILE)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error


def load_adapters(folder: Path, base: Base) -> Adapters:
    """Read adapters that `save_adapters`, or peft, wrote for this base.

    Raises:
        CheckpointError: there are none, or they are for another model.
    """
    try:
        about = json.loads((folder / ADAPTER_CONFIG).read_text())
        tensors = load_file(folder / ADAPTER_FILE)
    except OSError as error:
        raise CheckpointError(f"{folder} holds no adapters; expected {ADAPTER_CONFIG} and {ADAPTER_FILE}.") from error
    adapters = Adapters(base, LoraConfig(rank=about["r"], alpha=about["lora_alpha"]))
    _fill(adapters, {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}, folder)
    return adapters


def _fill(adapters: Adapters, tensors: Mapping[str, Tensor], where: Path) -> None:
    try:
        adapters.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"The adapters in {where} are for another model: {str(error).splitlines()[-1].strip()}"
                              ) from error


def merged(run: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> Restorer:
    """The base of a run of this stage with the adapters among `tensors` merged into it.

    The base is merged in fp32, whatever type it had in training: it is rounded once.
    """
    saved = configs.load_saved(run) or {}
    base = Base(open_restorer(base_of(saved), torch.float32, device))
    config = LoraConfig(**{**saved["lora"], "base": "fp32"})
    adapters = Adapters(base, config)
    own = {name.removeprefix("adapters."): tensor for name, tensor in tensors.items() if name.startswith("adapters.")}
    _fill(adapters, own, run)
    if saved.get("text", {}).get("mode") == "none":
        # As `Texts.of_run` had it in training.
        nn.init.zeros_(base.restorer.prompt)
    return base.merge(adapters).to(dtype)


def workload(config: LoraTraining) -> doctor.Workload:
    """What the doctor estimates: frozen bases as helpers, in the type they have in training, and a pass with gradients
    of what is trained. A discriminator's base is taken to be of the generator's size."""
    bases: list[Base] = []

    def adapted(where: str) -> Base:
        with torch.device("meta"):
            base = Base(Restorer(config.model), config.lora.base)
        bases.append(base.to(torch.device("meta"), config.lora.offload_blocks))
        return base

    generator, critic = players(config, adapted, lambda where: doctor.on_meta(lambda: Restorer(config.model)))
    sample = doctor.DEFAULT_SAMPLE if config.model == NANO_DIT else CLIP
    x, u = torch.empty(config.batch, 16, *sample, device="meta"), torch.empty(config.batch, device="meta")
    with torch.device("meta"):
        trained = AdaptedRestorer(generator, config.lora) if isinstance(generator, Base) else generator
        judge = AdaptedDiscriminator(critic, config.lora)
    helpers = {"base" if base is generator else "disc base": base.restorer for base in bases}
    if config.objective == "flow":
        asked = doctor.Workload(
            trained={"g": (trained, config.g)},
            helpers=helpers,
            forward=lambda: trained.velocity(x, x, u).square().mean(),
            assists=lambda: None,
            samples=config.batch,
        )
    else:
        prompt = critic.restorer.prompt.detach()
        asked = adversarial_workload(post_training(config), trained, judge, x, prompt, helpers)
    return replace(asked, host=sum(base.streamed.host_bytes for base in bases))


def open_base(where: str, config: LoraConfig, device: torch.device) -> Base:
    """The frozen base of a run, checkpoint or published model; raises as `open_restorer` and `Base.to`."""
    return Base(open_restorer(where, DTYPES[config.base]), config.base).to(device, config.offload_blocks)


def main() -> None:
    command = parse_command("lora", RECIPES)
    config: LoraTraining = command.config
    if command.dry_run:
        print(doctor.estimate(config, workload(config)))
        return
    session = loop.open_session(command, config)
    adapted = partial(open_base, config=config.lora, device=session.processes.device)
    latents = Latents(command.data, config.run.seed)
    if config.objective == "apt":
        both = players(config, adapted, partial(load_run, config=config.model))
        stage = AdaptedAdversarialStage(loop.resolved(config, session), latents, *both)
        optims = {"d": config.d or config.g, "g": config.g}
    else:
        stage, optims = flow_matching(loop.resolved(config, session), latents, adapted(config.init)), {"g": config.g}
    trained = loop.run(stage, config, optims, command.out, session)
    if session.processes.first:
        if isinstance(trained, AdaptedRestorer):
            save_adapters(command.out / "adapter", trained.adapters, config.lora, config.init)
            log.info("The adapters are in %s.", command.out / "adapter")
        log.info("For one file with all weights: python -m training.export --run %s --out model.safetensors",
                 command.out)  # fmt: skip


if __name__ == "__main__":
    run_main(main)
