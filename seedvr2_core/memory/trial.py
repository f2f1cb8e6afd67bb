"""How much memory a computation takes, found by trying it on tensors without contents.

On torch's meta device only shapes are computed. Every operation still makes its results and they are dropped when they
would be, so adding up what is alive gives the peak on a real device, and in a fraction of a second. Models take part as
they are: their weights count for nothing and are not touched. Unseen is what an operation takes for itself and gives
back before it returns, which is added where a measurement found any.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
META = torch.device("meta")

CONVOLUTIONS = (aten.conv2d.default, aten.conv3d.default)
# What operations make that torch cannot try; and attention, which it would try step by step.
RESULTS = {
    "mkldnn::_linear_pointwise.binary": lambda x, factor, *_: torch.empty_like(factor),
    "aten::batch_norm_update_stats": lambda x, mean, variance, _: (torch.empty_like(mean), torch.empty_like(variance)),
    "aten::scaled_dot_product_attention": lambda q, k, v, *_: q.new_empty(*q.shape[:-1], v.shape[-1]),
}
# Operations remembered, each for the kinds of tensors that it took. A plan meets a few hundred.
REMEMBERED = 1 << 13
# On a CPU torch leaves 3-D convolutions in fp32 to oneDNN only above this product of the first four sizes of the input.
SMALL_CONVOLUTION = 20480


class Footprint(NamedTuple):
    """Bytes that a call takes besides what was there before."""

    peak: int
    kept: int  # by what it returns


def footprint(call: Callable[[], object], device: str) -> Footprint:
    """What a call takes, without computing anything.

    Args:
        call: makes its inputs itself, on any device, or they do not count. Must not look at values.
        device: the type of the device that it is meant for.
    """
    # What is compiled is tried as it was written: compiling takes minutes.
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"), Ledger(device) as ledger:
        result = call()
        kept = ledger.alive
    del result  # until here it was alive
    ledger.forget()
    return Footprint(ledger.peak, kept)


class Ledger(TorchDispatchMode):
    """Runs every operation on the meta device; counts the bytes of its results, each until nobody holds it any more."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled in a trial; guarding against it takes torch as long as the rest.
        return False

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref] = {}  # storages that are alive, those from before included
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}  # tensors from before, and themselves without contents

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Iterable[type], args: Sequence = (), kwargs: Mapping | None = None
    ) -> object:
        args = [self._emptied(value) for value in args]
        kwargs = {name: self._emptied(value) for name, value in kwargs.items()} if kwargs else {}
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        result = _result(operation, args, kwargs)
        for tensor in _tensors(result):
            self._note(tensor, True)
        if self.device == "cpu" and operation in CONVOLUTIONS:
            self.peak = max(self.peak, self.alive + _inside_convolution(result, *args[:2]))
        return result

    def _emptied(self, value: object) -> object:
        """The value, with meta tensors in place of others. Results may be views of them, so they become known."""
        if isinstance(value, Tensor):
            tensor = value if value.is_meta else self._twin(value)
            self._note(tensor, False)
            return tensor
        return [self._emptied(part) for part in value] if isinstance(value, (tuple, list)) else value

    def _twin(self, tensor: Tensor) -> Tensor:
        if (known := self._twins.get(id(tensor))) is None:
            strided = tensor.layout == torch.strided
            strides = tensor.stride() if strided else torch.empty(tensor.shape, device=META).stride()
            # As ordinary as the tensor: torch is particular about views of tensors made in inference mode.
            with torch.inference_mode(tensor.is_inference()):
                twin = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=META)
            # The tensor is held as well, or its identity might become another's.
            known = self._twins[id(tensor)] = tensor, twin
        return known[1]

    def forget(self) -> None:
        """Let go of all tensors, weights among them, which would wait for Python's next collection."""
        self._twins.clear()
        self._known.clear()

    def _note(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        if (identity := storage._cdata) in self._known:
            return
        size = storage.nbytes() if counts else 0
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def forget(_: object) -> None:
            del self._known[identity]
            self.alive -= size

        # Torch keeps a storage's Python object for as long as the storage.
        self._known[identity] = weakref.ref(storage, forget)


def _result(operation: Callable[..., Any], args: Sequence, kwargs: Mapping) -> object:
    """What comes of an operation on tensors without contents."""
    effect = _effect(operation)
    if effect == "writes":
        return args[0]
    if effect == "fills":
        return kwargs["out"]
    known = None
    if effect == "makes":
        known = _made(operation, _described(args), _described([*kwargs.items()]))
    if known is None:
        return operation(*args, **kwargs)
    made = [torch.empty_strided(kind.shape, kind.strides, dtype=kind.dtype, device=META) for kind in known]
    return made[0] if len(made) == 1 else tuple(made)


@lru_cache(REMEMBERED)
def _effect(operation: Callable[..., Any]) -> Literal["makes", "writes", "fills", "may view"]:
    """Whether an operation makes tensors, writes to its first one, to `out`, or may give a view of what it takes."""
    shared = [argument for argument in operation._schema.arguments if argument.alias_info is not None]
    if not shared:
        return "makes"
    if operation._schema.name.endswith("_") and isinstance(operation._schema.arguments[0].type, torch.TensorType):
        return "writes"
    return "fills" if [argument.name for argument in shared if argument.is_out] == ["out"] else "may view"


@lru_cache(REMEMBERED)
def _made(operation: Callable[..., Any], args: _Parts, kwargs: _Parts) -> tuple[_Kind, ...] | None:
    """Kinds of what an operation makes, worked out once, which takes torch longest; None if it gives anything else."""
    args, kwargs = _made_up(args), dict(_made_up(kwargs))
    result = RESULTS.get(operation.name(), operation)(*args, **kwargs)
    if operation in CONVOLUTIONS and not all(tensor.is_contiguous() for tensor in args[:2]):
        # Channels last goes in, comes out, and is lost on the meta device.
        result = torch.empty_like(result.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
    made = result if isinstance(result, tuple) else (result,)
    taken = {tensor.untyped_storage()._cdata for tensor in _tensors([args, list(kwargs.values())])}
    if all(isinstance(part, Tensor) and part.untyped_storage()._cdata not in taken for part in made):
        return _described(made)
    return None


def _tensors(values: object) -> Iterator[Tensor]:
    """Tensors among what an operation takes or gives; torch's own flattening would take longer than the trial."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


class _Kind(NamedTuple):
    """All there is to know of a tensor without contents."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Parts(tuple):
    """A list or tuple, described."""


def _described(value: object) -> Any:
    """A value that can be compared, with kinds in place of tensors."""
    if isinstance(value, Tensor):
        return _Kind(value.shape, value.stride(), value.dtype)
    if isinstance(value, (tuple, list)):
        return _Parts([_described(part) for part in value])
    # 1, 1.0 and True are not the same.
    return type(value), value


def _made_up(described: Any) -> Any:
    """A value like the one that was described."""
    if isinstance(described, _Kind):
        return torch.empty_strided(described.shape, described.strides, dtype=described.dtype, device=META)
    return [_made_up(part) for part in described] if isinstance(described, _Parts) else described[1]


def _inside_convolution(out: Tensor, x: Tensor, weight: Tensor) -> int:
    """What a convolution writes down on a CPU before it multiplies: its kernel in blocks or, where torch computes
    itself, all that the kernel sees from every position, and the input in another order."""
    if weight.dim() == 4 or x.dtype != torch.float32 or math.prod(x.shape[:4]) > SMALL_CONVOLUTION:
        return weight.nbytes
    return (out.numel() // out.shape[1] * weight[0].numel() + x.numel()) * x.itemsize
