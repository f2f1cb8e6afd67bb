"""How much of a restoration is done, over all its stages."""

from __future__ import annotations

from collections.abc import Sequence

# Roughly how the time is shared, so that a bar moves evenly.
SHARES = {"encode": 0.25, "restore": 0.15, "decode": 0.6}


class Overall:
    """Adds up what stages report through `OnProgress`."""

    def __init__(self, stages: Sequence[str] = tuple(SHARES)):
        self.done = dict.fromkeys(stages, 0.0)

    def __call__(self, stage: str, done: float, total: int | None) -> float | None:
        """Share of all work that is done, 0..1; None where nobody knows the number of frames."""
        self.done[stage] = done
        if not total:
            return None
        shares = {name: SHARES[name] * min(1.0, value / total) for name, value in self.done.items()}
        return sum(shares.values()) / sum(SHARES[name] for name in self.done)
