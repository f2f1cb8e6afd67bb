"""torch's scaled_dot_product_attention over groups of sequences of equal length: no padding, any device and type."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .backend import AttentionCall, Backend


def run(call: AttentionCall) -> Tensor:
    groups = call.sequences.groups
    if len(groups) == 1:
        (length,) = groups
        return _attend(*(x.unflatten(0, (-1, length)) for x in (call.q, call.k, call.v))).flatten(0, 1)
    out = call.q.new_empty(call.q.shape)
    for index in groups.values():
        # Out of place, so that gradients flow.
        out = out.index_copy(
            0, index.flatten(), _attend(call.q[index], call.k[index], call.v[index]).flatten(0, 1)
        )
    return out


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
