"""How often a transformer layer goes over its tokens, plainly and in our way. `python -m tests.bench.dit_passes`

One pass reads or writes every channel of every token once. Counted are the operands and results of all operations,
weights apart; what an operation does inside does not show. A layer is the difference between a model with two more
layers, one of each kind of window, and one without them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seedvr2_core.models.dit import DiT, DiTConfig
from seedvr2_core.models.linear import pack
from seedvr2_core.video.geometry import Grid
from tests.bench.dit import CPU_GRIDS, LAYERS, TEXT_TOKENS, make_inputs
from tests.bench.measure import DTYPES, build
from tests.core.models.plain_dit import PlainDiT

CPU = torch.device("cpu")
# The proportions of the 3B in a quarter of its width: passes do not depend on it, and seconds do.
NARROW = replace(LAYERS, dim=640, heads=5, mlp_hidden=1728, text_dim=64)
# The kinds of layers: text has weights of its own, or shares those of the video.
CONFIGS = {"separate": replace(NARROW, separate_layers=5), "shared": replace(NARROW, separate_layers=0)}
KINDS = ("linear", "attention", "rest")

LINEAR = {"mm", "addmm", "_linear_pointwise"}
# Operations that touch no memory although their schema does not say so.
FREE = {"_unsafe_view", "empty", "new_empty", "empty_like", "detach"}
# Operations that do not read what they write into.
OVERWRITING = {"copy_", "fill_", "zero_"}
# Operations that touch as many rows as they return, or are given, and not all of their first operand.
GATHERS, SCATTERS = {"index", "index_select", "embedding"}, {"index_put_", "_index_put_impl_"}


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write, by kind."""

    def __init__(self, model: DiT):
        super().__init__()
        self.weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        if not is_view and name not in FREE:
            kind = "linear" if name in LINEAR else "attention" if "dot_product" in name else "rest"
            self.bytes[kind] += self._moved(name, args, out)
        return out

    def _moved(self, name: str, args: tuple, out: object) -> int:
        if name in GATHERS:
            return 2 * self._size(out)
        if name in SCATTERS:
            return 2 * self._size(args[2])
        return self._size(args[1:] if name in OVERWRITING else args) + self._size(out)

    def _size(self, tree: object) -> int:
        return sum(self._bytes(x) for x in tree_leaves(tree) if isinstance(x, Tensor))

    def _bytes(self, x: Tensor) -> int:
        # An opaque tensor is a packed weight.
        if x.layout is not torch.strided or x.untyped_storage().data_ptr() in self.weights:
            return 0
        # An axis along which a tensor is repeated lies in memory once.
        sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
        return math.prod(sizes) * x.element_size()


def plain(config: DiTConfig, dtype: torch.dtype) -> DiT:
    return build(lambda: PlainDiT(config), dtype, CPU)


def ours(config: DiTConfig, dtype: torch.dtype) -> DiT:
    return build(lambda: DiT(config), dtype, CPU)


def ours_packed(config: DiTConfig, dtype: torch.dtype) -> DiT:
    return pack(ours(config, dtype))


MAKERS = (plain, ours, ours_packed)


def passes(make: Callable[..., DiT], config: DiTConfig, dtype: torch.dtype, grid: Grid) -> dict[str, float]:
    """Passes of one layer over video and text tokens, by kind of operation."""
    deep, shallow = (count(make(replace(config, depth=depth), dtype), dtype, grid) for depth in (5, 3))
    unit = (math.prod(grid) + TEXT_TOKENS) * config.dim * dtype.itemsize
    return {kind: (deep[kind] - shallow[kind]) / 2 / unit for kind in KINDS}


@torch.no_grad()
def count(model: DiT, dtype: torch.dtype, grid: Grid) -> Counter[str]:
    """Bytes moved by one call of a model, by kind of operation."""
    # All rows at once, as on a GPU: in turns the same bytes move, but not all of them as far as memory.
    call = model if isinstance(model, PlainDiT) else partial(model, rows=math.prod(grid))
    inputs = make_inputs(model.config, grid, dtype, CPU)
    with Traffic(model) as traffic:
        call(*inputs)
    return traffic.bytes


def main() -> None:
    rows = []
    print(f"{'layer':10}{'type':6}{'':13}" + "".join(f"{kind:>11}" for kind in (*KINDS, "all")))
    for layer, config in CONFIGS.items():
        for label, dtype in DTYPES.items():
            for make in MAKERS:
                kinds = passes(make, config, dtype, CPU_GRIDS[0])
                kinds["all"] = sum(kinds.values())
                rows.append({"layer": layer, "dtype": label, "contender": make.__name__, "passes": kinds})
                print(f"{layer:10}{label:6}{make.__name__:13}" + "".join(f"{x:11.1f}" for x in kinds.values()))
    print(json.dumps({"bench": "dit_passes", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
