"""Models in ComfyUI's care: how they are loaded, kept, and get to the device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from ..seedvr2_core.checkpoints import Prompts, inspect, load_dit, load_prompts, load_vae
from ..seedvr2_core.device import DTYPES, pick_dtype
from ..seedvr2_core.errors import SettingError
from ..seedvr2_core.loading import Models, around_blocks, fast_options
from ..seedvr2_core.memory.plan import USABLE, MemoryPlan
from ..seedvr2_core.models.dit import DiT
from ..seedvr2_core.models.linear import pack
from ..seedvr2_core.models.tiling import TiledVAE
from ..seedvr2_core.models.vae_fast import FastVAE
from ..seedvr2_core.planning import plan_clip
from ..seedvr2_core.settings import Settings
from . import host
from .files import AUTO, best_dit, file_stamp, vae_of
from .host import io
from .progress import Fetching

PRECISIONS = (AUTO, *DTYPES)
# More bytes than any device has.
EVERYTHING = 1e30


class Tiles(NamedTuple):
    """How frames are tiled, in pixels, see `TiledVAE`."""

    tile: int
    overlap: int


@dataclass(frozen=True, eq=False)
class LoadedVAE:
    """An autoencoder in ComfyUI's care."""

    patcher: host.ModelPatcher
    path: Path


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A transformer in ComfyUI's care, and what runs with it."""

    patcher: host.ModelPatcher
    prompts: Prompts
    dtype: torch.dtype
    attention: str
    label: str  # for people
    path: Path
    # The autoencoder that belongs to it, by what its file was, once it has been needed: it lives as long.
    own_vae: dict[object, LoadedVAE] = field(default_factory=dict)


ModelSocket = io.Custom("SVR2_MODEL")
VAESocket = io.Custom("SVR2_VAE")


def load_model(path: Path, precision: str = AUTO, attention: str = AUTO, compile: bool = False) -> LoadedModel:
    """Load a transformer into ComfyUI's care.

    Raises:
        CheckpointError: the file is damaged or something else.
        SettingError: it shall be compiled, which this machine cannot do.
    """
    if compile:
        check_compiler()
    dtype = pick_dtype(precision, host.device())
    prompts = load_prompts(path)
    dit = load_dit(path, dtype, host.offload_device())
    if compile:
        for block in dit.blocks:
            block.compile()
    elif stays():
        pack(dit)
    return LoadedModel(host.managed(dit), prompts, dtype, attention, inspect(path).label, path)


def check_compiler() -> None:
    """Raises SettingError where torch cannot compile for the device, before a large model is loaded for it."""
    try:
        torch.compile(lambda x: x * x)(torch.ones(8, device=host.device()))
    except (RuntimeError, ImportError, OSError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SettingError(
            f"torch.compile cannot run on this machine ({reason.strip().rstrip('.')}); turn off `compile`, or install "
            "a C++ compiler, and Triton for a GPU."
        ) from error


def stays() -> bool:
    """Whether models stay where they were loaded and may be packed for it; elsewhere ComfyUI moves them as it likes."""
    return host.device().type == "cpu"


def load_autoencoder(path: Path, dtype: torch.dtype) -> LoadedVAE:
    """Load an autoencoder into ComfyUI's care."""
    plain = load_vae(path, dtype, host.offload_device())
    return LoadedVAE(host.managed(FastVAE(plain, fast_options(host.device()))), path)


def best(
    model: LoadedModel | None, vae: LoadedVAE | None, on_progress: Fetching | None = None
) -> tuple[LoadedModel, LoadedVAE]:
    """Both models; in place of what was not given the best that is there, fetched if it must be.

    Raises:
        CheckpointError: a file is damaged, or cannot be fetched.
    """
    model = model or _best(*file_stamp(best_dit()))
    if vae is None:
        vae = own_autoencoder(model, on_progress)
    return model, vae


@lru_cache(maxsize=1)
def _best(path: str, size: int, changed: int) -> LoadedModel:
    """The best model, loaded. No node's output keeps it from picture to picture and from run to run."""
    return load_model(Path(path))


def _let_go(model: weakref.ref[LoadedModel]) -> None:
    """ComfyUI needs memory for something else, or was told to free all of it."""
    # It is going through its list of models just now, from which one would vanish that dies. In a cycle it lives until
    # Python collects such, which ComfyUI has it do after it has freed memory.
    cycle: list[object] = [model()]
    cycle.append(cycle)
    _best.cache_clear()


def own_autoencoder(model: LoadedModel, on_progress: Fetching | None = None) -> LoadedVAE:
    """The autoencoder that belongs to a transformer, loaded when it is first needed."""
    path = vae_of(model.path, on_progress)
    key = file_stamp(path)
    if key not in model.own_vae:
        model.own_vae.clear()
        model.own_vae[key] = vae = load_autoencoder(path, model.dtype)
        # On a CPU ComfyUI has only this one of the two, since a packed transformer cannot be moved.
        host.on_unload(vae.patcher, partial(_let_go, weakref.ref(model)))
    return model.own_vae[key]


@contextmanager
def ready(
    model: LoadedModel | None,
    vae: LoadedVAE | None,
    settings: Settings,
    size: tuple[int, int],
    frames: int | None,
    tiles: Tiles | None = None,
) -> Iterator[tuple[Models, MemoryPlan | None]]:
    """Models on the device, with room beside them for a clip of this size; a single stage needs but one.

    With them comes the plan that they are there for; None where it does not matter what else there is.

    A transformer that does not fit is moved here, as far as a plan wants it on the device, and goes back afterwards:
    its blocks take turns, of which ComfyUI knows nothing. To ComfyUI that is memory at work.

    Raises:
        SettingError: there is not enough memory, whatever ComfyUI could put elsewhere.
    """
    parts = [part.patcher for part in (model, vae) if part is not None]
    models = _models(model, vae, tiles)
    if stays():
        host.load([vae.patcher] if vae else [], 0)
        yield models, None
        return
    plan = plan_clip(models, settings, size, frames, budget=host.free_bytes(parts))
    if plan.streamed:
        parts.remove(model.patcher)
        host.unload(model.patcher)
    # The libraries take a part that no plan foresees.
    host.load(parts, math.ceil(plan.peak / USABLE) - sum(patcher.model_size() for patcher in parts))
    try:
        if plan.streamed:
            for part in around_blocks(model.patcher.model):
                part.to(host.device())
        yield models, plan
    finally:
        # They also take turns after memory has run out.
        if model and (plan.streamed or not lies_on(model.patcher.model, host.device())):
            host.unload(model.patcher)
            model.patcher.model.to(host.offload_device())


def lies_on(dit: DiT, device: torch.device) -> bool:
    """Whether all of a transformer is there."""
    return all(parameter.device == device for parameter in dit.parameters())


def _models(model: LoadedModel | None, vae: LoadedVAE | None, tiles: Tiles | None) -> Models:
    parts = [part.patcher for part in (model, vae) if part is not None]
    autoencoder = vae and vae.patcher.model
    return Models(
        dit=model and model.patcher.model,
        vae=TiledVAE(autoencoder, *tiles) if tiles else autoencoder,
        prompts=model and model.prompts,
        label=model.label if model else vae.path.stem,
        device=host.device(),
        files=tuple(each.path for each in (model, vae) if each is not None),
        make_room=partial(host.make_room, parts, EVERYTHING),
    )
