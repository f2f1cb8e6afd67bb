"""The meaning of the other backends: fp32, one sequence after another, obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import AttentionCall, Backend


def run(call: AttentionCall) -> Tensor:
    out = []
    lengths = list(call.sequences.lengths)
    # fp64 inputs stay fp64, so that a model can be checked against its own exact run.
    wide = torch.promote_types(call.q.dtype, torch.float32)
    packed = (x.to(wide).transpose(0, 1).split(lengths, dim=1) for x in (call.q, call.k, call.v))
    for q, k, v in zip(*packed, strict=True):
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        out.append(scores.softmax(dim=-1) @ v)
    return torch.cat(out, dim=1).transpose(0, 1).to(call.q.dtype)


BACKEND = Backend(
    name="reference", why_not=lambda call: None, run=run, differentiable=True, tolerance={"atol": 0, "rtol": 0}
)
