"""AdamW with moments of 8 bits, for weights in fp32 or bf16. `pip install torchao`

Rounded to the nearest, a bf16 weight ignores a step of less than a 512th of it. Here it goes to one of its two
neighbours at random, to the nearer one more often, so that on average it goes where it should.

Source: moments in 8 bits, arXiv 2110.02861; both as torchao has them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchao.optim import AdamW8bit


class RoundingAdamW(AdamW8bit):
    """torchao's, for the loop. Draws from the global generators: whoever sets them before a step can repeat it."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(groups, lr, betas, weight_decay=weight_decay, bf16_stochastic_round=True)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        for group in self.param_groups:
            # A number would be compiled in.
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
        # On a CPU it takes longer to compile than to train what fits there.
        device = self.param_groups[0]["params"][0].device
        with torch.compiler.set_stance("force_eager" if device.type == "cpu" else "default"):
            return super().step(closure)
