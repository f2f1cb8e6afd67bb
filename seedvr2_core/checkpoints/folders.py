"""Where checkpoints lie on this machine, and which of those found is the best to use."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import CheckpointError
from ..models.dit import SEEDVR2_3B, SEEDVR2_7B
from ..models.vae import SEEDVR2_VAE
from .checkpoint import CheckpointInfo, inspect
from .published import MODELS

log = logging.getLogger(__name__)

EXTENSIONS = (".safetensors", ".pth", ".pt", ".ckpt", ".gguf")
# Below a ComfyUI: the folder of the widespread plugin first, then those of ComfyUI's own loaders.
COMFYUI_FOLDERS = ("SEEDVR2", "diffusion_models", "vae")
# Larger is better, and what was published comes before what someone made.
QUALITY = (SEEDVR2_7B, SEEDVR2_3B, SEEDVR2_VAE)
MULTI_STEP_FILES = tuple(model.file for model in MODELS.values() if not model.one_step)


def default_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where downloads go: `$COMFYUI_PATH/models/SEEDVR2` if that variable is set, else `~/.cache/seedvr2`."""
    if comfyui := environ.get("COMFYUI_PATH"):
        return Path(comfyui).expanduser() / "models" / COMFYUI_FOLDERS[0]
    return Path.home() / ".cache" / "seedvr2"


def search_directories(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Every folder where a checkpoint may lie: the default one, `~/.cache/seedvr2`, and those of `$COMFYUI_PATH`."""
    found = [default_directory(environ), default_directory({})]
    if comfyui := environ.get("COMFYUI_PATH"):
        found += [Path(comfyui).expanduser() / "models" / name for name in COMFYUI_FOLDERS]
    return list(dict.fromkeys(found))


def find_models(directories: Iterable[Path]) -> list[CheckpointInfo]:
    """Checkpoints of ours in these folders and below, known by content, best first.

    Best means: loadable before not loadable, one-step before multi-step, 7B before 3B before unpublished sizes, then by
    path, which puts the plain 7B before the sharp one. Files that are something else, or damaged, are passed over.
    """
    found = {}
    for directory in directories:
        for path in sorted(Path(directory).rglob("*")):
            if path.suffix.lower() not in EXTENSIONS or not path.is_file() or path.resolve() in found:
                continue
            try:
                info = inspect(path)
            except CheckpointError as error:
                log.debug("passed over: %s", error)
                continue
            if info.parts:
                found[path.resolve()] = info
    return sorted(found.values(), key=_rank)


def _rank(info: CheckpointInfo) -> tuple[bool, bool, int, Path]:
    quality = QUALITY.index(info.config) if info.config in QUALITY else len(QUALITY)
    # The shapes of the multi-step model are the same, so its published file name has to tell.
    return bool(info.why_not), info.path.name in MULTI_STEP_FILES, quality, info.path
