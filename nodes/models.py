"""Models in ComfyUI's care: which there are, where they lie, and how they get to the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from ..seedvr2_core.checkpoints import CheckpointInfo, Prompts, inspect, load_dit, load_prompts, load_vae
from ..seedvr2_core.checkpoints.download import download
from ..seedvr2_core.checkpoints.folders import NANO_DIT, NANO_VAE
from ..seedvr2_core.checkpoints.published import MODELS
from ..seedvr2_core.device import DTYPES, pick_dtype
from ..seedvr2_core.errors import CheckpointError, SettingError
from ..seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B
from ..seedvr2_core.models.linear import pack
from ..seedvr2_core.models.vae_fast import FastVAE
from ..seedvr2_core.pipeline import Models, Settings, fast_options, plan_clip
from . import host
from .host import io

AUTO, NANO = "auto", "nano"
PUBLISHED_VAE = "vae"
PRECISIONS = (AUTO, *DTYPES)
DITS = tuple(name for name in MODELS if name != PUBLISHED_VAE)
MULTI_STEP = {model.file for model in MODELS.values() if not model.one_step}
# on_progress(stage, done, total), in bytes.
Fetching = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A transformer in ComfyUI's care, and what runs with it."""

    patcher: host.ModelPatcher
    prompts: Prompts
    dtype: torch.dtype
    attention: str
    label: str  # for people
    path: Path


@dataclass(frozen=True, eq=False)
class LoadedVAE:
    """An autoencoder in ComfyUI's care."""

    patcher: host.ModelPatcher
    path: Path


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
    return LoadedVAE(host.managed(load_vae(path, dtype, host.offload_device())), path)


def ready(
    model: LoadedModel | None, vae: LoadedVAE | None, settings: Settings, size: tuple[int, int], frames: int
) -> Models:
    """Models on the device, with room beside them for a clip of this size; a single stage needs but one.

    Raises:
        SettingError: there is not enough memory, whatever ComfyUI could put elsewhere.
    """
    if stays():
        return _models(model, vae)
    plan = plan_clip(_models(model, vae), settings, size, frames, device=host.device(), budget=host.free_bytes())
    loaded = [part for part in (model, vae) if part is not None]
    # Blocks that take turns on the device are not ComfyUI's to move.
    staying = [part.patcher for part in loaded if part is vae or not plan.streamed]
    host.load(staying, plan.peak - plan.weights)
    return _models(model, vae)


def _models(model: LoadedModel | None, vae: LoadedVAE | None) -> Models:
    """As they lie just now."""
    return Models(
        dit=model and model.patcher.model,
        vae=vae and FastVAE(vae.patcher.model, fast_options(host.device())),
        prompts=model and model.prompts,
        label=model.label if model else vae.path.stem,
    )


def find_dit(name: str, on_progress: Fetching | None = None) -> Path:
    """File of a transformer; a published one that is missing is fetched.

    Raises:
        CheckpointError: there is no such file, or it cannot be fetched.
    """
    if name == NANO:
        return NANO_DIT
    if name == AUTO:
        return best_dit()
    return fetched(name, on_progress) if name in DITS else local_file(name)


def find_vae(name: str, on_progress: Fetching | None = None) -> Path:
    """File of an autoencoder; the published one is fetched if it is missing. Raises as `find_dit`."""
    if name == NANO:
        return NANO_VAE
    if name == AUTO:
        return published_file(PUBLISHED_VAE) or NANO_VAE
    return fetched(name, on_progress) if name == PUBLISHED_VAE else local_file(name)


def vae_of(model: LoadedModel, on_progress: Fetching | None = None) -> Path:
    """File of the autoencoder that belongs to a transformer: inside its file, beside it, or the published one."""
    if model.path == NANO_DIT:
        return NANO_VAE
    beside = (model.path, *sorted(model.path.parent.glob("*.safetensors")))
    found = next((path for path in beside if holds(path, "vae")), None)
    return found or fetched(PUBLISHED_VAE, on_progress)


def best_dit() -> Path:
    """The 7B if it is on this machine, else the 3B, else nano."""
    local = [(info.config, path) for _, path in host.model_files() if (info := known(path)) and not info.why_not]
    one_step = [(config, path) for config, path in local if path.name not in MULTI_STEP]
    return next((path for best in (SEEDVR2_7B, SEEDVR2_3B) for config, path in one_step if config == best), NANO_DIT)


def local_names(kind: str) -> list[str]:
    """Files of users that hold a loadable model of this kind, by content; published ones have names of their own."""
    published = {model.file for model in MODELS.values()}
    return sorted({name for name, path in host.model_files() if path.name not in published and holds(path, kind)})


def local_file(name: str) -> Path:
    path = next((path for known_name, path in host.model_files() if known_name == name), None)
    if path is None:
        raise CheckpointError(
            f"There is no file {name} in {host.own_directory()} or ComfyUI's other model folders; put it there, or "
            f"choose {NANO} or a published model."
        )
    return path


def published_file(name: str) -> Path | None:
    """Where a published model lies on this machine."""
    return next((path for _, path in host.model_files() if path.name == MODELS[name].file), None)


def fetched(name: str, on_progress: Fetching | None) -> Path:
    return published_file(name) or download(name, host.own_directory(), on_progress)[0]


def holds(path: Path, kind: str) -> bool:
    info = known(path)
    return info is not None and not info.why_not and any(part.kind == kind for part in info.parts)


def known(path: Path) -> CheckpointInfo | None:
    """What a file holds, None if it is not ours; asked again only when the file has changed."""
    status = path.stat()
    return _inspected(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _inspected(path: Path, size: int, changed: int) -> CheckpointInfo | None:
    try:
        return inspect(path)
    except CheckpointError:
        return None


def stamp(kind: str, name: str) -> object:
    """Changes when another file would be loaded, or the file itself has changed."""
    published = MODELS.get(PUBLISHED_VAE if kind == "vae" else name)
    if published and name not in (AUTO, NANO):
        # The same whether it has been fetched yet or not.
        return name
    path = find_dit(name) if kind == "dit" else find_vae(name)
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
