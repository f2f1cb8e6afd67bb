"""What a user may choose of a restoration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import SettingError
from .models.windows import WindowConfig
from .video.chunks import OVERLAP
from .video.geometry import LATENT_FRAMES, Target

# Frames in one pass of the transformer: the latents that two passes share, and one more.
SHORTEST_CHUNK = LATENT_FRAMES * OVERLAP + 1
# Condition noise of the multi-step SeedVR, in its published script; SeedVR2 has none.
MULTI_STEP_NOISE = 0.1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user may choose. The defaults are right for SeedVR2."""

    target: Target = Target.scale(2)
    color: str = "lab"  # one of COLOR_METHODS
    seed: int = 0
    steps: int = 1  # SeedVR2 was distilled to one
    cfg: float = 1.0  # guidance towards the positive prompt; 1 is none
    condition_noise: float | None = None  # 0..1, of the degraded latent; None: none for one step, else as published
    strength: float = 1.0  # 0..1; below 1 the enlarged source shows through
    windows: WindowConfig | None = None  # of the attention; None: as the model was trained
    attention: str = "auto"  # one of ATTENTION_NAMES
    chunk: int | None = None  # frames in one pass of the transformer; None chooses by free memory
    one_shot: bool = False  # cuts are not looked for
    memory_limit: int | None = None  # bytes on the device, weights included; None: what is free

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SettingError(f"steps is {self.steps}; at least 1 step is needed.")
        if not 1 <= self.cfg < math.inf:
            raise SettingError(f"cfg is {self.cfg:g}; guidance is a number from 1, which is none.")
        for name in ("strength", "condition_noise"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise SettingError(f"{name} is {share:g}; it is a share from 0 to 1.")
        if self.chunk is not None and self.chunk < SHORTEST_CHUNK:
            raise SettingError(f"A chunk of {self.chunk} frames is too short; use {SHORTEST_CHUNK} or more.")
        if self.memory_limit is not None and self.memory_limit <= 0:
            raise SettingError(f"The memory limit is {self.memory_limit} bytes; it has to be a number above zero.")

    @property
    def noise_level(self) -> float:
        """Share of noise in the degraded latent, 0..1."""
        if self.condition_noise is not None:
            return self.condition_noise
        return MULTI_STEP_NOISE if self.steps > 1 else 0.0


DEFAULTS = Settings()
