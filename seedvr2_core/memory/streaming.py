"""Keeps on the device only what it computes with; carries out a plan and decides nothing.

Two things can wait in host memory: the frames of a causal state, and the weights of the transformer's blocks. They come
one step before they are needed, while the device computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..models.vae import CausalState

# Where a causal state waits between two uses.
Placement = Literal["device", "host"]

# Tensors that may be on their way to the host; until they have left they take memory on the device.
LEAVING = 2
# Streamed blocks on the device: one at work, one on its way.
PLACES = 2
# Where weights begin in the buffer of a block, in bytes: what vectorised loads want.
ALIGNMENT = 256


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in host memory, complete when the event has happened."""

    host: Tensor
    complete: torch.cuda.Event | None = None


# Waits until a tensor is on the device, and gives it.
Arrival = Callable[[], Tensor]


class Ferry(Protocol):
    """Carries tensors between a device and the host."""

    def store(self, x: Tensor) -> Stored:
        """Begin to copy a tensor to the host."""

    def fetch(self, stored: Stored, into: Tensor | None = None) -> Arrival:
        """Begin to copy it back, into new memory or given one."""


class CudaFerry:
    """Copies on streams of their own, one in each direction, beside what the current stream computes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.down, self.up = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def store(self, x: Tensor) -> Stored:
        host = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, pin_memory=True)
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down):
            host.copy_(x, non_blocking=True)
        complete = self.down.record_event()
        # Held until it has left: the allocator does not know that this stream reads it, and would give it away.
        self.leaving.append((x, complete))
        while len(self.leaving) > LEAVING:
            self.leaving.popleft()[1].synchronize()
        return Stored(host, complete)

    def fetch(self, stored: Stored, into: Tensor | None = None) -> Arrival:
        # Whoever had the memory before may still be computing with it. All memory of this stream is taken here, behind
        # this line, so that a tensor may be dropped at any time.
        self.up.wait_stream(torch.cuda.current_stream(self.device))
        self.up.wait_event(stored.complete)
        host = stored.host
        with torch.cuda.stream(self.up):
            x = into
            if x is None:
                x = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self.device)
            x.copy_(host, non_blocking=True)
        arrived = self.up.record_event()

        def arrive() -> Tensor:
            torch.cuda.current_stream(self.device).wait_event(arrived)
            return x

        return arrive


class CpuFerry:
    """Copies where device and host are the same: nothing is gained, but everything can be tested."""

    def store(self, x: Tensor) -> Stored:
        return Stored(x.clone())

    def fetch(self, stored: Stored, into: Tensor | None = None) -> Arrival:
        x = stored.host.clone() if into is None else into.copy_(stored.host)
        return lambda: x


class PretendFerry:
    """Takes as much memory on the device as a real one, and none on the host: for trials."""

    def __init__(self):
        self.leaving: deque[Tensor] = deque(maxlen=LEAVING)

    def store(self, x: Tensor) -> Stored:
        self.leaving.append(x)
        # A single value that looks as large.
        return Stored(x.new_empty(()).expand(x.shape))

    def fetch(self, stored: Stored, into: Tensor | None = None) -> Arrival:
        x = torch.empty(stored.host.shape, dtype=stored.host.dtype, device=stored.host.device)
        return lambda: x


def ferry_to(device: torch.device) -> Ferry:
    return CudaFerry(device) if device.type == "cuda" else CpuFerry()


class DeviceState(CausalState):
    """A causal state that slices use up: the past of a layer goes when its next one comes. Half the memory, but after
    a slice that fails it is of no use any more."""

    def begin(self) -> DeviceState:
        return self


class HostState(DeviceState):
    """A causal state whose frames leave the device when a layer writes them, and come back before it reads them.

    Layers ask in the same order in every slice, so the order of the last one tells who will be next.
    """

    def __init__(self, ferry: Ferry):
        super().__init__()
        self.ferry = ferry
        self._order: list[object] = []  # layers as the last slice read them
        self._read: list[object] = []  # and as this one does
        self._next: tuple[object, object] | None = None  # the layer that reads next, and its past, on its way
        self._here: list[tuple[Tensor, Stored]] = []  # frames of the layer at work that are on both sides

    def begin(self) -> HostState:
        self._order, self._read = self._read, []
        return self

    def __getitem__(self, layer: object) -> object:
        past = self._next[1] if self._next and self._next[0] is layer else self._send(layer)
        self._next = None
        self._read.append(layer)
        return tree_map_only(_Sent, self._arrive, past)

    def get(self, layer: object, default: object = None) -> object:
        return self[layer] if layer in self else default  # noqa: SIM401, this is what it would call

    def __setitem__(self, layer: object, past: object) -> None:
        super().__setitem__(layer, tree_map_only(Tensor, self._store, past))
        self._here, self._next = [], None
        # Sent now and not when this layer read: it may read again before others do.
        following = self._order[len(self._read) : len(self._read) + 1]
        if following and following[0] in self:
            self._next = following[0], self._send(following[0])

    def _send(self, layer: object) -> object:
        """The past of a layer, on its way to the device."""
        past = super().__getitem__(layer)
        return tree_map_only(Stored, lambda stored: _Sent(stored, self.ferry.fetch(stored)), past)

    def _arrive(self, sent: _Sent) -> Tensor:
        x = sent.arrive()
        self._here.append((x, sent.stored))
        return x

    def _store(self, x: Tensor) -> Stored:
        for here, stored in self._here:
            if here is x:
                return stored
        stored = self.ferry.store(x)
        self._here.append((x, stored))
        return stored


def new_state(placement: Placement, device: torch.device) -> CausalState:
    """Where a clip begins."""
    return HostState(ferry_to(device)) if placement == "host" else DeviceState()


def placed(state: CausalState, placement: Placement, device: torch.device) -> CausalState:
    """A state in another place. The one given is used up."""
    if isinstance(state, HostState) == (placement == "host") and isinstance(state, DeviceState):
        return state
    moved = new_state(placement, device)
    for layer in list(state):
        moved[layer] = state[layer]
        state.pop(layer)
    return moved


@dataclass(frozen=True, eq=False)
class _Sent:
    stored: Stored
    arrive: Arrival


class StreamedBlocks:
    """A transformer's blocks one by one, some of them with weights that come from the host before their turn.

    Streamed blocks take turns in two places on the device. So a block is to be used when it is handed out, until the
    next one is asked for. After `close` all of them lie where they have been waiting and are ordinary modules again.
    """

    @torch.inference_mode(False)
    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, streamed: int):
        """Move blocks to where they belong: `streamed` of them, whose weights are not packed, to the host, the others
        to the device."""
        self.blocks, self.ferry = blocks, ferry_to(device)
        turns = {index: turn for turn, index in enumerate(streamed_indices(len(blocks), streamed))}
        self._buffers = {index: _Buffer(blocks[index]) for index in turns}
        size = max((buffer.size for buffer in self._buffers.values()), default=0)
        self._stored: dict[int, Stored] = {}
        for index, block in enumerate(blocks):
            if index in turns:
                self._stored[index] = self.ferry.store(self._buffers[index].fill(block))
                self._assign(index, self._stored[index].host)
            elif next(block.parameters()).device != device:
                block.to(device)
        # Last, when the weights that have left have made room.
        places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(PLACES, streamed))]
        self._places = {index: places[turn % PLACES] for index, turn in turns.items()}
        for index, place in self._places.items():
            self._assign(index, place)

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[nn.Module]:
        arrivals = (self._fetch(index) for index in self._stored)
        coming = next(arrivals, None)
        for index, block in enumerate(self.blocks):
            if index in self._stored:
                coming()
                coming = next(arrivals, None)
            yield block

    @torch.inference_mode(False)
    def close(self) -> None:
        for index, stored in self._stored.items():
            if stored.complete is not None:
                stored.complete.synchronize()
            self._assign(index, stored.host)
        self._places = {}

    def _fetch(self, index: int) -> Arrival:
        return self.ferry.fetch(self._stored[index], self._places[index][: self._buffers[index].size])

    def _assign(self, index: int, flat: Tensor) -> None:
        self.blocks[index].load_state_dict(self._buffers[index].views(flat), strict=False, assign=True)


def streamed_indices(depth: int, streamed: int) -> list[int]:
    """Which blocks are streamed: evenly among the others, because what is computed in between hides the copies."""
    return [(turn + 1) * depth // streamed - 1 for turn in range(streamed)]


class _Buffer:
    """The parameters of a block, end to end."""

    def __init__(self, block: nn.Module):
        self.size = 0
        self.spans: dict[str, tuple[int, int]] = {}
        for name, parameter in block.named_parameters():
            self.spans[name] = self.size, self.size + parameter.nbytes
            self.size += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        self.like = {name: (parameter.dtype, parameter.shape) for name, parameter in block.named_parameters()}

    def fill(self, block: nn.Module) -> Tensor:
        """The bytes of the parameters, where the block is."""
        flat = torch.empty(self.size, dtype=torch.uint8, device=next(block.parameters()).device)
        for name, view in self.views(flat).items():
            view.copy_(block.get_parameter(name).detach())
        return flat

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        return {
            name: flat[slice(*span)].view(dtype).view(shape)
            for (name, span), (dtype, shape) in zip(self.spans.items(), self.like.values(), strict=True)
        }
