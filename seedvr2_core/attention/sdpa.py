"""torch's scaled_dot_product_attention over runs of sequences of equal length: no padding, any device and type."""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .backend import AttentionCall, Backend


def run(call: AttentionCall) -> Tensor:
    # One call a run: who packs equal sequences side by side gets few calls, and no copies but that of their results.
    lengths = [(length, len(list(run))) for length, run in groupby(call.sequences.lengths)]
    runs = (x.split([length * count for length, count in lengths]) for x in (call.q, call.k, call.v))
    out = [
        _attend(*(x.unflatten(0, (count, length)) for x in qkv)).flatten(0, 1)
        for (length, count), *qkv in zip(lengths, *runs, strict=True)
    ]
    return torch.cat(out) if len(out) > 1 else out[0]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (rearrange(x, "s l heads d -> s heads l d") for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "s heads l d -> s l heads d")


BACKEND = Backend(
    name="sdpa",
    why_not=lambda call: None,
    run=run,
    differentiable=True,
    tolerance={"atol": 4e-3, "rtol": 4e-3},
)
