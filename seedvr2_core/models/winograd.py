"""Convolutions whose results share products: two frames, and two or four rows, at a time.

Two results of three taps take four products instead of six, and four take six instead of twelve, at the price of some
additions. A 3 x 3 x 3 kernel takes 2.25 times fewer products over pairs of frames and rows, and 3 times fewer over
pairs of frames and four rows. Exact in real numbers. In fp32 pairs are as accurate as the plain sum, and four rows
round twice as much; in bf16 a layer rounds 2.2 times as much over pairs of frames or rows, 3.2 times over both, and 6
times over four rows, which are therefore left to fp32.

Additions are cheap in the cache only, so frames are computed in bands of rows.

Source: Winograd's F(2, 3) and F(4, 3), in one dimension; Lavin and Gray, arXiv 1509.09308.

    b clips   c channels   h w height, width   k the kernel's height and width, 2 or 3
    a frame is b c h w, in channels-last memory; a band is some rows of one, with those around that the kernel reaches
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frames import fixed

# Positions of a frame in one band. Measured at 128 to 512 channels: half as many lose 3 %, twice as many up to 10 %.
BAND = 8192


class Rows(Protocol):
    """A 2-D convolution of a band: b c n+k-1 w -> b c_out n w+3-k. Columns are padded, rows are not."""

    def __call__(self, band: Tensor, bias: Tensor | None = None) -> Tensor: ...


def share(early: Tensor, middle: Tensor, late: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three taps as the four factors of two results.

    At c and d, the last two of inputs a b c d, the results are

        outer (a - c) + total (b + c) + difference (c - b)
        inner (b - d) + total (b + c) - difference (c - b)
    """
    return early, (early + middle + late) / 2, (early - middle + late) / 2, -late


class SingleRows(nn.Module):
    """Every row on its own."""

    def __init__(self, kernel: Tensor, dtype: torch.dtype):
        """The kernel c_out c k k may be more precise than `dtype`, to which it is rounded last of all."""
        super().__init__()
        self.kernel = fixed(kernel.to(dtype).contiguous(memory_format=torch.channels_last))

    def forward(self, band: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(band, self.kernel, bias, padding=(0, 1))


class PairedRows(nn.Module):
    """Two rows at a time of a kernel with three."""

    def __init__(self, kernel: Tensor, dtype: torch.dtype):
        super().__init__()
        shared = (SingleRows(taps, dtype) for taps in share(*kernel.split(1, dim=2)))
        self.outer, self.total, self.difference, self.inner = shared

    def forward(self, band: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = band.shape[2] - 2
        if rows % 2:
            band = F.pad(band, (0, 0, 0, 1))
        a, b, c, d = band[:, :, :-2:2], band[:, :, 1:-1:2], band[:, :, 2::2], band[:, :, 3::2]
        first, second = self.total(b + c), self.difference(c - b)
        n, c_out, pairs, width = first.shape
        out = first.new_empty(n, 2 * pairs, width, c_out).permute(0, 3, 1, 2)
        torch.add(self.outer(a - c, bias).add_(first), second, out=out[:, :, ::2])
        torch.sub(self.inner(b - d, bias).add_(first), second, out=out[:, :, 1::2])
        return out[:, :, :rows]


class FourRows(nn.Module):
    """Four rows at a time of a kernel with three."""

    def __init__(self, kernel: Tensor, dtype: torch.dtype):
        super().__init__()
        early, middle, late = kernel.split(1, dim=2)
        even, odd = early + late, middle
        far_even, far_odd = early / 24 + late / 6, middle / 12
        # Values of the kernel as a polynomial at 0, 1, -1, 2, -2 and infinity.
        factors = (early / 4, -(even + odd) / 6, -(even - odd) / 6, far_even + far_odd, far_even - far_odd, late)
        self.factors = nn.ModuleList(SingleRows(factor, dtype) for factor in factors)

    def forward(self, band: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = band.shape[2] - 2
        band = F.pad(band, (0, 0, 0, -rows % 4))
        fours = (band.shape[2] - 2) // 4
        a, b, c, d, e, f = (band[:, :, row : row + 4 * fours - 3 : 4] for row in range(6))
        at_0, at_1, at_minus_1, at_2, at_minus_2, at_infinity = self.factors
        first = at_0((e - c).add_(a - c, alpha=4), bias)
        odd, even = torch.sub(d, b, alpha=4), torch.sub(e, c, alpha=4)
        plus, minus = at_1(even + odd), at_minus_1(even.sub_(odd))
        odd, even = d - b, e - c
        plus_2, minus_2 = at_2(torch.add(even, odd, alpha=2)), at_minus_2(even.sub_(odd, alpha=2))
        last = at_infinity((f - d).add_(b - d, alpha=4), bias)
        sums, differences = plus + minus, plus.sub_(minus)
        sums_2, differences_2 = plus_2 + minus_2, plus_2.sub_(minus_2)
        n, c_out, _, width = first.shape
        out = first.new_empty(n, 4 * fours, width, c_out).permute(0, 3, 1, 2)
        torch.add(first.add_(sums), sums_2, out=out[:, :, ::4])
        torch.add(differences, differences_2, alpha=2, out=out[:, :, 1::4])
        torch.add(sums, sums_2, alpha=4, out=out[:, :, 2::4])
        torch.add(last.add_(differences), differences_2, alpha=8, out=out[:, :, 3::4])
        if bias is not None:
            # The first and the last of four have it from their convolutions.
            for row in (1, 2):
                out[:, :, row::4] += bias[:, None, None]
        return out[:, :, :rows]


class WinogradTaps(nn.Module):
    """A causal convolution with three taps in time, two frames at a time."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, shared_rows: bool, on_band: Callable[[], None] = lambda: None
    ):
        """
        Args:
            weight: c_out c 3 k k.
            shared_rows: whether rows share products as well, four in fp32 and two in smaller types; k has to be 3.
            on_band: called after every band; may raise to cancel.
        """
        super().__init__()
        # Sums of rounded weights are formed in fp32 and rounded once.
        precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
        rows = SingleRows if not shared_rows else PairedRows if weight.dtype.itemsize == 2 else FourRows
        shared = (rows(taps, weight.dtype) for taps in share(*precise.unbind(2)))
        self.outer, self.total, self.difference, self.inner = shared
        self.bias = None if bias is None else fixed(bias)
        self.c_out, self.k, self.on_band = weight.shape[0], weight.shape[-1], on_band

    def still(self, frame: Tensor) -> Tensor:
        """The result at a frame before which it was always the same."""
        if isinstance(self.total, SingleRows):
            return F.conv2d(frame, self.total.kernel + self.total.kernel, self.bias, padding=1)
        return self.in_bands(self.at_rest, [frame], 1)[0]

    def moving(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """The results at the last n of n + 2 frames."""
        out = []
        for start in range(0, len(frames) - 2, 2):
            together = frames[start : start + 4]
            out += self.in_bands(self.pair, together, len(together) - 2)
        return out

    def at_rest(self, bands: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        (band,) = bands
        result = self.total(band)
        if self.bias is None:
            torch.add(result, result, out=out[0])
        else:
            torch.add(self.bias[:, None, None], result, alpha=2, out=out[0])

    def pair(self, bands: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """The results at the two last of four bands, or at the last of three."""
        a, b, c, *d = bands
        first, second = self.total(b + c), self.difference(c - b)
        torch.add(self.outer(a - c, self.bias).add_(first), second, out=out[0])
        if d:
            torch.sub(self.inner(b - d[0], self.bias).add_(first), second, out=out[1])

    def in_bands(
        self, compute: Callable[[Sequence[Tensor], Sequence[Tensor]], None], frames: Sequence[Tensor], results: int
    ) -> list[Tensor]:
        """So many results of frames whose sides are padded by one, computed a band at a time.

        Args:
            compute: gets a band of every frame, and the rows of every result that it has to fill.
        """
        b, _, h, w = frames[0].shape
        height, width = h + 3 - self.k, w + 3 - self.k
        out = [frames[0].new_empty(b, height, width, self.c_out).permute(0, 3, 1, 2) for _ in range(results)]
        step = max(4, BAND // width // 4 * 4)
        for start in range(0, height, step):
            stop = min(start + step, height)
            first, last = start - 1, stop + self.k - 2
            bands = [frame[:, :, max(first, 0) : last] for frame in frames]
            if first < 0 or last > h:
                bands = [F.pad(band, (0, 0, int(first < 0), int(last > h))) for band in bands]
            compute(bands, [frame[:, :, start:stop] for frame in out])
            self.on_band()
        return out
