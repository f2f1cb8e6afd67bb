"""Keeps on the device only what it computes with; carries out a plan and decides nothing.

Two things can wait in host memory: the frames of a causal state, and the weights of the transformer's blocks. They come
one step before they are needed, while the device computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from types import EllipsisType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..models.vae import CausalState

# Where a causal state waits between two uses.
Placement = Literal["device", "host"]

# Tensors that may be on their way to the host; until they have left they take memory on the device.
LEAVING = 2
# Frames, or bands of frames, sent for before a layer looks at them: the past of a convolution, or of one of its bands.
AHEAD = 2
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
# Which part of a tensor.
Index = EllipsisType | tuple[EllipsisType | slice, ...]


class Ferry(Protocol):
    """Carries tensors between a device and the host."""

    def store(self, x: Tensor) -> Stored:
        """Begin to copy a tensor to the host."""

    def fetch(self, stored: Stored, into: Tensor | None = None, index: Index = ...) -> Arrival:
        """Begin to copy a part of it back, into new memory or given one."""


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

    def fetch(self, stored: Stored, into: Tensor | None = None, index: Index = ...) -> Arrival:
        # Whoever had the memory before may still be computing with it. All memory of this stream is taken here, behind
        # this line, so that a tensor may be dropped at any time.
        self.up.wait_stream(torch.cuda.current_stream(self.device))
        if stored.complete is not None:
            self.up.wait_event(stored.complete)
        host = stored.host[index]
        with torch.cuda.stream(self.up):
            # Some rows of a frame in channels-last memory lie together, as they will on the device.
            x = torch.empty_like(host, device=self.device) if into is None else into
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

    def fetch(self, stored: Stored, into: Tensor | None = None, index: Index = ...) -> Arrival:
        host = stored.host[index]
        x = host.clone() if into is None else into.copy_(host)
        return lambda: x


class PretendFerry:
    """Takes as much memory on the device as a real one, and none on the host: for trials."""

    def __init__(self):
        self.leaving: deque[Tensor] = deque(maxlen=LEAVING)

    def store(self, x: Tensor) -> Stored:
        self.leaving.append(x)
        # A single value that looks as large.
        return Stored(x.new_empty(()).expand(x.shape))

    def fetch(self, stored: Stored, into: Tensor | None = None, index: Index = ...) -> Arrival:
        x = torch.empty(stored.host[index].shape, dtype=stored.host.dtype, device=stored.host.device)
        return lambda: x


class MetaFerry:
    """Carries tensors without values: nothing is copied."""

    def store(self, x: Tensor) -> Stored:
        return Stored(x)

    def fetch(self, stored: Stored, into: Tensor | None = None, index: Index = ...) -> Arrival:
        return lambda: stored.host[index] if into is None else into


def ferry_to(device: torch.device) -> Ferry:
    if device.type == "meta":
        return MetaFerry()
    return CudaFerry(device) if device.type == "cuda" else CpuFerry()


class DeviceState(CausalState):
    """A causal state that slices use up: the past of a layer goes when its next one comes. Half the memory, but after
    a slice that fails it is of no use any more."""

    def begin(self) -> DeviceState:
        return self


class HostState(DeviceState):
    """A causal state whose frames leave the device when a layer writes them, and come back when it looks at them.

    Layers look in the same order in every slice, so the order of the last one tells what will be looked at next.
    """

    def __init__(self, ferry: Ferry):
        super().__init__()
        self.ferry = ferry
        self._order: list[_Look] = []  # of the last slice
        self._looks: list[_Look] = []  # of this one
        self._reads = 0  # pasts that layers have asked for in this slice
        self._past: object = None  # the last of them
        self._coming: list[_Sent] = []

    def begin(self) -> HostState:
        self._order, self._looks, self._reads = self._looks, [], 0
        return self

    def __getitem__(self, layer: object) -> object:
        self._reads += 1
        self._past = super().__getitem__(layer)
        looks = (_Look(self._reads, layer, number, ...) for number in count())
        return tree_map_only(Stored, lambda stored: Absent(self, stored, next(looks)), self._past)

    def get(self, layer: object, default: object = None) -> object:
        return self[layer] if layer in self else default  # noqa: SIM401, this is what it would call

    def __setitem__(self, layer: object, past: object) -> None:
        # At the start of a clip a frame is its own past.
        fresh = {id(x): x for x in tree_leaves(past) if isinstance(x, Tensor)}
        stored = {key: self.ferry.store(x) for key, x in fresh.items()}
        past = tree_map_only(Tensor, lambda x: stored[id(x)], past)
        super().__setitem__(layer, tree_map_only(Absent, lambda frame: frame.stored, past))

    def bring(self, stored: Stored, look: _Look) -> Tensor:
        """What a layer looks at, on the device. What will be looked at next is sent for."""
        if not (self._coming and self._coming[0].answers(stored, look.index)):
            # Another order than in the last slice.
            self._coming = [self._send(stored, look.index)]
        arrive = self._coming.pop(0).arrive
        self._looks.append(look)
        seen = len(self._looks)
        for following in self._order[seen + len(self._coming) : seen + AHEAD]:
            past = self._past if following.read == self._reads else super().get(following.layer)
            frames = [leaf for leaf in tree_leaves(past) if isinstance(leaf, Stored)]
            if following.number >= len(frames):
                break
            self._coming.append(self._send(frames[following.number], following.index))
        return arrive()

    def _send(self, stored: Stored, index: Index) -> _Sent:
        return _Sent(stored, index, self.ferry.fetch(stored, index=index))


class Absent:
    """A frame in host memory. An index brings it to the device: `...` all of it, or some of its rows."""

    def __init__(self, state: HostState, stored: Stored, look: _Look):
        self.state, self.stored, self.look = state, stored, look

    @property
    def shape(self) -> torch.Size:
        return self.stored.host.shape

    def __getitem__(self, index: Index) -> Tensor:
        return self.state.bring(self.stored, self.look._replace(index=index))


class _Look(NamedTuple):
    """What a layer looked at."""

    read: int  # the how manieth past of the slice
    layer: object
    number: int  # of the frame in it
    index: Index


@dataclass(frozen=True, eq=False)
class _Sent:
    """Part of a frame on its way."""

    stored: Stored
    index: Index
    arrive: Arrival

    def answers(self, stored: Stored, index: Index) -> bool:
        return self.stored is stored and self.index == index


def new_state(placement: Placement, device: torch.device) -> CausalState:
    """Where a clip begins."""
    return HostState(ferry_to(device)) if placement == "host" else DeviceState()


def placed(state: CausalState, placement: Placement, device: torch.device) -> CausalState:
    """A state in another place. The one given is used up."""
    if isinstance(state, HostState) == (placement == "host") and isinstance(state, DeviceState):
        return state
    moved = new_state(placement, device)
    for layer in list(state):
        moved[layer] = tree_map_only(Absent, lambda frame: frame[...], state[layer])
        state.pop(layer)
    return moved


class StreamedBlocks:
    """A transformer's blocks one by one, some of them with weights that come from the host before their turn.

    Streamed blocks take turns in two places on the device. So a block is to be used when it is handed out, until the
    next one is asked for. The next one in order is on its way meanwhile: forwards, and backwards where a pass with
    gradients computes every block again, from the last to the first. After `close` all of them lie where they have been
    waiting and are ordinary modules again.
    """

    @torch.inference_mode(False)
    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, streamed: int):
        """Move blocks to where they belong: `streamed` of them, whose weights are not packed, to the host, the others
        to the device."""
        self.blocks, self.ferry = blocks, ferry_to(device)
        self._indices = streamed_indices(len(blocks), streamed)
        self._turns = {index: turn for turn, index in enumerate(self._indices)}
        self._buffers = {index: _Buffer(blocks[index]) for index in self._indices}
        size = max((buffer.size for buffer in self._buffers.values()), default=0)
        self._stored: dict[int, Stored] = {}
        for index, block in enumerate(blocks):
            if index in self._turns:
                flat = self._buffers[index].left_by(block)
                stored = Stored(flat) if flat is not None else self.ferry.store(self._buffers[index].fill(block))
                self._stored[index] = stored
                self._assign(index, self._stored[index].host)
            elif next(block.parameters()).device != device:
                block.to(device)
        # Last, when the weights that have left have made room.
        self._places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(PLACES, streamed))]
        self._there: dict[int, int] = {}  # by place, the turn of the block that is there, or on its way
        self._coming: dict[int, Arrival] = {}  # by place
        self._last = 0  # turn
        for index, turn in self._turns.items():
            self._assign(index, self._places[turn % PLACES])

    @property
    def host_bytes(self) -> int:
        """Of the weights that wait in host memory."""
        return sum(stored.host.nbytes for stored in self._stored.values())

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self.at(index) for index in range(len(self)))

    def at(self, index: int) -> nn.Module:
        """A block, whatever was handed out before; the one that follows it in the present direction is sent for."""
        turn = self._turns.get(index)
        if index == 0 and self._stored:
            # A pass begins.
            self._send(0)
        if turn is not None:
            self._send(turn)
            if arrive := self._coming.pop(turn % PLACES, None):
                arrive()
            # After the last block comes the same again, backwards.
            last = len(self._stored) - 1
            forwards = turn == 0 or self._last < turn < last
            self._last = turn
            if last:
                self._send(turn + 1 if forwards else turn - 1)
        return self.blocks[index]

    @torch.inference_mode(False)
    def close(self) -> None:
        # Of a pass that was cut short. Whoever gets the memory of a place next must not be written over.
        for arrive in self._coming.values():
            arrive()
        self._coming, self._there = {}, {}
        for index, stored in self._stored.items():
            if stored.complete is not None:
                stored.complete.synchronize()
            self._assign(index, stored.host)
        self._places = []

    def _send(self, turn: int) -> None:
        """Begin to copy a block into its place, unless it is there or on its way."""
        index, place = self._indices[turn], turn % PLACES
        if self._there.get(place) != turn:
            into = self._places[place][: self._buffers[index].size]
            self._coming[place] = self.ferry.fetch(self._stored[index], into)
            self._there[place] = turn

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

    def left_by(self, block: nn.Module) -> Tensor | None:
        """The bytes of the parameters where an earlier stream has left them in host memory, if one has."""
        first = next(block.parameters())
        storage = first.untyped_storage()
        begins = {name: parameter.data_ptr() - storage.data_ptr() for name, parameter in block.named_parameters()}
        if first.device.type != "cpu" or storage.nbytes() != self.size or len(begins) != len(self.spans):
            return None
        if any(begins[name] != start for name, (start, _) in self.spans.items()):
            return None
        return torch.empty(0, dtype=torch.uint8).set_(storage)

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
