"""The life of a clip: frames in, as many frames out.

Everything is a chain of generators, so a clip of any length flows through in pieces: read, encode, restore, decode,
correct, write. The autoencoder carries its causal state from piece to piece and so never sees a border. The transformer
works on chunks that share two latents, which are cross-faded; its noise belongs to frames, not to chunks.

Files are read and written by threads of their own; frames go to the device, and from it to a file, as whole numbers.

    T H W frames as shown   c channels, 3 or 4 with alpha   b c t h w latents
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .attention import resolve
from .checkpoints import Prompts, inspect, load_dit, load_prompts, load_vae
from .device import free_bytes
from .diffusion.conditioning import augment, frame_noise, with_mask
from .diffusion.sampler import guide, sample
from .errors import MediaError, SettingError
from .models.dit import DiT, DiTConfig, Layout, make_layout
from .models.dit import token_grid as token_grid_of
from .models.linear import pack
from .models.vae import CausalState, VideoVAE, posterior
from .models.vae_fast import FastOptions, FastVAE
from .video.alpha import upscale_alpha
from .video.chunks import OVERLAP, crossfade, overlapping
from .video.color import ColorTransfer
from .video.files import MediaInfo, Moment, open_reader, open_writer, probe
from .video.geometry import (
    LATENT_FRAMES,
    Grid,
    Target,
    crop,
    latent_grid,
    mirror_indices,
    pad_to_multiple,
    padded_length,
    padded_size,
    resize,
    to_clip,
    to_floats,
    to_frames,
    token_grid,
)
from .video.threads import read_ahead, write_behind
from .video.transfers import download, upload

log = logging.getLogger(__name__)

Stage = Literal["encode", "restore", "decode"]
# on_progress(stage, done, total): frames, of which `total` is None where nobody knows. It may raise to cancel.
OnProgress = Callable[[Stage, float, int | None], None]
Frames = Iterable[Tensor]

# Frames encoded at a time. More would be a little faster and take proportionally more memory.
PIECE = LATENT_FRAMES
# Frames read before they are needed, and finished ones that wait to be written; both as whole numbers.
READ_AHEAD = WRITE_BEHIND = 2 * PIECE
# Share of the free memory that the transformer's activations may take when the chunk is chosen automatically.
MEMORY_SHARE = 0.4
# Latents in an automatic chunk: below, there is little to see in time; above, nothing is gained.
SHORTEST, LONGEST = 5, 32
# Condition noise of the multi-step SeedVR, in its published script; SeedVR2 has none.
MULTI_STEP_NOISE = 0.1


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a restoration runs on. All parts lie on one device and have one type."""

    dit: DiT
    vae: VideoVAE | FastVAE
    prompts: Prompts
    label: str  # for people

    @property
    def device(self) -> torch.device:
        return self.dit.txt_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.dit.txt_in.weight.dtype


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user may choose. The defaults are right for SeedVR2."""

    target: Target = Target.scale(2)
    color: str = "lab"  # one of COLOR_METHODS
    seed: int = 0
    steps: int = 1  # SeedVR2 was distilled to one
    cfg: float = 1.0  # guidance towards the positive prompt; 1 is none
    attention: str = "auto"  # one of ATTENTION_NAMES
    chunk: int | None = None  # frames in one pass of the transformer; None chooses by free memory

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SettingError(f"steps is {self.steps}; at least 1 step is needed.")
        if not 1 <= self.cfg < math.inf:
            raise SettingError(f"cfg is {self.cfg:g}; guidance is a number from 1, which is none.")
        shortest = LATENT_FRAMES * OVERLAP + 1
        if self.chunk is not None and self.chunk < shortest:
            raise SettingError(f"A chunk of {self.chunk} frames is too short; use {shortest} or more.")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of a file."""

    source: Path
    destination: Path
    model: str
    frames: int
    width: int
    height: int
    seconds: float
    chunk: int  # frames


def load_models(dit: Path, vae: Path, device: torch.device, dtype: torch.dtype) -> Models:
    """Load a transformer with its prompts, and an autoencoder.

    Raises:
        CheckpointError: a file is missing, damaged or something else.
    """
    # The large file comes last, so that a mistake in the others shows at once.
    prompts, autoencoder = load_prompts(dit), FastVAE(load_vae(vae, dtype, device), fast_options(device))
    transformer = pack(load_dit(dit, dtype, device))
    return Models(dit=transformer, vae=autoencoder, prompts=prompts, label=inspect(dit).label)


def fast_options(device: torch.device) -> FastOptions:
    """How the autoencoder computes on this device."""
    # Shared products are measured to be faster on CPUs only; on GPUs that is still to be seen.
    return FastOptions() if device.type == "cpu" else FastOptions(winograd_from=None)


def restore(
    frames: Tensor, models: Models, settings: Settings = Settings(), on_progress: OnProgress | None = None
) -> Tensor:
    """Restore a clip that fits in memory.

    Args:
        frames: T H W c in 0..1. One frame is a picture.
        on_progress: see `OnProgress`.

    Returns:
        T H' W' c in 0..1, fp32 on the CPU; H' and W' are what `settings.target` makes of H and W.

    Raises:
        MediaError: there is no frame, or not 3 or 4 channels.
    """
    if frames.dim() != 4 or frames.shape[-1] not in (3, 4) or 0 in frames.shape:
        raise MediaError(f"Expected frames T H W c with 3 or 4 channels, got the shape {tuple(frames.shape)}.")
    size = settings.target.size(*frames.shape[1:3])
    return torch.cat(list(stream(frames, models, settings, size, len(frames), on_progress)))


def restore_file(
    source: str | Path,
    destination: str | Path,
    models: Models,
    settings: Settings = Settings(),
    on_progress: OnProgress | None = None,
    fps: Fraction | int = 24,
) -> Report:
    """Restore a video, an image or a folder of numbered images, whatever its length, into another.

    Sound, subtitles, timestamps and colour tags of a video are kept. The destination appears when it is complete;
    until then, and after an error or a cancellation, it is as it was before.

    Args:
        fps: frame rate of a folder of images.

    Raises:
        MediaError: the source cannot be read or the destination not written.
        SettingError: a setting is impossible for this source.
    """
    start = time.perf_counter()
    info = probe(source, fps=fps)
    height, width = settings.target.size(info.height, info.width)
    chunk = chunk_latents(models, settings, height, width)
    log_plan(info, models, settings, height, width, chunk)
    # Decided once: the memory that is free changes during the work.
    settings = replace(settings, chunk=LATENT_FRAMES * (chunk - 1) + 1)
    moments: deque = deque()

    def pixels(reader: Iterable) -> Iterator[Tensor]:
        for frame in reader:
            moments.append(frame.time)
            yield frame.pixels

    def write(frame: tuple[Callable, Moment]) -> None:
        arrived, moment = frame
        writer.write_packed(arrived(), moment)

    with (
        open_reader(info) as reader,
        open_writer(destination, info, width=width, height=height) as writer,
        closing(read_ahead(reader, READ_AHEAD)) as ahead,
        write_behind(write, WRITE_BEHIND) as put,
    ):
        size = height, width
        for piece in stream_on_device(pixels(ahead), models, settings, size, info.frames, on_progress):
            for frame in piece:
                put((download(writer.pack(frame)), moments.popleft()))
    return Report(
        source=Path(source),
        destination=Path(destination),
        model=models.label,
        frames=writer.frames,
        width=width,
        height=height,
        seconds=round(time.perf_counter() - start, 3),
        chunk=settings.chunk,
    )


def stream(
    frames: Frames,
    models: Models,
    settings: Settings,
    size: tuple[int, int],
    total: int | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Tensor]:
    """Restore frames as they come; memory does not grow with their number.

    Args:
        frames: each H W c, floats in 0..1 or codes in uint8 or uint16, which take less memory while they wait.
        size: height and width of the result.
        total: how many frames there will be, if known; only progress depends on it.

    Yields:
        T H' W' c in 0..1, fp32 on the CPU, in order, in pieces of any length; as many frames in all as came in.

    Raises:
        MediaError: there is no frame.
        SettingError: a setting is impossible here, or takes more memory than there is.
    """
    for piece in stream_on_device(frames, models, settings, size, total, on_progress):
        yield piece.cpu()


@torch.inference_mode()
def stream_on_device(
    frames: Frames,
    models: Models,
    settings: Settings,
    size: tuple[int, int],
    total: int | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Tensor]:
    """`stream` before its frames leave the device of the models, which may still be at work on them."""
    life = _Life(models, settings, size, total, on_progress or (lambda stage, done, total: None))
    conditions = life.encode(life.pieces(frames))
    latents = life.restore(conditions)
    try:
        yield from life.finish(life.decode(latents))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise SettingError(
            f"Restoring at {size[1]} x {size[0]} takes more memory than {models.device} has free; choose a smaller "
            "size or a shorter chunk, or close other programs."
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory; on a CPU only the message tells."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class _Life:
    """One clip on its way through the models, and what its stages have to know of each other."""

    def __init__(
        self, models: Models, settings: Settings, size: tuple[int, int], total: int | None, on_progress: OnProgress
    ):
        self.models, self.settings, self.size, self.total, self.on_progress = models, settings, size, total, on_progress
        self.waiting: deque[Tensor] = deque()  # source frames H W c whose restored selves are still to come
        self.layouts: dict[tuple[Grid, int], Layout] = {}
        self.attention = attention_name(models, settings)
        self.prompts = [prompt.to(models.device, models.dtype) for prompt in prompts_of(models, settings)]
        self.restored = 0  # latents that have been through the transformer

    def pieces(self, frames: Frames) -> Iterator[tuple[list[Tensor], bool]]:
        """Frames in pieces that the autoencoder takes: 4n+1 first, then 4n, the last completed by mirroring; and
        whether it is the last."""
        frames = iter(frames)
        known: list[Tensor] = []
        piece = list(itertools.islice(frames, PIECE + 1))
        if not piece:
            raise MediaError("There is no frame to restore.")
        while piece:
            following = list(itertools.islice(frames, PIECE))
            self.waiting.extend(piece)
            full = PIECE if known else padded_length(len(piece))
            known = [*known, *piece]
            missing = full - len(piece)
            mirrored = mirror_indices(len(known), len(known) + missing)[len(known) :]
            yield [*piece, *(known[index] for index in mirrored)], not following
            # Mirroring reaches back as far as a piece is long.
            known, piece = known[-PIECE - 1 :], following

    def encode(self, pieces: Iterator[tuple[list[Tensor], bool]]) -> Iterator[tuple[Tensor, bool]]:
        """Condition latents c t h w, scaled as the transformer sees them."""
        vae, state, done = self.models.vae, CausalState(), 0
        for piece, last in pieces:
            clip = pad_to_multiple(to_clip(self.fit(piece)))
            clip = clip.transpose(0, 1)[None].to(self.models.dtype)
            moments, state = vae.encode_slice(clip, state, last)
            done += len(piece)
            self.report("encode", done)
            yield posterior(moments)[0][0].float() * vae.config.scale, last

    def restore(self, conditions: Iterator[tuple[Tensor, bool]]) -> Iterator[tuple[Tensor, bool]]:
        """Clean latents c t h w in the autoencoder's scale, each once."""
        tail, emitted = None, 0
        length = chunk_latents(self.models, self.settings, *self.size)
        for start, condition, last in overlapping(conditions, length):
            out = self.sample(condition, start)[:, emitted - start :]
            self.restored = start + condition.shape[1]
            if tail is not None:
                head = crossfade(tail.transpose(0, 1), out[:, :OVERLAP].transpose(0, 1)).transpose(0, 1)
                out = torch.cat([head, out[:, OVERLAP:]], dim=1)
            if not last:
                out, tail = out[:, :-OVERLAP], out[:, -OVERLAP:]
            emitted += out.shape[1]
            yield out / self.models.vae.config.scale, last

    def sample(self, condition: Tensor, start: int) -> Tensor:
        """Clean latent c t h w of a chunk that begins at latent `start`."""
        settings, models = self.settings, self.models
        channels, t, h, w = condition.shape
        noise = frame_noise(settings.seed, start, t, channels, h, w)[None].to(models.device)
        condition = condition[None]
        if settings.steps > 1:
            doubt = frame_noise(settings.seed + 1, start, t, channels, h, w)[None].to(models.device)
            condition = augment(condition, doubt, MULTI_STEP_NOISE)
        condition = with_mask(condition)
        passes, calls = settings.steps * len(self.prompts), itertools.count()

        def velocity(x: Tensor, u: float) -> Tensor:
            latent = torch.cat([x, condition], dim=1).to(models.dtype)
            answers = [self.velocity(latent, prompt, u, start, next(calls), passes) for prompt in self.prompts]
            return guide(*answers, settings.cfg) if len(answers) == 2 else answers[0]

        return sample(velocity, noise, settings.steps)[0]

    def velocity(self, latent: Tensor, prompt: Tensor, u: float, start: int, call: int, calls: int) -> Tensor:
        models, grid = self.models, token_grid_of(latent[0])
        new = start + grid.t - self.restored  # the rest was counted with the chunk before
        if (key := (grid, len(prompt))) not in self.layouts:
            self.layouts[key] = make_layout([grid], [len(prompt)], models.dit.config, models.device)

        def on_block(done: int, blocks: int) -> None:
            self.report("restore", LATENT_FRAMES * (self.restored + new * (call + done / blocks) / calls))

        out = models.dit(
            latent,
            [prompt],
            torch.tensor([u], device=models.device),
            layout=self.layouts[key],
            attention=self.attention,
            on_block=on_block,
        )
        return torch.stack(out).float()

    def decode(self, latents: Iterator[tuple[Tensor, bool]]) -> Iterator[Tensor]:
        """Clips c T H W in about -1..1, padding included, one latent at a time."""
        state, done = CausalState(), 0
        for block, last in latents:
            parts = block[None].to(self.models.dtype).split(1, dim=2)
            for index, latent in enumerate(parts):
                clip, state = self.models.vae.decode_slice(latent, state, last and index == len(parts) - 1)
                done += clip.shape[2]
                self.report("decode", done)
                yield clip[0]

    def finish(self, clips: Iterator[Tensor]) -> Iterator[Tensor]:
        """Frames T H W c in 0..1 without padding, in the colours of the source, with its alpha."""
        transfer = ColorTransfer(self.settings.color)
        for clip in clips:
            sources = [self.waiting.popleft() for _ in range(min(clip.shape[1], len(self.waiting)))]
            if not sources:
                return
            content = crop(clip.transpose(0, 1)[: len(sources)], *self.size)
            content = transfer(content, to_clip(self.fit(sources)))
            frames = to_frames(content)
            if sources[0].shape[-1] == 4:
                alpha = torch.stack([to_floats(upload(source[..., 3:], content.device)) for source in sources])
                frames = torch.cat([frames, upscale_alpha(alpha.permute(0, 3, 1, 2), content)], dim=1)
            yield frames.permute(0, 2, 3, 1)

    def fit(self, frames: list[Tensor]) -> Tensor:
        """Colours of source frames T 3 H W in 0..1, on the device and in the size of the result."""
        clip = torch.stack([to_floats(upload(frame[..., :3], self.models.device)) for frame in frames])
        return resize(clip.permute(0, 3, 1, 2), *self.size)

    def report(self, stage: Stage, done: float) -> None:
        self.on_progress(stage, done if self.total is None else min(done, self.total), self.total)


def chunk_latents(models: Models, settings: Settings, height: int, width: int) -> int:
    """Latent frames in one pass of the transformer on frames of this size."""
    if settings.chunk is not None:
        return (settings.chunk - 1) // LATENT_FRAMES + 1
    _, h, w = token_grid(1, *padded_size(height, width))
    per_latent = h * w * bytes_per_token(models.dit.config, models.dtype)
    return max(SHORTEST, min(LONGEST, int(MEMORY_SHARE * free_bytes(models.device) / per_latent)))


def bytes_per_token(config: DiTConfig, dtype: torch.dtype) -> int:
    """About what one token takes while it passes through a layer: the streams, queries, keys and values before and
    after they are dealt into windows, and the feed-forward's hidden layer."""
    return (16 * config.dim + 3 * config.mlp_hidden) * dtype.itemsize


def prompts_of(models: Models, settings: Settings) -> list[Tensor]:
    """The positive prompt and, for guidance, the negative one; a missing one is told before any work."""
    if settings.cfg == 1:
        return [models.prompts.positive]
    if models.prompts.negative is None:
        raise SettingError(f"{models.label} came without a negative prompt, which guidance needs; use cfg 1.")
    return [models.prompts.positive, models.prompts.negative]


def attention_name(models: Models, settings: Settings) -> str:
    """The attention that will run; one that cannot is refused before any work."""
    return resolve(settings.attention, models.device, models.dtype, models.dit.config.head_dim)


def log_plan(info: MediaInfo, models: Models, settings: Settings, height: int, width: int, chunk: int) -> None:
    """One line with everything that was decided for this clip."""
    latents = latent_grid(padded_length(info.frames), *padded_size(height, width)).t if info.frames else None
    passes = "one pass" if latents is not None and latents <= chunk else f"passes of {LATENT_FRAMES * (chunk - 1) + 1}"
    log.info(
        "%s: %s frames, %d x %d -> %d x %d, %s on %s in %s, %s, attention %s",
        info.path.name,
        "?" if info.frames is None else info.frames,
        info.width,
        info.height,
        width,
        height,
        models.label,
        models.device,
        str(models.dtype).removeprefix("torch."),
        passes,
        attention_name(models, settings),
    )
