"""Averaged weights: what is shown, evaluated and exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: of a sharded one its shard, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA:
    """Exponential moving average of a module's trained parameters, in fp32 or better and sharded as they are.

    The decay warms up as min(decay, (1 + n) / (10 + n)), so that early averages forget the initialisation.

    Args:
        module: as it will be trained, already sharded. What is frozen in it is not averaged.
        decay: of one update.
        every: of how many updates of the module one reaches the average, with the decay of all of them.
        device: "cpu" keeps the averages off the GPU.
    """

    def __init__(self, module: nn.Module, decay: float, every: int = 1, device: Literal["same", "cpu"] = "same"):
        self.decay, self.every, self.updates = decay, every, 0
        where = {"device": "cpu"} if device == "cpu" else {}
        self.averages = {
            name: p.detach().to(dtype=torch.promote_types(p.dtype, torch.float32), copy=True, **where)
            for name, p in module.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Count one update of the module, and take it in if it is its turn."""
        self.updates += 1
        if self.updates % self.every:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) ** self.every
        # One by one, for a copy of all in fp32 may be more than there is room for.
        for value, own in zip(map(local, self.averages.values()), self._own(module), strict=True):
            # Waited for: the averages may be on the CPU, which would read what has not arrived.
            value.lerp_(own.to(value), 1 - decay)

    @contextmanager
    def shown_by(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module with the averaged weights, until the context ends and its own come back."""
        own = [value.clone() for value in self._own(module)]
        try:
            self.copy_to(module)
            yield module
        finally:
            torch._foreach_copy_(self._own(module), own)

    def copy_to(self, module: nn.Module) -> None:
        """The module's weights become the averaged ones, for good."""
        for own, value in zip(self._own(module), self.averages.values(), strict=True):
            own.copy_(local(value))

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """The averages under the names of the module's state, and what is not averaged as it is."""
        return {name: self.averages.get(name, value) for name, value in module.state_dict().items()}

    def distance(self, module: nn.Module) -> Tensor:
        """Sum of squared differences to the module's weights, over what this process holds: one number."""
        pairs = zip(self.averages.values(), self._own(module), strict=True)
        return sum((local(value) - own.to(value.device)).square().sum() for value, own in pairs)

    def _own(self, module: nn.Module) -> list[Tensor]:
        """The module's weights that are averaged, in the order of the averages; without gradients."""
        parameters = dict(module.named_parameters())
        return [local(parameters[name].detach()) for name in self.averages]
