"""The transformer as training sees it: with the prompt that goes with it, and its three inputs put together.

b clips   c channels   t h w latent frames, height, width   l text tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from seedvr2_core.diffusion.conditioning import with_mask
from seedvr2_core.models.dit import DiT, DiTConfig

from .parallel import Arranged

# Tokens of the learned prompt of a model that has no text encoder behind it.
PROMPT_TOKENS = 8


class Restorer(Arranged):
    """A transformer and its learned prompt; the null prompt is zeros."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.dit = DiT(config)
        self.prompt = nn.Parameter(torch.randn(PROMPT_TOKENS, config.text_dim))
        initialise(self.dit)

    @property
    def device(self) -> torch.device:
        return self.prompt.device

    def velocity(
        self,
        x: Tensor,
        condition: Tensor,
        u: Tensor,
        dropped: Tensor | None = None,
        texts: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Velocity b 16 t h w, in the type of x whatever the model computes in.

        Args:
            x: noisy latent b 16 t h w.
            condition: degraded latent b 16 t h w.
            u: b, time 0..1.
            dropped: b, which samples get the null prompt; None: none of them.
            texts: embedding l c of each sample that has another than the learned prompt; None: none of them.
        """
        prompts = embeddings(self.prompt, len(x), dropped, texts)
        latents = torch.cat([x, with_mask(condition)], dim=1).to(self.prompt.dtype)
        return torch.stack(self.dit(latents, prompts, u, blocks=self.layers.of(self.dit))).to(x.dtype)


def embeddings(
    prompt: Tensor, count: int, dropped: Tensor | None = None, texts: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """What each of `count` samples is told, l c, by a model with this prompt; see `Restorer.velocity`."""
    drops = [False] * count if dropped is None else dropped.tolist()
    told = zip(texts or [None] * count, drops, strict=True)
    # A text has no row of the prompt beside it, so that all processes have a gradient of that to share, be it zero.
    found = [prompt if drop or text is None else torch.cat([text.to(prompt), prompt[:0]]) for text, drop in told]
    return found if dropped is None else [text * (not drop) for text, drop in zip(found, drops, strict=True)]


SomeRestorer = TypeVar("SomeRestorer", bound=Arranged)


def for_training(restorer: SomeRestorer, prompt: bool = False) -> SomeRestorer:
    """A `Restorer`, or one with adapters, with all its parameters to be trained; `prompt`: that too, where nobody else
    knows it yet."""
    restorer.train().requires_grad_(True)
    restorer.prompt.requires_grad_(prompt)
    return restorer


@torch.no_grad()
def initialise(dit: DiT) -> None:
    """Weights N(0, 0.02); gates at zero, so that every layer begins as the identity; a last projection of zero."""
    for name, parameter in dit.named_parameters():
        if name.endswith("_gate") or name.startswith("vid_out.proj") or name.endswith(".bias"):
            parameter.zero_()
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
