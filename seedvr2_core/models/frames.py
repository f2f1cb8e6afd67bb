"""What the steps of the fast autoencoder pass to each other, and how they are told to compute.

    a frame is b c h w, in channels-last memory   t frames that follow each other
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..kernels import Choices
from .row_split import RowSplit
from .vae import CausalState

Frames = list[Tensor]

# Values of one tensor that libraries count in 32 bits.
COUNTED = 2**31 - 1


class Step(Protocol):
    """Part of the network."""

    def __call__(self, frames: Frames, state: CausalState) -> Frames:
        """The next frames of a clip in, what comes of them out. What later ones will need is left in the state.

        The list is the step's own: it may take frames out of it to let go of them.
        """


@dataclass(kw_only=True)
class FastOptions:
    """How the same numbers are computed. An autoencoder has its own, of which `block` and `band` may change between two
    slices, see `FastVAE.take`."""

    # Frames that pass a stage at once. More is faster on small frames, fewer takes less memory.
    block: int = 2
    # Channels from which two frames share products; None: never. Below, the additions cost more than they save.
    winograd_from: int | None = 128
    # Channels from which rows share products as well; None: never. In types of 16 bits, to whose rounding every sharing
    # adds, from twice as many.
    winograd_rows_from: int | None = 128
    # Positions of a frame that one convolution takes at once, in bands of whole rows; None: all. Bands bound what a
    # convolution needs besides its input and output, and change nothing else: norms and attention see whole frames.
    band: int | None = None
    # Multiplications that one convolution takes at once, about, in such bands as well: whoever watches is soon asked
    # again. None: all, for devices that compute while others go on.
    turn: int | None = None
    # Called after every step and every band; see `FastVAE.watched`.
    on_step: Callable[[], None] | None = None
    # Where this process has only some rows of every frame: how it meets the others.
    split: RowSplit | None = None
    # Who says where kernels of our own are faster than the library, on a GPU; None: the library everywhere.
    choices: Choices | None = None
    # The type of the device to compute on; None: the one where the weights lie.
    device: str | None = None

    def step(self) -> None:
        """Tell whoever watches."""
        if self.on_step:
            self.on_step()

    @property
    def choosing(self) -> Choices | None:
        """`choices`, where there is a choice: shared frames are left to the library."""
        return None if self.split else self.choices


class Taps(Protocol):
    """How the taps of a convolution meet frames; all are padded by one row and column."""

    def moving(self, frames: Frames) -> Frames:
        """The results at the last n of n + 2 frames; or, of an upsampler, the one result of all frames."""


class ThreeTaps(Taps, Protocol):
    def still(self, frame: Tensor) -> Tensor:
        """The result at a frame before which it was always the same."""


def fixed(weight: Tensor) -> nn.Parameter:
    """A weight that is not trained but moves with its module. Shared ones stay shared."""
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), requires_grad=False)


def stacked(frames: Frames) -> Tensor:
    """b c t h w, every frame in channels-last memory."""
    b, c, h, w = frames[0].shape
    out = frames[0].new_empty(b, len(frames), h, w, c).permute(0, 4, 1, 2, 3)
    return torch.stack(frames, dim=2, out=out)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
