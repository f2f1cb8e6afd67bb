"""Which text a sample of a training batch gets: its caption, the model's prompt, the null prompt, or the negative one.

A text is an embedding, made beforehand; there is no text encoder here. The null prompt is zeros, as long as the model's
own. A sample of the negative prompt has its degraded latent for a target: the model learns what bad pictures are called
and guidance leads away from them. A null prompt teaches that only where texts differ between samples.

Source: SeedVR, arXiv 2501.01320, replaces texts by null prompts at random; the rates and the negative prompt's targets
are ours.
"""
# b samples   c channels   t h w latent frames, height, width   l text tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seedvr2_core.errors import CheckpointError, SettingError

from .config import setting
from .randomness import torch_rng
from .restorer import Restorer, embeddings
from .shards import Latents
from .weights import open_negative


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What the texts of a run are."""

    mode: Literal["fixed", "caption", "none"] = setting(
        "fixed", "the model's prompt for all; the text of each sample in the latents; or the null prompt for all"
    )
    # Without captions guidance has nothing else to lead away from.
    negative_fraction: float = setting(
        0.0, "share of samples with the negative prompt, and the degraded latent for a target", least=0, most=0.5
    )
    negative: str | None = setting(None, "run, checkpoint or published name that the negative prompt is taken from")


@dataclass(frozen=True)
class Chosen:
    """The texts of a micro-batch."""

    dropped: Tensor | None  # b, which get the null prompt; None: none of them
    negative: Tensor  # b, which get the negative prompt
    own: list[Tensor | None] | None = None  # embedding l c where a sample's is not the model's prompt; None: nowhere

    @classmethod
    def prompts(cls, count: int) -> Chosen:
        """The model's prompt for all of `count` samples."""
        return cls(None, torch.zeros(count, dtype=torch.bool))

    def velocity(self, restorer: Restorer, x: Tensor, condition: Tensor, u: Tensor) -> Tensor:
        """Velocity b c t h w of a restorer that is told these texts; see `Restorer.velocity`."""
        return restorer.velocity(x, condition, u, self.dropped, self.own)

    def embeddings(self, prompt: Tensor) -> list[Tensor]:
        """What the samples are told, l c each, where this is the prompt."""
        return embeddings(prompt, len(self.negative), self.dropped, self.own)

    def target(self, hq: Tensor, lq: Tensor) -> Tensor:
        """The latents b c t h w to restore to: clean ones, but degraded ones for the negative prompt."""
        return torch.where(self.negative.view(-1, 1, 1, 1, 1), lq, hq)


class Texts:
    """The texts of a run; those of a micro-batch depend on (seed, step, micro) and the samples in it alone."""

    def __init__(
        self,
        config: TextConfig,
        width: int,
        seed: int,
        dropout: float | None = None,
        negative: Tensor | None = None,
    ):
        """
        Args:
            config: of the run.
            width: channels of a text that the model takes.
            seed: of the run.
            dropout: share of samples with the null prompt; None: there are no such draws.
            negative: the negative prompt l c.

        Raises:
            SettingError: there is no negative prompt for a share of samples, or two settings contradict each other.
            CheckpointError: the negative prompt is of another width than the model's.
        """
        if config.negative_fraction and config.mode == "none":
            raise SettingError("text.mode is none, and text.negative_fraction gives samples a text; set it to 0, or "
                               "the mode to fixed or caption.")
        if config.negative_fraction and negative is None:
            raise SettingError(f"text.negative_fraction is {config.negative_fraction:g} and there is no negative "
                               "prompt; name a checkpoint that has one, such as text.negative=3b, or set it to 0.")
        if negative is not None and negative.shape[1] != width:
            raise CheckpointError(f"The negative prompt of {config.negative} is {negative.shape[1]} wide, expected "
                                  f"{width}; it belongs to another model.")
        self.config, self.seed, self.dropout, self.negative = config, seed, dropout, negative

    @classmethod
    def of_run(
        cls, config: TextConfig, restorer: Restorer, latents: Latents, seed: int, dropout: float | None = None
    ) -> Texts:
        """The texts of a run on these latents; arguments and failures else as above, and:

        Without any text the restorer's own prompt becomes the null prompt, which it then is wherever it is used.

        Raises:
            CheckpointError: there are no captions in the latents, or of another width than the model's; or no negative
                prompt where one is to be.
        """
        width = restorer.prompt.shape[1]
        if config.mode == "caption":
            check_captions(latents, width)
        if config.mode == "none":
            with torch.no_grad():
                restorer.prompt.zero_()
        negative = None if config.negative is None else find_negative(config.negative)
        return cls(config, width, seed, dropout, negative)

    def choose(self, step: int, micro: int, count: int, captions: Sequence[Tensor | None] | None = None) -> Chosen:
        """The texts of a micro-batch of `count` samples; a sample without a caption gets the model's prompt."""
        negative = self._share("text_negative", self.config.negative_fraction, step, micro, count)
        dropped = None
        if self.config.mode == "none":
            dropped = torch.ones(count, dtype=torch.bool)
        elif self.dropout is not None:
            dropped = self._share("text_drop", self.dropout, step, micro, count) & ~negative
        own = list(captions) if self.config.mode == "caption" and captions is not None else [None] * count
        own = [self.negative if bad else text for text, bad in zip(own, negative.tolist(), strict=True)]
        varied = any(text is not None for text in own)
        return Chosen(dropped, negative, own if varied else None)

    def _share(self, purpose: str, share: float, step: int, micro: int, count: int) -> Tensor:
        return torch.rand(count, generator=torch_rng(self.seed, purpose, step, micro)) < share

    def opposed(self, count: int) -> Chosen:
        """What guidance leads away from: the negative prompt, or the null prompt where there is none."""
        every = torch.ones(count, dtype=torch.bool)
        if self.negative is None:
            return Chosen(every, ~every)
        return Chosen(None, every, [self.negative] * count)


def find_negative(where: str) -> Tensor:
    """The negative prompt l c that `text.negative` names.

    Raises:
        CheckpointError: there is none.
    """
    without = "Or train without it: text.negative=none text.negative_fraction=0"
    try:
        found = open_negative(where)
    except CheckpointError as error:
        raise CheckpointError(f"text.negative={where}: {error} {without}") from error
    if found is None:
        raise CheckpointError(f"{where} holds no negative prompt; name another text.negative. {without}")
    return found


def refuse_bad_targets(config: TextConfig) -> None:
    """For stages after flow matching, which make good samples alone.

    Raises:
        SettingError: a share of samples is to have the negative prompt.
    """
    if config.negative_fraction:
        raise SettingError("text.negative_fraction is for flow matching, in training.pretrain or training.lora; what "
                           "comes after it makes good samples alone, so set it to 0 here.")


def check_captions(latents: Latents, width: int) -> None:
    """Refuse latents without captions, or with captions that the model cannot take.

    Raises:
        CheckpointError: naming what was found.
    """
    if latents.text_width is None:
        raise CheckpointError("text.mode is caption, and the latents hold no text. Put NAME.txt.safetensors beside "
                              "NAME.* and precompute again, or choose text.mode=fixed.")
    if latents.text_width != width:
        raise CheckpointError(f"The captions in the latents are {latents.text_width} wide and the model takes {width}; "
                              "precompute them with the text encoder of this model.")
