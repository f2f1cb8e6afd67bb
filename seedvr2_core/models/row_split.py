"""A frame in bands of rows, one for every process: what they have to tell each other so that the result is that of the
whole frame.

Convolutions need the neighbours' nearest row, norms sums over the whole frame, attention the keys and values of all.

    frame: b c h w, the rows of one process   n frames
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import SettingError


@dataclass(frozen=True)
class RowSplit:
    """One process's place among those that share a frame; rank 0 has the topmost rows."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None  # None: all processes

    @staticmethod
    def of_world() -> RowSplit:
        return RowSplit(dist.get_rank(), dist.get_world_size())

    @property
    def has_above(self) -> bool:
        return self.rank > 0

    @property
    def has_below(self) -> bool:
        return self.rank < self.size - 1

    def rows(self, height: int, multiple: int) -> slice:
        """This process's rows of a frame; every process gets a multiple of `multiple`, the first ones the most.

        Raises:
            SettingError: there are fewer multiples than processes, or the height is no multiple.
        """
        units, rest = divmod(height, multiple)
        if rest or units < self.size:
            raise SettingError(
                f"{height} rows cannot be shared by {self.size} processes in multiples of {multiple}; use fewer "
                "processes or pad the frame."
            )
        edges = [multiple * (units * rank // self.size) for rank in range(self.size + 1)]
        return slice(edges[self.rank], edges[self.rank + 1])

    def extend(self, frame: Tensor) -> Tensor:
        """The frame with the neighbours' nearest row above and below, where there are neighbours."""
        above, below = self._exchange(frame)
        parts = [part for part in (above, frame, below) if part is not None]
        return torch.cat(parts, dim=2).contiguous(memory_format=torch.channels_last)

    def extend_below(self, frame: Tensor) -> Tensor:
        """The frame with the next row of the neighbour below, or a row of zeros at the bottom of the whole."""
        _, below = self._exchange(frame)
        if below is None:
            below = torch.zeros_like(frame[:, :, :1])
        return torch.cat([frame, below], dim=2).contiguous(memory_format=torch.channels_last)

    def trim(self, result: Tensor) -> Tensor:
        """The result of a convolution, padded by one row, of an extended frame: without what its padding made up."""
        return result[:, :, int(self.has_above) : result.shape[2] - int(self.has_below)]

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all processes."""
        sums = sums.contiguous()
        dist.all_reduce(sums, group=self.group)
        return sums

    def gather(self, frame: Tensor) -> tuple[Tensor, slice]:
        """The whole frame, and where this process's rows lie in it."""
        heights = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(heights, torch.tensor([frame.shape[2]]), group=self.group)
        lengths = [int(height) for height in heights]
        b, c, _, w = frame.shape
        # Of the largest height each, because not every backend gathers uneven parts.
        padded = frame.new_zeros(b, c, max(lengths), w)
        padded[:, :, : frame.shape[2]] = frame
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        start = sum(lengths[: self.rank])
        whole = torch.cat([part[:, :, :length] for part, length in zip(parts, lengths, strict=True)], dim=2)
        return whole, slice(start, start + frame.shape[2])

    def _exchange(self, frame: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The last row of the neighbour above and the first of the one below."""
        above = torch.empty_like(frame[:, :, :1]).contiguous() if self.has_above else None
        below = torch.empty_like(frame[:, :, :1]).contiguous() if self.has_below else None
        operations = []
        if above is not None:
            operations.append(dist.P2POp(dist.isend, frame[:, :, :1].contiguous(), self.rank - 1, self.group))
            operations.append(dist.P2POp(dist.irecv, above, self.rank - 1, self.group))
        if below is not None:
            operations.append(dist.P2POp(dist.isend, frame[:, :, -1:].contiguous(), self.rank + 1, self.group))
            operations.append(dist.P2POp(dist.irecv, below, self.rank + 1, self.group))
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()
        return above, below
