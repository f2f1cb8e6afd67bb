"""Linear layers whose weight may be packed: put, once and after loading, into the form that multiplies fastest here.

A packing is for inference. It takes the place of the plain weight, which is released, so a packed model stays on its
device and cannot be saved; as long as nothing is packed, a `Linear` is torch's own.

    n rows   i o channels in and out
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingError

log = logging.getLogger(__name__)

# gelu in its tanh approximation.
Activation = Literal["none", "silu", "gelu"]
Module = TypeVar("Module", bound=nn.Module)

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
# The oldest GPU that multiplies in fp8, and what its kernels want channels to be a multiple of.
FP8_GPU, FP8_STEP = (8, 9), 16


class PackedWeight(Protocol):
    """A weight o i in a form of its own. It does not change, is on one device and passes no gradients."""

    def linear(self, x: Tensor, bias: Tensor | None, activation: Activation, factor: Tensor | None) -> Tensor:
        """activation(x W^T + bias) * factor: n o, of x n i and a factor n o."""
        ...


@dataclass(frozen=True, kw_only=True)
class Packing:
    """One way to pack weights.

    `why_not` says in words why a weight cannot be packed, or None. `exact`: products differ by the order of their sums
    alone. `error` bounds the relative L2 of a product of Gaussian values against the plain one in fp32.
    """

    name: str
    why_not: Callable[[Tensor], str | None]
    pack: Callable[[Tensor], PackedWeight]
    exact: bool
    error: float


class Linear(nn.Linear):
    """torch's linear layer, which may be packed, and in which what follows a product may be fused with it."""

    packed: PackedWeight | None = None

    def forward(self, x: Tensor, activation: Activation = "none", factor: Tensor | None = None) -> Tensor:
        """activation(x W^T + bias) * factor: n o, of x n i and a factor n o.

        Raises:
            RuntimeError: the weight is packed and x wants a gradient.
        """
        if self.packed is None:
            return finish(F.linear(x, self.weight, self.bias), activation, factor)
        if x.requires_grad:
            raise RuntimeError("A packed linear layer passes no gradient; train the model before it is packed.")
        return self.packed.linear(x, self.bias, activation, factor)

    def pack(self, packing: Packing) -> None:
        self.packed = packing.pack(self.weight.detach())
        self.weight = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        if self.packed is not None:
            raise RuntimeError("A packed linear layer stays as and where it is; convert or move it before packing.")
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.packed is not None:
            raise RuntimeError("A packed linear layer has no weight to save; save the model before packing.")
        super()._save_to_state_dict(destination, prefix, keep_vars)


def finish(y: Tensor, activation: Activation, factor: Tensor | None) -> Tensor:
    """activation(y) * factor, in the memory of y, a product that nobody else holds, where that needs no gradient."""
    if activation == "silu":
        y = F.silu(y, inplace=not y.requires_grad)
    elif activation == "gelu":
        y = F.gelu(y, approximate="tanh") if y.requires_grad else torch.ops.aten.gelu_(y, approximate="tanh")
    if factor is None:
        return y
    return y * factor if y.requires_grad else y.mul_(factor)


def pack(module: Module, name: str = "auto") -> Module:
    """Pack every `Linear` inside a module, one after another, and give the module back, from now on for inference.

    Args:
        module: on the device and in the type that it will run in.
        name: one of PACKING_NAMES. "auto" is the first exact packing that can run here; without one the module stays as
            it is.

    Raises:
        SettingError: the packing asked for by name is unknown or cannot run here.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Linear) and layer.packed is None]
    if packing := _choose([layer.weight for layer in layers], name):
        for layer in layers:
            layer.pack(packing)
        log.debug("packed %d linear layers: %s", len(layers), packing.name)
    return module


def is_rounded(module: nn.Module) -> bool:
    """Whether a packing that is not exact is somewhere inside."""
    return any(isinstance(layer.packed, Fp8Weight) for layer in module.modules() if isinstance(layer, Linear))


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the packing that layers of this type will get there, or "none", so that it can be refused, and told,
    before anything is loaded.

    Raises:
        SettingError: as `pack`.
    """
    packing = _choose([torch.empty(FP8_STEP, FP8_STEP, device=device, dtype=dtype)], name)
    return packing.name if packing else "none"


def _choose(weights: list[Tensor], name: str) -> Packing | None:
    if name == "auto":
        able = (packing for packing in PACKINGS if packing.exact and not _why_not(packing, weights))
        return next(able, None)
    for packing in PACKINGS:
        if packing.name == name:
            if reason := _why_not(packing, weights):
                raise SettingError(f"Packing {name!r} cannot run here: it {reason}. Use 'auto' or another packing.")
            return packing
    raise SettingError(f"There is no packing {name!r}; choose one of {', '.join(PACKING_NAMES)}.")


def _why_not(packing: Packing, weights: list[Tensor]) -> str | None:
    return next((reason for weight in weights if (reason := packing.why_not(weight))), None)


# oneDNN on a CPU: the weight in the blocks that its product reads, laid out once instead of in every product.


@dataclass(frozen=True)
class OneDnnWeight:
    weight: Tensor  # o i, in oneDNN's own layout

    def linear(self, x: Tensor, bias: Tensor | None, activation: Activation, factor: Tensor | None) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise
        if factor is not None and activation == "none":
            return product.binary(x, factor, self.weight, bias, "mul")
        attribute = {"none": "none", "silu": "swish", "gelu": "gelu"}[activation]
        y = product(x, self.weight, bias, attribute, [], "tanh" if activation == "gelu" else "")
        return y if factor is None else y.mul_(factor)


def why_not_onednn(weight: Tensor) -> str | None:
    if weight.device.type != "cpu":
        return f"needs a CPU, got {weight.device.type}"
    # They are private to torch: a version without them is possible.
    wanted = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in wanted):
        return "needs a torch built with oneDNN"
    if weight.dtype == torch.bfloat16:
        return None if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "needs a CPU that multiplies in bf16"
    if weight.dtype != torch.float32:
        return f"needs fp32 or bf16, got {str(weight.dtype).removeprefix('torch.')}"
    return None


def pack_onednn(weight: Tensor) -> OneDnnWeight:
    return OneDnnWeight(torch.ops.mkldnn._reorder_linear_weight(weight))


# fp8: 4 bits of exponent and 3 of mantissa, with a scale for every row of the weight and of what it is multiplied with.


@dataclass(frozen=True)
class Fp8Weight:
    """On a CPU, where no product in fp8 exists, only the rounding is the same: that measures what it costs."""

    weight: Tensor  # o i, e4m3
    scale: Tensor  # o 1, fp32

    def linear(self, x: Tensor, bias: Tensor | None, activation: Activation, factor: Tensor | None) -> Tensor:
        rows, scale = to_fp8(x)
        # The weight tells where this computes: in a trial of what memory it takes, x has no contents and is nowhere.
        if self.weight.device.type != "cpu":
            y = torch._scaled_mm(rows, self.weight.t(), scale, self.scale.t(), bias, out_dtype=x.dtype)
        else:
            y = F.linear(from_fp8(rows, scale, x.dtype), from_fp8(self.weight, self.scale, x.dtype), bias)
        return finish(y, activation, factor)


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows n c -> the same in e4m3, and the fp32 scales n 1 to multiply them with."""
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dim=-1, keepdim=True)
    # In the type of x, so that dividing by it takes one pass; a row of zeros needs some scale too.
    scale = (largest / E4M3_MAX).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / scale).to(E4M3), scale.float()


def from_fp8(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype) * scale.to(dtype)


@cache
def fp8_failure(device: torch.device) -> str | None:
    """What torch says to such a product on a GPU, or None: some builds and some GPUs do not have it."""
    rows, scale = to_fp8(torch.ones(FP8_STEP, FP8_STEP, device=device, dtype=torch.bfloat16))
    try:
        torch._scaled_mm(rows, rows.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError) as error:
        return str(error).strip().partition("\n")[0].rstrip(".")
    return None


def why_not_fp8(weight: Tensor) -> str | None:
    if weight.device.type == "cpu":
        return None
    if weight.device.type != "cuda":
        return f"needs a CUDA device, got {weight.device.type}"
    if (capability := torch.cuda.get_device_capability(weight.device)) < FP8_GPU:
        return "needs compute capability {}.{} or later, got {}.{}".format(*FP8_GPU, *capability)
    if weight.dtype != torch.bfloat16:
        return f"needs bf16, got {str(weight.dtype).removeprefix('torch.')}"
    if any(size % FP8_STEP for size in weight.shape):
        return f"needs channels in multiples of {FP8_STEP}, got {weight.shape[1]} in and {weight.shape[0]} out"
    if failure := fp8_failure(weight.device):
        return f"needs a torch that multiplies in fp8 on this GPU, which says: {failure}"
    return None


def pack_fp8(weight: Tensor) -> Fp8Weight:
    return Fp8Weight(*to_fp8(weight))


ONEDNN = Packing(name="onednn", why_not=why_not_onednn, pack=pack_onednn, exact=True, error=1e-2)
# Two operands whose every value is off by up to 1/16, 2.6 % in the mean square.
FP8 = Packing(name="fp8", why_not=why_not_fp8, pack=pack_fp8, exact=False, error=4.5e-2)
# Fastest exact ones first; "auto" takes the first exact one that can run.
PACKINGS = (ONEDNN, FP8)
PACKING_NAMES = ("auto", *(packing.name for packing in PACKINGS))
