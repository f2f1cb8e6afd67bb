"""A clip on its way through the models: read, encode, restore, decode, correct, each a generator.

The autoencoder carries its causal state from piece to piece and so never sees a border. The transformer works on chunks
that share two latents, which are cross-faded; its noise belongs to frames, not to chunks. At a cut all of it begins
anew: nothing of a shot shows in the next. Where memory runs out although all was planned, the rest is done by a smaller
plan, from the step that failed on.

    T H W frames as shown   c channels, 3 or 4 with alpha   b c t h w latents
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .device import is_out_of_memory
from .diffusion.conditioning import augment, frame_noise, with_mask
from .diffusion.sampler import guide, sample
from .errors import SettingError
from .loading import Models
from .memory.plan import STAGES, MemoryPlan, Stage, describe, step_down
from .memory.stages import reach
from .memory.streaming import StreamedBlocks, new_state, placed
from .models.dit import DiTConfig, Layout, make_layout, token_grid
from .models.vae import CausalState, posterior
from .models.vae_fast import FastVAE
from .planning import available_bytes, bytes_of_others
from .settings import Settings
from .video.alpha import upscale_alpha
from .video.chunks import OVERLAP, crossfade, overlapping
from .video.color import ColorTransfer
from .video.geometry import (
    LATENT_FRAMES,
    Grid,
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
)
from .video.transfers import upload

log = logging.getLogger(__name__)

# on_progress(stage, done, total): frames, of which `total` is None where nobody knows. It may raise to cancel.
OnProgress = Callable[[Stage, float, int | None], None]
Frames = Iterable[Tensor]
T = TypeVar("T")

# Frames encoded at a time. More would be a little faster and take proportionally more memory.
PIECE = LATENT_FRAMES


@dataclass(frozen=True)
class Waypoint:
    """A place between two frames from which the restoration of a clip can go on."""

    frames: int  # that are restored
    shot: int  # number of the frame with which their last shot began
    length: int  # latents in a pass of the transformer, in that shot
    color: dict[str, Any]  # state of the colour transfer


class Life:
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
        self.halves: list[Slices] = []
        if models.dit:
            self.prompts = [prompt.to(models.device, models.dtype) for prompt in prompts_of(models, settings)]
        if models.vae:
            looks_back = reach(models.vae.config)
            self.encoder = Slices(self, "encode", models.vae.encode_slice, self.clip_of, looks_back[0])
            self.decoder = Slices(self, "decode", models.vae.decode_slice, self.latent_of, looks_back[1])
            self.halves = [self.encoder, self.decoder]
        self.stepped_down = False
        self.others = bytes_of_others(models)
        self.blocks: StreamedBlocks | None = None
        self.adopt(plan)
        self.begin(0)

    def begin(self, before: int, waypoint: Waypoint | None = None) -> None:
        """A shot begins, after so many frames: what came before it is forgotten.

        Args:
            waypoint: a place in this shot. What lies before it comes as NaN out of every stage and does not leave the
                last, but for what the rest depends on, which is computed again.
        """
        self.before = before
        self.waiting: deque[Tensor] = deque()  # source frames H W c whose restored selves are still to come
        self.transfer = ColorTransfer(self.settings.color)
        self.restored = 0  # latents that have been through the transformer
        self.chunk = waypoint.length if waypoint else self.length
        self.left = 0  # frames that have been through all
        self.known = waypoint.frames - before if waypoint else 0  # frames of which nothing is wanted any more
        for half in self.halves:
            half.begin()
        # The first latents that are needed: to decode from, and to encode so that those can be restored.
        self.decoded_from = self.encoded_from = 0
        if waypoint:
            self.transfer.resume(waypoint.color)
            first = math.ceil(self.known / LATENT_FRAMES)
            self.decoded_from = max(0, first - self.decoder.looks_back)
            self.encoded_from = max(0, self.decoded_from - self.chunk - self.encoder.looks_back)

    @property
    def waypoint(self) -> Waypoint:
        """Behind the frame that has left last."""
        return Waypoint(self.before + self.left, self.before, self.chunk, self.transfer.state)

    def pass_by(self, done: int) -> None:
        """So many frames of the clip, of whole shots, need nothing done."""
        for stage in STAGES:
            self.reported = stage, done, self.total
            self.repeat()

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
            before = bytes_of_others(self.models)
            self.models.make_room()
            self.others -= before - bytes_of_others(self.models)
            smaller = step_down(self.plan, stage, available_bytes(self.models, self.plan, self.others))
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
        done = number = 0
        for piece, last in pieces:
            before, done = number, done + len(piece)
            number = (done - 1) // LATENT_FRAMES + 1
            if number <= self.encoded_from:
                latent = self.unknown_latents(number - before)
            else:
                latent = posterior(self.encoder(piece, last))[0][0].float() * self.models.vae.config.scale
            self.report("encode", done)
            yield latent, last

    def unknown_latents(self, count: int) -> Tensor:
        """In place of those that nothing depends on any more, c t h w."""
        _, rows, columns = latent_grid(1, *padded_size(*self.size))
        shape = self.models.vae.config.latent_channels, count, rows, columns
        return torch.full(shape, math.nan, device=self.models.device)

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
            if start + condition.shape[1] <= self.decoded_from:
                self.restored = start + condition.shape[1]
                self.report("restore", LATENT_FRAMES * self.restored)
                return torch.full_like(condition, math.nan)
            return self.attempt("restore", lambda: self.sample_in_chunks(condition, start))

        return self.blended(overlapping(conditions, self.chunk), sample)

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
        if level := settings.noise_level:
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
        done = number = 0
        for block, last in latents:
            parts = (block / self.models.vae.config.scale).split(1, dim=1)
            for index, latent in enumerate(parts):
                frames = LATENT_FRAMES if number else 1
                if number >= self.decoded_from:
                    clip = self.decoder(latent, last and index == len(parts) - 1)[0]
                done, number = done + frames, number + 1
                self.report("decode", done)
                if done > self.known:
                    yield clip
                else:
                    # Frames that take no memory.
                    yield block.new_full((), math.nan).expand(3, frames, *self.size)

    def finish(self, clips: Iterator[Tensor]) -> Iterator[Tensor]:
        """Frames 1 H W c in 0..1 without padding, in the colours of the source, with its alpha."""
        for clip in clips:
            for content in crop(clip.transpose(0, 1), *self.size).split(1):
                if not self.waiting:
                    return
                source = self.waiting.popleft()
                self.left += 1
                if self.left <= self.known:
                    continue
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


class Slices:
    """One half of the autoencoder on its way through a clip, slice by slice.

    A slice uses up the causal state; after one that failed, the state is made again from the slices before, as far back
    as they have influence.
    """

    def __init__(
        self, life: Life, stage: Stage, step: Callable, prepare: Callable[[Any], Tensor], looks_back: int
    ):
        """`prepare` makes the autoencoder's input of a slice's item: a list of frames, or a latent."""
        self.life, self.stage, self.step, self.prepare = life, stage, step, prepare
        self.state, self.fresh = CausalState(), True
        # One more, for the lone frame with which a shot begins.
        self.looks_back = looks_back + 1
        self.past: deque[Any] = deque(maxlen=self.looks_back)

    def begin(self) -> None:
        """Forget what came before."""
        self.renew()
        self.past.clear()

    def renew(self) -> None:
        self.state, self.fresh = new_state(self.life.plan.state, self.life.models.device), True

    def __call__(self, item: Any, last: bool) -> Tensor:
        with self.life.models.vae.watched(self.life.repeat):
            out = self.life.attempt(self.stage, lambda: self.run(item, last), self.recover)
        self.past.append(item)
        return out

    def close(self) -> None:
        del self.life, self.prepare, self.step, self.state

    def run(self, item: Any, last: bool) -> Tensor:
        # Amid a shot as well, the autoencoder begins with a lone frame.
        begins_amid = self.fresh and isinstance(item, list) and len(item) % LATENT_FRAMES == 0
        out, self.state = self.step(self.prepare(item[-1:] if begins_amid else item), self.state, last)
        self.fresh = False
        return out

    def recover(self) -> None:
        self.renew()
        for item in self.past:
            self.run(item, last=False)


def prompts_of(models: Models, settings: Settings) -> list[Tensor]:
    """The positive prompt and, for guidance, the negative one; a missing one is told before any work."""
    if settings.cfg == 1:
        return [models.prompts.positive]
    if models.prompts.negative is None:
        raise SettingError(f"{models.label} came without a negative prompt, which guidance needs; use cfg 1.")
    return [models.prompts.positive, models.prompts.negative]


def config_of(models: Models, settings: Settings) -> DiTConfig:
    """The transformer's config, with the windows of this run."""
    config = models.dit.config
    return config if settings.windows is None else replace(config, windows=settings.windows)
