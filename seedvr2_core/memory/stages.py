"""What the stages of a restoration take, each tried at its true size on tensors without contents.

    c channels   T H W pixel frames, height, width   t h w the same in latent space
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..models.dit import CPU_ROWS, Block, DiT, make_layout
from ..models.linear import Linear
from ..models.tiling import TiledVAE
from ..models.vae import TEMPORAL_STAGES, CausalState, VAEConfig, VideoVAE, posterior
from ..models.vae_fast import FastVAE
from ..video.geometry import LATENT_FRAMES, PATCH, Grid, latent_grid, padded_length, padded_size
from .streaming import PLACES, DeviceState, HostState, Placement, PretendFerry, streamed_indices
from .trial import META, Footprint, footprint

# Of the autoencoder.
Half = Literal["encode", "decode"]

# In the third slice the state that comes in is as large as the one that goes out; from then on nothing changes.
SLICES = 3
# Turns in which a trial takes tokens; what is taken at once is then still a small part of all.
MOST_TURNS = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What is to be computed, as far as memory is concerned. Without one of the models its stages are left out."""

    vae: VideoVAE | FastVAE | TiledVAE | None
    dit: DiT | None
    device: str  # its type
    height: int  # of the result, in pixels
    width: int
    frames: int | None  # of the clip; None: nobody knows
    chunk: int | None = None  # latents in one pass of the transformer, where a user has chosen
    source: int = 0  # bytes of a frame as it comes in, where that is known and counts
    text_tokens: int = 64  # of a prompt; the published ones are shorter

    @property
    def dtype(self) -> torch.dtype:
        return (self.vae if self.dit is None else self.dit.txt_in.weight).dtype

    @property
    def latents(self) -> float:
        """Latents of the clip; where nobody knows, infinitely many."""
        return math.inf if self.frames is None else latent_grid(padded_length(self.frames), *self.size).t

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in the models."""
        return padded_size(self.height, self.width)

    @property
    def pixels(self) -> int:
        return math.prod(self.size)


class Portions(NamedTuple):
    """How much the autoencoder computes at once, see `FastOptions`."""

    block: int
    band: int | None


def try_autoencoder(work: Work, half: Half, portions: Portions, state: Placement) -> Footprint:
    """Encode or decode as the pipeline does: a latent at a time, of a clip in the first slice the lone first frame as
    well. What is kept is the causal state."""
    vae = work.vae
    if vae is None:
        return Footprint(0, 0)
    if isinstance(vae, FastVAE):
        vae.take(*portions)
    slices = int(min(work.latents, SLICES))
    # Of a longer clip the first slice is none of the largest.
    lengths = [1 + LATENT_FRAMES] if slices == 2 else [1, *[LATENT_FRAMES] * (slices - 1)]

    def encode() -> CausalState:
        begun = _begun(state)
        for length in lengths:
            clip = torch.empty(1, 3, length, *work.size, dtype=vae.dtype, device=META)
            moments, begun = vae.encode_slice(clip, begun, last=work.latents == 1)
            posterior(moments)
        return begun

    def decode() -> CausalState:
        begun, shape = _begun(state), (1, vae.config.latent_channels, *latent_grid(1, *work.size))
        for _ in range(slices):
            latent = torch.empty(shape, dtype=vae.dtype, device=META)
            _, begun = vae.decode_slice(latent, begun, last=work.latents == 1)
        return begun

    return footprint(encode if half == "encode" else decode, work.device)


def _begun(placement: Placement) -> CausalState:
    return HostState(PretendFerry()) if placement == "host" else DeviceState()


def try_restore(work: Work, latents: int, rows: int | None) -> int:
    """Bytes at the peak of one pass of the transformer over so many latents; `rows` as for `DiT`."""
    if work.dit is None:
        return 0
    dit, config = work.dit, work.dit.config
    _, h, w = latent_grid(1, *work.size)
    grid = Grid(latents, h // PATCH, w // PATCH)
    if work.device == "cpu" and rows is None:
        # What the transformer chooses there; on many tokens in fewer turns, for the sake of the trial.
        rows = max(CPU_ROWS, math.prod(grid) // MOST_TURNS)
    layout = make_layout([grid], [work.text_tokens], config)

    def call() -> list[Tensor]:
        text = torch.empty(work.text_tokens, config.text_dim, dtype=work.dtype, device=META)
        # Noise, condition and mask wait in fp32 beside what is made of them.
        waiting = torch.empty(1, config.in_channels, latents, h, w, device=META)
        inside = waiting.to(work.dtype)
        time = torch.empty(1, device=META)
        return dit(inside, [text], time, layout=layout, attention="sdpa", rows=rows, blocks=_kinds(dit))

    return footprint(call, work.device).peak + _bytes(_tensors_of(layout, set()))


def _kinds(dit: DiT) -> list[Block]:
    """A block of every kind, in both window layouts."""
    last = len(dit.blocks) - 1
    return [dit.blocks[index] for index in sorted({0, min(1, last), min(dit.config.separate_layers, last), last})]


class Weights(NamedTuple):
    """Bytes of the weights of a restoration."""

    blocks: tuple[int, ...]  # of the transformer
    others: int  # of the transformer and the autoencoder
    streamable: bool  # whether blocks may be streamed

    def on_device(self, streamed: int) -> int:
        away = [self.blocks[index] for index in streamed_indices(len(self.blocks), streamed)]
        return self.others + sum(self.blocks) - sum(away) + max(away, default=0) * min(PLACES, streamed)


def weights_of(work: Work) -> Weights:
    everything = _bytes(_tensors_of((work.dit, work.vae), set()))
    if work.dit is None:
        return Weights((), everything, streamable=False)
    blocks = tuple(_bytes(_tensors_of(block, set())) for block in work.dit.blocks)
    packed = any(isinstance(layer, Linear) and layer.packed is not None for layer in work.dit.modules())
    return Weights(blocks, everything - sum(blocks), work.device == "cuda" and not packed)


def resident_bytes(models: Sequence[object], device: torch.device) -> int:
    """Bytes of these models' weights that are on the device now."""
    return _bytes(tensor for tensor in _tensors_of(tuple(models), set()) if tensor.device == device)


def _bytes(tensors: Iterator[Tensor]) -> int:
    # Packed weights have no storage that could be asked.
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _tensors_of(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """Tensors that a model, a part of one or a layout holds, each once."""
    if isinstance(thing, (tuple, list)):
        # Not noted as seen: most are made on the way, and what follows may get the identity of one that is gone.
        for part in thing:
            yield from _tensors_of(part, seen)
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from _tensors_of([*thing.parameters(), *thing.buffers()], seen)
        for module in thing.modules():
            yield from _tensors_of(getattr(module, "packed", None), seen)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        yield from _tensors_of(list(vars(thing).values()), seen)


def reach(config: VAEConfig) -> tuple[int, int]:
    """How many slices, of a latent each, the encoder and the decoder look back: what lies before has no influence.

    A convolution looks back by two of the frames that it sees.
    """
    last = len(config.widths) - 1
    # Frames that the convolutions of a stage see in the time of one latent, fine to coarse.
    rates = [2 ** min(TEMPORAL_STAGES, max(0, last - i)) for i in range(last + 1)]
    middle, ends = 4 * 2, 2 * (1 + 1 / rates[0])
    encoder = sum((4 * config.blocks + 2) / rate for rate in rates)
    decoder = sum((4 * (config.blocks + 1) + 2) / rate for rate in rates)
    return math.ceil(encoder + middle + ends), math.ceil(decoder + middle + ends)
