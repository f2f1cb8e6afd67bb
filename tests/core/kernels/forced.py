"""A `Choices` that has made up its mind, so that a whole model runs on kernels, in the interpreter too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from seedvr2_core.kernels import LIBRARY, Choices, Machine, Question
from seedvr2_core.kernels.choice import Call


class Forced(Choices):
    """Takes the first kernel whose name begins as wanted, or else the first there is; counts what it was asked."""

    def __init__(self, wanted: str = "", capability: tuple[int, int] = (9, 0)):
        super().__init__()
        self.wanted, self.capability = wanted, capability
        self.used: Counter[tuple[str, str]] = Counter()

    def machine(self, device: torch.device) -> Machine:
        return Machine("a GPU", self.capability)

    def fastest(self, question: Question, library: Call, kernels: Mapping[str, Call]) -> str:
        names = sorted(kernels, key=lambda name: not name.startswith(self.wanted))
        name = self._winners.get(question, names[0] if names else LIBRARY)
        self.used[question.operation, name] += 1
        return name
