"""The life of a clip: frames in, as many frames out.

Everything is a chain of generators, so a clip of any length flows through in pieces: read, encode, restore, decode,
correct, write. The autoencoder carries its causal state from piece to piece and so never sees a border. The transformer
works on chunks that share two latents, which are cross-faded; its noise belongs to frames, not to chunks. At a cut all
of it begins anew: nothing of a shot shows in the next.

Files are read and written by threads of their own; frames go to the device, and from it to a file, as whole numbers.

How much is computed at once is planned beforehand. Where memory runs out all the same, the rest is done by a smaller
plan, from the step that failed on.

    T H W frames as shown   c channels, 3 or 4 with alpha   b c t h w latents
"""

from __future__ import annotations

import itertools
import logging
import math
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .attention import resolve
from .checkpoints import Prompts, inspect, load_dit, load_prompts, load_vae
from .device import free_bytes
from .diffusion.conditioning import augment, frame_noise, with_mask
from .diffusion.sampler import guide, sample
from .errors import MediaError, SettingError
from .kernels import Choices, choices_for
from .memory.plan import STAGES, MemoryPlan, Stage, describe, make_plan, step_down
from .memory.stages import Work, reach, resident_bytes
from .memory.streaming import StreamedBlocks, new_state, placed
from .models.dit import DiT, DiTConfig, Layout, make_layout, token_grid
from .models.linear import E4M3, pack
from .models.linear import resolve as resolve_packing
from .models.tiling import TiledVAE
from .models.vae import CausalState, VideoVAE, posterior
from .models.vae_fast import FastOptions, FastVAE
from .models.windows import WindowConfig
from .video.alpha import upscale_alpha
from .video.chunks import OVERLAP, crossfade, overlapping
from .video.color import ColorTransfer
from .video.files import Frame, MediaInfo, Moment, open_reader, open_writer, probe
from .video.geometry import (
    LATENT_FRAMES,
    LATENT_PIXELS,
    Grid,
    Target,
    crop,
    mirror_indices,
    pad_to_multiple,
    padded_length,
    resize,
    to_clip,
    to_floats,
    to_frames,
)
from .video.shots import shots
from .video.threads import read_ahead, write_behind
from .video.transfers import download, upload

log = logging.getLogger(__name__)

# on_progress(stage, done, total): frames, of which `total` is None where nobody knows. It may raise to cancel.
OnProgress = Callable[[Stage, float, int | None], None]
Frames = Iterable[Tensor]
T = TypeVar("T")

# Frames encoded at a time. More would be a little faster and take proportionally more memory.
PIECE = LATENT_FRAMES
# Frames read before they are needed, and finished ones that wait to be written; both as whole numbers.
READ_AHEAD = WRITE_BEHIND = 2 * PIECE
# Frames in one pass of the transformer: the latents that two passes share, and one more.
SHORTEST_CHUNK = LATENT_FRAMES * OVERLAP + 1
# Multiplications between two questions whether to go on: on two cores 0.15 s in bf16, 0.3 s in fp32.
CPU_TURN = 1 << 35
# Condition noise of the multi-step SeedVR, in its published script; SeedVR2 has none.
MULTI_STEP_NOISE = 0.1


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a restoration runs on. A single stage needs no more than its own model."""

    dit: DiT | None
    vae: VideoVAE | FastVAE | TiledVAE | None
    prompts: Prompts | None  # of the transformer
    label: str  # for people
    # Where it computes, as tensors name it: "cuda:0", not "cuda". Blocks of the transformer may wait elsewhere.
    device: torch.device
    choices: Choices | None = None  # who says where our own kernels run; None: nowhere

    @property
    def dtype(self) -> torch.dtype:
        return (self.vae if self.dit is None else self.dit.txt_in.weight).dtype


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user may choose. The defaults are right for SeedVR2."""

    target: Target = Target.scale(2)
    color: str = "lab"  # one of COLOR_METHODS
    seed: int = 0
    steps: int = 1  # SeedVR2 was distilled to one
    cfg: float = 1.0  # guidance towards the positive prompt; 1 is none
    condition_noise: float | None = None  # 0..1, of the degraded latent; None: none for one step, else as published
    strength: float = 1.0  # 0..1; below 1 the enlarged source shows through
    windows: WindowConfig | None = None  # of the attention; None: as the model was trained
    attention: str = "auto"  # one of ATTENTION_NAMES
    chunk: int | None = None  # frames in one pass of the transformer; None chooses by free memory
    one_shot: bool = False  # cuts are not looked for
    memory_limit: int | None = None  # bytes on the device, weights included; None: what is free

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SettingError(f"steps is {self.steps}; at least 1 step is needed.")
        if not 1 <= self.cfg < math.inf:
            raise SettingError(f"cfg is {self.cfg:g}; guidance is a number from 1, which is none.")
        for name in ("strength", "condition_noise"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise SettingError(f"{name} is {share:g}; it is a share from 0 to 1.")
        if self.chunk is not None and self.chunk < SHORTEST_CHUNK:
            raise SettingError(f"A chunk of {self.chunk} frames is too short; use {SHORTEST_CHUNK} or more.")
        if self.memory_limit is not None and self.memory_limit <= 0:
            raise SettingError(f"The memory limit is {self.memory_limit} bytes; it has to be a number above zero.")


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


def load_models(
    dit: Path, vae: Path, device: torch.device, dtype: torch.dtype, packing: str = "auto", kernels: bool = False
) -> Models:
    """Load a transformer with its prompts, and an autoencoder.

    Args:
        packing: of the transformer's linear layers, one of PACKING_NAMES; "fp8" is faster on new GPUs and less exact.
        kernels: try our own GPU kernels and use those that agree with the library and are faster. Not the default
            until they have been proven on a GPU.

    Raises:
        CheckpointError: a file is missing, damaged or something else.
    """
    # The large file comes last, so that a mistake in the others shows at once.
    resolve_packing(packing, device, dtype)  # refused before anything is loaded
    choices = choices_for(device) if kernels else None
    options = replace(fast_options(device), choices=choices)
    prompts, autoencoder = load_prompts(dit), FastVAE(load_vae(vae, dtype, device), options)
    content = inspect(dit)
    taken = content.parameters * (E4M3 if packing == "fp8" else dtype).itemsize
    fits = device.type != "cuda" or taken <= free_bytes(device)
    if packing != "auto" and not fits:
        raise SettingError(
            f"Packing {packing!r} needs the whole transformer on {device}, where it does not fit; use 'auto'."
        )
    if device.type == "cpu" or (packing == "auto" and fits):
        transformer = pack(load_dit(dit, dtype, device), packing)
    else:
        # One part after another, so that no more than one lies on the device before it is packed. Blocks for which
        # there is no room wait on the host until the plan of a clip says which of them may stay on the device.
        transformer = load_dit(dit, dtype)
        for part in [*around_blocks(transformer), *(transformer.blocks if fits else [])]:
            pack(part.to(device), packing)
    return Models(
        dit=transformer,
        vae=autoencoder,
        prompts=prompts,
        label=content.label,
        device=autoencoder.device,
        choices=choices,
    )


def around_blocks(dit: DiT) -> list[nn.Module]:
    """The parts of a transformer that never take turns on the device, whatever its blocks do."""
    return [part for name, part in dit.named_children() if name != "blocks"]


def fast_options(device: torch.device) -> FastOptions:
    """How the autoencoder computes on this device."""
    # Shared products are measured to be faster on CPUs only; on GPUs that is still to be seen.
    return FastOptions(turn=CPU_TURN) if device.type == "cpu" else FastOptions(winograd_from=None)


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
    on_frame: Callable[[Tensor], None] | None = None,
) -> Report:
    """Restore a video, an image or a folder of numbered images, whatever its length, into another.

    Sound, subtitles, timestamps and colour tags of a video are kept. The destination appears when it is complete;
    until then, and after an error or a cancellation, it is as it was before. Where a source turns out to be damaged,
    what can be read of it is restored, and kept beside the destination under a name that says so.

    Args:
        fps: frame rate of a folder of images, which are frames of a clip here, whatever their names.
        on_frame: called with every finished frame H W c in 0..1, on the device.

    Raises:
        MediaError: the source cannot be read to its end or the destination not written.
        SettingError: a setting is impossible for this source.
    """
    start = time.perf_counter()
    info = probe(source, fps=fps)
    size = height, width = settings.target.size(info.height, info.width)
    plan = plan_clip(models, settings, size, info.frames, bytes_of_frame(info))
    log_plan(plan, models, settings, f"{info.path.name}, {info.width} x {info.height}")

    def write(frame: tuple[Callable, Moment]) -> None:
        arrived, moment = frame
        writer.write_packed(arrived(), moment)

    with (
        open_reader(info) as reader,
        open_writer(destination, info, width=width, height=height) as writer,
        closing(read_ahead(reader, READ_AHEAD)) as ahead,
        write_behind(write, WRITE_BEHIND) as put,
        told_of_memory(models, size),
        # At once, also when `on_frame` raises: whoever is told may keep the traceback, and with it the models at work.
        closing(_stream(legible := _Legible(ahead), models, settings, size, info.frames, on_progress, plan)) as pieces,
    ):
        for notice in writer.notices:
            log.warning(notice)
        for piece in pieces:
            for frame in piece:
                if on_frame:
                    on_frame(frame)
                put((download(writer.pack(frame)), legible.moments.popleft()))
        if legible.damage:
            writer.land_beside()
    if damage := legible.damage:
        of = f" of {info.frames}" if info.frames and info.frames > writer.frames else ""
        raise MediaError(f"{str(damage).removesuffix('.')}; {writer.frames}{of} frames were restored and are in "
                         f"{writer.landing}.") from damage  # fmt: skip
    return Report(
        source=Path(source),
        destination=Path(destination),
        model=models.label,
        frames=writer.frames,
        width=width,
        height=height,
        seconds=round(time.perf_counter() - start, 3),
        chunk=LATENT_FRAMES * (plan.chunk - 1) + 1,
    )


class _Legible:
    """The frames of a source up to where it turns out to be damaged, unless that is at the first."""

    def __init__(self, reader: Iterable[Frame]):
        self.reader = reader
        self.moments: deque[Moment] = deque()  # of the frames that are on their way
        self.damage: MediaError | None = None

    def __iter__(self) -> Iterator[Tensor]:
        begun = False
        try:
            for frame in self.reader:
                begun = True
                self.moments.append(frame.time)
                yield frame.pixels
        except MediaError as error:
            if not begun:
                raise
            self.damage = error


def check_file(
    source: str | Path, destination: str | Path, settings: Settings = Settings(), fps: Fraction | int = 24
) -> None:
    """Refuse what `restore_file` would refuse and what needs no models to be found out. Leaves nothing behind.

    Raises:
        MediaError: the source cannot be opened, or the destination not hold what is to come.
        SettingError: the output would have an impossible size.
    """
    info = probe(source, fps=fps)
    height, width = settings.target.size(info.height, info.width)
    open_writer(destination, info, width=width, height=height).discard()


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
    plan = plan_clip(models, settings, size, total)
    log_plan(plan, models, settings, "Frames")
    with told_of_memory(models, size):
        for piece in _stream(frames, models, settings, size, total, on_progress, plan):
            yield piece.cpu()


@torch.inference_mode()
def encode(frames: Tensor, models: Models, settings: Settings, on_progress: OnProgress | None = None) -> Tensor:
    """The first stage alone: the degraded latent c t h w, fp32 on the device, of frames T H W c in 0..1.

    It is scaled as the transformer sees it; T frames become ceil((T - 1) / 4) + 1 latents.
    """
    size = settings.target.size(*frames.shape[1:3])
    with _alone("encode", models, settings, size, len(frames), on_progress) as life:
        return torch.cat([latent for latent, _ in life.encode(life.pieces(frames))], dim=1)


@torch.inference_mode()
def restore_latent(
    condition: Tensor, models: Models, settings: Settings, on_progress: OnProgress | None = None
) -> Tensor:
    """The second stage alone: a clean latent c t h w, fp32 on the device, of a degraded one on the device."""
    size, frames = pixel_size(condition)
    with _alone("restore", models, settings, size, frames, on_progress) as life:
        latents = condition.float().split(1, dim=1)
        each = ((latent, index == len(latents) - 1) for index, latent in enumerate(latents))
        return torch.cat([latent for latent, _ in life.restore(each)], dim=1)


@torch.inference_mode()
def decode(
    latent: Tensor, models: Models, settings: Settings, on_progress: OnProgress | None = None
) -> Iterator[Tensor]:
    """The third stage alone: pieces of frames T H W 3 in 0..1 on the device, of a clean latent c t h w on the device.

    As many frames as a clip of so many latents can have, with the padding of their size.
    """
    size, frames = pixel_size(latent)
    with _alone("decode", models, settings, size, frames, on_progress) as life:
        for clip in life.decode(iter([(latent.float(), True)])):
            yield to_frames(clip.transpose(0, 1).float()).permute(0, 2, 3, 1)


def pixel_size(latent: Tensor) -> tuple[tuple[int, int], int]:
    """Height and width in pixels, and frames, of a latent c t h w."""
    _, t, h, w = latent.shape
    return (h * LATENT_PIXELS, w * LATENT_PIXELS), (t - 1) * LATENT_FRAMES + 1


@contextmanager
def _alone(
    stage: Stage, models: Models, settings: Settings, size: tuple[int, int], frames: int, on_progress: OnProgress | None
) -> Iterator[_Life]:
    """A life of which only one stage is lived."""
    plan = plan_clip(models, settings, size, frames)
    log_plan(plan, models, settings, "Frames", [stage])
    report = on_progress or (lambda stage, done, total: None)
    with told_of_memory(models, size), closing(_Life(models, settings, size, frames, report, plan, stage)) as life:
        yield life


@torch.inference_mode()
def _stream(
    frames: Frames,
    models: Models,
    settings: Settings,
    size: tuple[int, int],
    total: int | None,
    on_progress: OnProgress | None,
    plan: MemoryPlan,
) -> Iterator[Tensor]:
    done = 0
    with closing(_Life(models, settings, size, total, on_progress or (lambda stage, done, total: None), plan)) as life:
        for shot in [frames] if settings.one_shot else shots(frames):
            life.begin(done)
            for frame in life.finish(life.decode(life.restore(life.encode(life.pieces(shot))))):
                done += 1
                yield frame
    if not done:
        raise MediaError("There is no frame to restore.")


@contextmanager
def told_of_memory(models: Models, size: tuple[int, int]) -> Iterator[None]:
    """Where memory runs out for good, this is one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Who is told may keep the traceback, which would keep what the steps were working on.
        traceback.clear_frames(error.__traceback__)
        raise SettingError(
            f"Restoring at {size[1]} x {size[0]} takes more memory than {models.device} has free; choose a smaller "
            "size or a shorter chunk, or close other programs."
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; on a CPU, and in CUDA's own libraries, only the message tells."""
    says = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in str(error) for part in says)


class _Life:
    """A clip on its way through the models, shot by shot, and what its stages have to know of each other."""

    def __init__(
        self,
        models: Models,
        settings: Settings,
        size: tuple[int, int],
        total: int | None,
        on_progress: OnProgress,
        plan: MemoryPlan,
        first: Stage = "encode",
    ):
        self.models, self.settings, self.size, self.total, self.on_progress = models, settings, size, total, on_progress
        self.layouts: dict[tuple[Grid, int], Layout] = {}
        self.reported: tuple[Stage, float, int | None] = first, 0, total
        self.halves: list[_Slices] = []
        if models.dit:
            self.prompts = [prompt.to(models.device, models.dtype) for prompt in prompts_of(models, settings)]
        if models.vae:
            looks_back = reach(models.vae.config)
            self.encoder = _Slices(self, "encode", models.vae.encode_slice, self.clip_of, looks_back[0])
            self.decoder = _Slices(self, "decode", models.vae.decode_slice, self.latent_of, looks_back[1])
            self.halves = [self.encoder, self.decoder]
        self.stepped_down = False
        self.blocks: StreamedBlocks | None = None
        self.adopt(plan)
        self.begin(0)

    def begin(self, before: int) -> None:
        """A shot begins, after so many frames: what came before it is forgotten."""
        self.before = before
        self.waiting: deque[Tensor] = deque()  # source frames H W c whose restored selves are still to come
        self.transfer = ColorTransfer(self.settings.color)
        self.restored = 0  # latents that have been through the transformer
        for half in self.halves:
            half.begin()

    def adopt(self, plan: MemoryPlan) -> None:
        """Go on by this plan."""
        self.leave_blocks()
        self.plan = plan
        if isinstance(self.models.vae, FastVAE):
            self.models.vae.take(*plan.portions)
        if self.models.dit and self.models.device.type == "cuda":
            self.blocks = StreamedBlocks(self.models.dit.blocks, self.models.device, plan.streamed)
        for half in self.halves:
            half.state = placed(half.state, plan.state, self.models.device)

    def leave_blocks(self) -> None:
        """Leave the transformer as a whole."""
        if self.blocks is not None:
            self.blocks.close()

    def close(self) -> None:
        """Let go of everything."""
        self.leave_blocks()
        # They refer to each other, so models and states would wait for Python's next collection.
        for half in self.halves:
            half.close()

    def attempt(self, stage: Stage, step: Callable[[], T], recover: Callable[[], None] = lambda: None) -> T:
        """Take a step. If memory runs out, for the first time, take it again by a smaller plan.

        Args:
            recover: puts back what a step has used up that failed.
        """
        try:
            return step()
        except (RuntimeError, MemoryError) as error:
            if self.stepped_down or not is_out_of_memory(error):
                raise
            smaller = step_down(self.plan, stage, available_bytes(self.models, self.plan))
            if smaller is None:
                raise
            failure = str(error).partition("\n")[0]
        # Out here, because an exception that is being handled keeps alive what the step has made.
        self.stepped_down = True
        log.warning("Memory ran out (%s); going on with a smaller plan: %s", failure, describe(smaller))
        self.adopt(smaller)
        recover()
        return step()

    def pieces(self, frames: Frames) -> Iterator[tuple[list[Tensor], bool]]:
        """Frames in pieces that the autoencoder takes: 4n+1 first, then 4n, the last completed by mirroring; and
        whether it is the last."""
        frames = iter(frames)
        known: list[Tensor] = []
        piece = list(itertools.islice(frames, PIECE + 1))
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
        done = 0
        for piece, last in pieces:
            moments = self.encoder(piece, last)
            done += len(piece)
            self.report("encode", done)
            yield posterior(moments)[0][0].float() * self.models.vae.config.scale, last

    def clip_of(self, piece: list[Tensor]) -> Tensor:
        """Source frames as the autoencoder sees them, b c T H W."""
        clip = pad_to_multiple(to_clip(self.fit(piece)))
        return clip.transpose(0, 1)[None].to(self.models.vae.dtype)

    def latent_of(self, latent: Tensor) -> Tensor:
        """A latent c t h w as the autoencoder sees it."""
        return latent[None].to(self.models.vae.dtype)

    def restore(self, conditions: Iterator[tuple[Tensor, bool]]) -> Iterator[tuple[Tensor, bool]]:
        """Clean latents c t h w, scaled as the conditions are, each once."""

        def sample(condition: Tensor, start: int) -> Tensor:
            return self.attempt("restore", lambda: self.sample_in_chunks(condition, start))

        return self.blended(overlapping(conditions, self.length), sample)

    @property
    def length(self) -> int:
        """Latents in a pass of the transformer. A file may hold more frames than it says, even than a single one."""
        return max(self.plan.chunk, OVERLAP + 1)

    def blended(
        self, chunks: Iterator[tuple[int, Tensor, bool]], sample: Callable[[Tensor, int], Tensor]
    ) -> Iterator[tuple[Tensor, bool]]:
        """What becomes of chunks that overlap, cross-faded, each latent once."""
        tail = emitted = None
        for start, condition, last in chunks:
            emitted = start if emitted is None else emitted
            out = sample(condition, start)[:, emitted - start :]
            if tail is not None:
                head = crossfade(tail.transpose(0, 1), out[:, :OVERLAP].transpose(0, 1)).transpose(0, 1)
                out = torch.cat([head, out[:, OVERLAP:]], dim=1)
            if not last:
                out, tail = out[:, :-OVERLAP], out[:, -OVERLAP:]
            emitted += out.shape[1]
            yield out, last

    def sample_in_chunks(self, condition: Tensor, start: int) -> Tensor:
        """`sample`, in shorter chunks if the plan has become smaller than this one."""
        if condition.shape[1] <= self.length:
            return self.sample(condition, start)
        chunks = overlapping([(condition, True)], self.length)
        moved = ((start + first, chunk, last) for first, chunk, last in chunks)
        return torch.cat([out for out, _ in self.blended(moved, self.sample)], dim=1)

    def sample(self, condition: Tensor, start: int) -> Tensor:
        """Clean latent c t h w of a chunk that begins at latent `start`."""
        settings, models = self.settings, self.models
        channels, t, h, w = condition.shape
        noise = frame_noise(settings.seed, start, t, channels, h, w)[None].to(models.device)
        condition = condition[None]
        if level := condition_noise(settings):
            doubt = frame_noise(settings.seed + 1, start, t, channels, h, w)[None].to(models.device)
            condition = augment(condition, doubt, level)
        condition = with_mask(condition)
        passes, calls = settings.steps * len(self.prompts), itertools.count()

        def velocity(x: Tensor, u: float) -> Tensor:
            latent = torch.cat([x, condition], dim=1).to(models.dtype)
            answers = [self.velocity(latent, prompt, u, start, next(calls), passes) for prompt in self.prompts]
            return guide(*answers, settings.cfg) if len(answers) == 2 else answers[0]

        clean = sample(velocity, noise, settings.steps)[0]
        self.restored = max(self.restored, start + t)
        return clean

    def velocity(self, latent: Tensor, prompt: Tensor, u: float, start: int, call: int, calls: int) -> Tensor:
        models, grid = self.models, token_grid(latent[0])
        new = start + grid.t - self.restored  # the rest was counted with the chunk before
        if (key := (grid, len(prompt))) not in self.layouts:
            self.layouts[key] = make_layout([grid], [len(prompt)], config_of(models, self.settings), models.device)

        def on_block(done: int, blocks: int) -> None:
            self.report("restore", LATENT_FRAMES * (self.restored + new * (call + done / blocks) / calls))

        out = models.dit(
            latent,
            [prompt],
            torch.tensor([u], device=models.device),
            layout=self.layouts[key],
            # As asked for and not as resolved: only an automatic one may be our kernel.
            attention=self.settings.attention,
            rows=self.plan.rows,
            blocks=self.blocks,
            choices=models.choices,
            on_block=on_block,
        )
        return torch.stack(out).float()

    def decode(self, latents: Iterator[tuple[Tensor, bool]]) -> Iterator[Tensor]:
        """Clips c T H W in about -1..1, padding included, one latent at a time."""
        done = 0
        for block, last in latents:
            parts = (block / self.models.vae.config.scale).split(1, dim=1)
            for index, latent in enumerate(parts):
                clip = self.decoder(latent, last and index == len(parts) - 1)
                done += clip.shape[2]
                self.report("decode", done)
                yield clip[0]

    def finish(self, clips: Iterator[Tensor]) -> Iterator[Tensor]:
        """Frames 1 H W c in 0..1 without padding, in the colours of the source, with its alpha."""
        for clip in clips:
            for content in crop(clip.transpose(0, 1), *self.size).split(1):
                if not self.waiting:
                    return
                source = self.waiting.popleft()
                style = to_clip(self.fit([source]))
                content = torch.lerp(style, self.transfer(content, style), self.settings.strength)
                frame = to_frames(content)
                if source.shape[-1] == 4:
                    alpha = to_floats(upload(source[None, ..., 3:], content.device))
                    frame = torch.cat([frame, upscale_alpha(alpha.permute(0, 3, 1, 2), content)], dim=1)
                self.repeat()
                yield frame.permute(0, 2, 3, 1)

    def fit(self, frames: list[Tensor]) -> Tensor:
        """Colours of source frames T 3 H W in 0..1, on the device and in the size of the result."""
        clip = torch.stack([to_floats(upload(frame[..., :3], self.models.device)) for frame in frames])
        return resize(clip.permute(0, 3, 1, 2), *self.size)

    def report(self, stage: Stage, done: float) -> None:
        """So much of this shot has been through a stage."""
        done += self.before
        self.reported = stage, done if self.total is None else min(done, self.total), self.total
        self.repeat()

    def repeat(self) -> None:
        """Say once more how far all is, for a caller who wants to cancel."""
        self.on_progress(*self.reported)


class _Slices:
    """One half of the autoencoder on its way through a clip, slice by slice.

    A slice uses up the causal state; after one that failed, the state is made again from the slices before, as far back
    as they have influence.
    """

    def __init__(
        self, life: _Life, stage: Stage, step: Callable, prepare: Callable[[Any], Tensor], looks_back: int
    ):
        """`prepare` makes the autoencoder's input of a slice's item: a list of frames, or a latent."""
        self.life, self.stage, self.step, self.prepare = life, stage, step, prepare
        self.state = CausalState()
        # One more, for the lone frame with which a shot begins.
        self.past: deque[Any] = deque(maxlen=looks_back + 1)

    def begin(self) -> None:
        """Forget what came before."""
        self.state = new_state(self.life.plan.state, self.life.models.device)
        self.past.clear()

    def __call__(self, item: Any, last: bool) -> Tensor:
        with self.life.models.vae.watched(self.life.repeat):
            out = self.life.attempt(self.stage, lambda: self.run(item, last), self.recover)
        self.past.append(item)
        return out

    def close(self) -> None:
        del self.life, self.prepare, self.step, self.state

    def run(self, item: Any, last: bool) -> Tensor:
        out, self.state = self.step(self.prepare(item), self.state, last)
        return out

    def recover(self) -> None:
        self.state = new_state(self.life.plan.state, self.life.models.device)
        for index, item in enumerate(self.past):
            frames_alone = index == 0 and isinstance(item, list) and len(item) % LATENT_FRAMES == 0
            self.run(item[-1:] if frames_alone else item, last=False)


def plan_clip(
    models: Models,
    settings: Settings,
    size: tuple[int, int],
    frames: int | None,
    source: int = 0,
    device: torch.device | None = None,
    budget: int | None = None,
) -> MemoryPlan:
    """How to compute a clip in the memory that there is.

    Args:
        size: height and width of the result.
        source: bytes of a frame as it is read.
        device: where it will be computed, if the models are not there yet.
        budget: bytes that may be used there, weights included; None: what is free.

    Raises:
        SettingError: it does not fit, by whatever way.
    """
    device = device or models.device
    work = Work(
        vae=models.vae,
        dit=models.dit,
        device=device.type,
        height=size[0],
        width=size[1],
        frames=frames,
        chunk=None if settings.chunk is None else (settings.chunk - 1) // LATENT_FRAMES + 1,
        source=source if device.type == "cpu" else 0,
    )
    if budget is None:
        budget = free_bytes(device) + resident_bytes(work, device)
    return make_plan(work, budget if settings.memory_limit is None else min(budget, settings.memory_limit))


def available_bytes(models: Models, plan: MemoryPlan) -> int:
    """What could be had now, what is in use included."""
    if models.device.type == "cuda":
        return free_bytes(models.device) + torch.cuda.memory_allocated(models.device)
    return free_bytes(models.device) + plan.weights


def bytes_of_frame(info: MediaInfo) -> int:
    """What a frame takes as it is read."""
    return info.height * info.width * (4 if info.has_alpha else 3) * (1 if info.bit_depth <= 8 else 2)


def prompts_of(models: Models, settings: Settings) -> list[Tensor]:
    """The positive prompt and, for guidance, the negative one; a missing one is told before any work."""
    if settings.cfg == 1:
        return [models.prompts.positive]
    if models.prompts.negative is None:
        raise SettingError(f"{models.label} came without a negative prompt, which guidance needs; use cfg 1.")
    return [models.prompts.positive, models.prompts.negative]


def condition_noise(settings: Settings) -> float:
    """Share of noise in the degraded latent."""
    if settings.condition_noise is not None:
        return settings.condition_noise
    return MULTI_STEP_NOISE if settings.steps > 1 else 0.0


def config_of(models: Models, settings: Settings) -> DiTConfig:
    """The transformer's config, with the windows of this run."""
    config = models.dit.config
    return config if settings.windows is None else replace(config, windows=settings.windows)


def attention_name(models: Models, settings: Settings) -> str:
    """The attention that will run; one that cannot is refused before any work."""
    return resolve(settings.attention, models.device, models.dtype, models.dit.config.head_dim)


def log_plan(
    plan: MemoryPlan, models: Models, settings: Settings, source: str, stages: Sequence[Stage] = STAGES
) -> None:
    """One line with everything that was decided for this clip, of which these stages will run."""
    work = plan.work
    log.info(
        "%s: %s -> %d x %d, %s on %s in %s, %s%s",
        source,
        "? frames" if work.frames is None else "1 frame" if work.frames == 1 else f"{work.frames} frames",
        work.width,
        work.height,
        models.label,
        models.device,
        str(models.dtype).removeprefix("torch."),
        f"attention {attention_name(models, settings)}, " if models.dit else "",
        describe(plan, stages),
    )
