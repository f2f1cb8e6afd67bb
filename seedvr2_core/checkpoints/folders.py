"""Where checkpoints lie on this machine, and which of those found is the best to use."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from ..errors import CheckpointError
from ..models.dit import SEEDVR2_3B, SEEDVR2_7B
from ..models.vae import SEEDVR2_VAE
from .checkpoint import CheckpointInfo, inspect
from .published import MODELS

log = logging.getLogger(__name__)

# The demonstration model that comes with this package.
ASSETS = Path(__file__).parent.parent / "assets"
NANO_DIT, NANO_VAE = ASSETS / "nano_dit.safetensors", ASSETS / "nano_vae.safetensors"
EXTENSIONS = (".safetensors", ".pth", ".pt", ".ckpt", ".gguf")
# Below a ComfyUI: the folder of the widespread plugin first, then those of ComfyUI's own loaders.
COMFYUI_FOLDERS = ("SEEDVR2", "diffusion_models", "vae")
# Larger is better, and what was published comes before what someone made.
QUALITY = (SEEDVR2_7B, SEEDVR2_3B, SEEDVR2_VAE)
# What a user may call a model.
NAMED = {"3b": SEEDVR2_3B, "7b": SEEDVR2_7B}
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
    return _best_first(_files(directories))


def _files(directories: Iterable[Path]) -> Iterator[Path]:
    for directory in directories:
        yield from (path for path in sorted(Path(directory).rglob("*")) if path.suffix.lower() in EXTENSIONS)


def _best_first(files: Iterable[Path]) -> list[CheckpointInfo]:
    """Which of these are checkpoints of ours, in the order of `find_models`."""
    found = {}
    for path in files:
        if path.is_file() and path.resolve() not in found and (info := known(path)) and info.parts:
            found[path.resolve()] = info
    return sorted(found.values(), key=_rank)


def known(path: Path) -> CheckpointInfo | None:
    """What a file holds, None if it is none of ours or damaged; looked at again only when it has changed."""
    status = path.stat()
    return _inspected(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _inspected(path: Path, size: int, changed: int) -> CheckpointInfo | None:
    try:
        info = inspect(path)
    except CheckpointError as error:
        log.debug("passed over: %s", error)
        return None
    if info.why_not and (info.parts or "seedvr" in path.name.lower()):
        # Once, for whoever wonders why it is in no list. Of a file that nobody here can read, only the name tells.
        log.info("%s", info.why_not)
    return info


def _rank(info: CheckpointInfo) -> tuple[bool, bool, int, bool, Path]:
    quality = QUALITY.index(info.config) if info.config in QUALITY else len(QUALITY)
    # The shapes of the multi-step model are the same, so its published file name has to tell.
    return bool(info.why_not), info.path.name in MULTI_STEP_FILES, quality, info.coarse, info.path


def pick(model: str | None = None, vae: str | Path | None = None) -> tuple[Path, Path]:
    """Files of the transformer and the autoencoder to use.

    Args:
        model: "nano", "3b", "7b" or a file. None: the best published model on this machine that has its autoencoder,
            else nano; which it is, is logged.
        vae: the same of the autoencoder. None: the one inside the transformer's file, beside it, or in the usual
            folders; of one as large as nano, nano's.

    Raises:
        CheckpointError: what was asked for is not on this machine.
    """
    vae = None if vae is None else _named_autoencoder(str(vae))
    if model == "nano":
        return NANO_DIT, vae or NANO_VAE
    if model is None:
        return _best(vae)
    if model in NAMED:
        found = next((info for info in _one_step() if info.config == NAMED[model]), None)
        if found is None:
            folders = ", ".join(map(str, search_directories()))
            raise CheckpointError(f"No {model} model lies in {folders}; fetch it with: seedvr2 download {model}")
        dit = found.path
    else:
        dit = Path(model)
        if not dit.exists():
            raise CheckpointError(
                f"{model!r} is neither nano, {', '.join(NAMED)} nor a file that exists; name one of these, or fetch a "
                "published model with: seedvr2 download 3b"
            )
    return dit, vae or _autoencoder(dit)


def _named_autoencoder(vae: str) -> Path:
    if vae == "nano":
        return NANO_VAE
    return _there(_published_autoencoder(_files(search_directories())), vae) if vae in NAMED else Path(vae)


def published_among(files: Iterable[Path]) -> list[CheckpointInfo]:
    """Which of these files are published one-step transformers that can be loaded, best first."""
    one_step = (info for info in _best_first(files) if info.path.name not in MULTI_STEP_FILES)
    return [info for info in one_step if info.config in NAMED.values() and not info.why_not]


def _best(vae: Path | None) -> tuple[Path, Path]:
    for info in published_among(_files(search_directories())):
        try:
            found = info.path, vae or _autoencoder(info.path)
        except CheckpointError as error:
            log.warning("%s", error)
            continue
        log.info("Using %s, the best model on this machine: %s", info.label, info.path)
        return found
    log.info("No published model is on this machine, so the small demonstration model nano is used; fetch a real one "
             "with: seedvr2 download 3b && seedvr2 download vae")  # fmt: skip
    return NANO_DIT, vae or NANO_VAE


def _one_step() -> list[CheckpointInfo]:
    """What the usual folders hold. Multi-step models want other settings, so they are used by their file only."""
    return [info for info in find_models(search_directories()) if info.path.name not in MULTI_STEP_FILES]


def autoencoder_of(dit: Path, elsewhere: Iterable[Path]) -> Path | None:
    """The autoencoder for a transformer: in its file, beside it, nano's for one as large as nano, or the published one.

    Args:
        elsewhere: files among which the published one may be.

    Returns:
        its file, None if that would be the published one, which is not there.

    Raises:
        CheckpointError: `dit` is no checkpoint.
    """
    info = inspect(dit)
    if any(part.kind == "vae" for part in info.parts):
        return dit
    like_nano = info.config == inspect(NANO_DIT).config
    for other in find_models([dit.parent]):
        # Where everything lies in one folder, the published one lies beside a small model for which it was not made.
        if other.kind == "vae" and not other.why_not and not (like_nano and other.config == SEEDVR2_VAE):
            return other.path
    return NANO_VAE if like_nano else _published_autoencoder(elsewhere)


def _published_autoencoder(files: Iterable[Path]) -> Path | None:
    found = (info.path for info in _best_first(files) if info.config == SEEDVR2_VAE and not info.why_not)
    return next(found, None)


def _autoencoder(dit: Path) -> Path:
    return _there(autoencoder_of(dit, _files(search_directories())), dit.name)


def _there(autoencoder: Path | None, wanted_for: str) -> Path:
    if autoencoder is None:
        raise CheckpointError(f"There is no autoencoder for {wanted_for}; fetch it with: seedvr2 download vae")
    return autoencoder
