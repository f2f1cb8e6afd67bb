"""Steps of the fast autoencoder for GPUs: every operation by a kernel of ours or by the library, whichever is faster.

What lies around a convolution is computed with it: bias and residual are added, and the statistics that the next norm
wants are taken, before its result is written. States are those of the steps that these stand in for.

    a frame is b c H W, in channels-last memory   groups of channels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from ..kernels import Choices, Moments, Question, causal_conv3d, frame_attention, group_norm, rounded
from ..kernels.causal_conv3d import Tile
from .frames import Frames, ThreeTaps, fixed, stacked
from .vae import CausalState, FrameNorm, attend_to_frame


class ChosenNormSilu(nn.Module):
    """Stands in for `NormSilu`."""

    def __init__(self, norm: FrameNorm, choices: Choices):
        super().__init__()
        self.norm, self.choices = norm, choices

    def forward(self, frames: Frames, state: CausalState) -> Frames:
        return [self.of_frame(frame) for frame in frames]

    def of_frame(self, frame: Tensor, moments: Moments | None = None) -> Tensor:
        """`moments` are those of the frame, where they are known."""
        norm, (b, c, h, w) = self.norm, frame.shape
        name = "norm_silu" if moments is None else "apply_norm_silu"
        question = Question(name, (c, norm.num_groups, rounded(b * h * w)), frame.dtype, frame.device)

        def by(statistics: Callable[..., Moments], apply: Callable[..., Tensor]) -> Callable[[], Tensor]:
            def call() -> Tensor:
                known = moments or statistics(frame, norm.num_groups)
                return apply(frame, known, norm.weight, norm.bias, norm.eps)

            return call

        library = by(group_norm.torch_statistics, group_norm.torch_apply_norm_silu)
        kernel = by(group_norm.group_statistics, group_norm.apply_norm_silu)
        return self.choices.run(question, library, {"kernel": kernel})


class Convolved(NamedTuple):
    frame: Tensor
    moments: Moments | None  # of the frame, where they were asked for


class ChosenConv(nn.Module):
    """Stands in for `TemporalConv`."""

    def __init__(self, weight: Tensor, bias: Tensor, taps: ThreeTaps, bare: ThreeTaps, choices: Choices):
        """
        Args:
            weight: c_out c_in 3 3 3, in memory format channels_last_3d.
            taps: the library's way.
            bare: the same without bias.
        """
        super().__init__()
        self.weight, self.bias = fixed(weight), fixed(bias)
        self.taps, self.bare, self.choices = taps, bare, choices

    def forward(self, frames: Frames, state: CausalState) -> Frames:
        return [frame for frame, _ in self.fused(frames, state)]

    def fused(
        self, frames: Frames, state: CausalState, residuals: Frames | None = None, groups: int | None = None
    ) -> list[Convolved]:
        """The next frames in; what comes of each + its residual, and its moments for a norm with `groups` groups."""
        to_add: list[Tensor | None] = [*residuals] if residuals else [None] * len(frames)
        out: list[Convolved] = []
        if self not in state:
            first, *frames = frames
            state[self] = [first, first]
            out += self._convolve([first], to_add[:1], groups)
            to_add = to_add[1:]
        if frames:
            frames = [*state[self], *frames]
            state[self] = frames[-2:]
            out += self._convolve([frame[...] for frame in frames], to_add, groups)
        return out

    def _convolve(self, frames: Frames, residuals: list[Tensor | None], groups: int | None) -> list[Convolved]:
        """The result at a lone first frame, or at the last n of n + 2 frames."""
        b, c_in, h, w = frames[0].shape
        c_out, taps = self.weight.shape[0], 1 if len(frames) == 1 else 3
        added = int(residuals[0] is not None)
        shape = (c_in, c_out, taps, len(residuals), rounded(b * h * w), added, groups or 0)
        question = Question("causal_conv3d", shape, frames[0].dtype, frames[0].device)
        machine = self.choices.machine(frames[0].device)
        tiles = causal_conv3d.tiles(machine.capability, c_in, c_out) if machine else []

        def flat(call: Callable[[], list[Convolved]]) -> Callable[[], list[Tensor]]:
            # What is compared are tensors: all frames, then all moments.
            return lambda: _flatten(call())

        kernels = {"epilogue": flat(partial(self._epilogue, frames, residuals, groups))} if added or groups else {}
        kernels |= {tile.name: flat(partial(self._own, frames, residuals, groups, tile)) for tile in tiles}
        library = flat(partial(self._library, frames, residuals, groups))
        return _unflatten(self.choices.run(question, library, kernels), len(residuals))

    def _library(self, frames: Frames, residuals: list[Tensor | None], groups: int | None) -> list[Convolved]:
        out = _by(self.taps, frames)
        summed = (x if y is None else x.add_(y) for x, y in zip(out, residuals, strict=True))
        return [Convolved(x, group_norm.torch_statistics(x, groups) if groups else None) for x in summed]

    def _epilogue(self, frames: Frames, residuals: list[Tensor | None], groups: int | None) -> list[Convolved]:
        """The library's convolution; then bias, residual and moments in one pass."""
        parts = (
            group_norm.add_residual(x, y, groups or 1, self.bias, out=x)
            for x, y in zip(_by(self.bare, frames), residuals, strict=True)
        )
        return [Convolved(x, moments if groups else None) for x, moments in parts]

    def _own(self, frames: Frames, residuals: list[Tensor | None], groups: int | None, tile: Tile) -> list[Convolved]:
        if len(frames) == 1:
            # The first frame meets itself under every tap.
            x, weight = frames[0].unsqueeze(2), self.weight.sum(2, keepdim=True)
        else:
            x, weight = stacked(frames), self.weight
        out = []
        # Frame by frame: residuals and results are tensors of their own, which a state can hold without the others.
        for index, residual in enumerate(residuals):
            part = x[:, :, index : index + weight.shape[2]]
            beside = None if residual is None else residual.unsqueeze(2)
            if groups is None:
                y, moments = causal_conv3d.causal_conv3d(part, weight, tile, self.bias, beside), None
            else:
                y, moments = causal_conv3d.causal_conv3d_with_statistics(part, weight, tile, groups, self.bias, beside)
            out.append(Convolved(y.squeeze(2), moments))
        return out


class ChosenResnet(nn.Module):
    """Stands in for `Resnet`."""

    def __init__(
        self,
        first: tuple[ChosenNormSilu, ChosenConv],
        second: tuple[ChosenNormSilu, ChosenConv],
        skip: Callable[[Tensor], Tensor],
    ):
        super().__init__()
        (self.norm1, self.conv1), (self.norm2, self.conv2), self.skip = first, second, skip

    def forward(self, frames: Frames, state: CausalState) -> Frames:
        inner = self.conv1.fused(self.norm1(frames, state), state, groups=self.norm2.norm.num_groups)
        normed = [self.norm2.of_frame(frame, moments) for frame, moments in inner]
        del inner
        skips = [self.skip(frame) for frame in frames]
        return [frame for frame, _ in self.conv2.fused(normed, state, skips)]


def attend(choices: Choices, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend_to_frame`, n positions c."""
    n, positions, c = q.shape
    question = Question("frame_attention", (c, n, rounded(positions)), q.dtype, q.device)
    machine = choices.machine(q.device)
    tiles = frame_attention.tiles(machine.capability, c) if machine else ()
    kernels = {tile.name: partial(frame_attention.attend, q, k, v, tile) for tile in tiles}
    return choices.run(question, partial(attend_to_frame, q, k, v), kernels)


def _by(taps: ThreeTaps, frames: Frames) -> Frames:
    return [taps.still(frames[0])] if len(frames) == 1 else taps.moving(frames)


def _flatten(results: list[Convolved]) -> list[Tensor]:
    return [result.frame for result in results] + [x for result in results for x in result.moments or ()]


def _unflatten(tensors: Sequence[Tensor], frames: int) -> list[Convolved]:
    rest = tensors[frames:]
    moments = [Moments(*pair) for pair in zip(rest[::2], rest[1::2], strict=True)] or [None] * frames
    return [Convolved(*pair) for pair in zip(tensors, moments, strict=False)]
