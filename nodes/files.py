"""Model files: which there are on this machine, and where those lie that a user names."""

from __future__ import annotations

from pathlib import Path

from ..seedvr2_core.checkpoints.download import download
from ..seedvr2_core.checkpoints.folders import NANO_DIT, NANO_VAE, autoencoder_of, known, published_among
from ..seedvr2_core.checkpoints.published import MODELS
from ..seedvr2_core.errors import CheckpointError
from . import host
from .progress import Fetching, in_background

AUTO, NANO = "auto", "nano"
PUBLISHED_VAE = "vae"
DITS = tuple(name for name in MODELS if name != PUBLISHED_VAE)


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
        return vae_of(best_dit(), on_progress)
    return fetched(name, on_progress) if name == PUBLISHED_VAE else local_file(name)


def vae_of(dit: Path, on_progress: Fetching | None = None) -> Path:
    """File of the autoencoder that belongs to a transformer. Raises as `find_dit`."""
    return _local_vae_of(dit) or fetched(PUBLISHED_VAE, on_progress)


def _local_vae_of(dit: Path) -> Path | None:
    return autoencoder_of(dit, (path for _, path in host.model_files()))


def best_dit() -> Path:
    """The 7B if it is on this machine, else the 3B, else nano."""
    return next((info.path for info in published_among(path for _, path in host.model_files())), NANO_DIT)


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
    """File of a published model. Raises as `find_dit`."""
    if path := published_file(name):
        return path
    return in_background(lambda note: download(name, host.own_directory(), note)[0], on_progress or (lambda *_: None))


def holds(path: Path, kind: str) -> bool:
    info = known(path)
    return info is not None and not info.why_not and any(part.kind == kind for part in info.parts)


def stamp(kind: str, name: str) -> object:
    """Changes when another file would be loaded, or the file itself has changed."""
    if name in MODELS:
        # The same whether it has been fetched yet or not.
        return name
    if (kind, name) == ("vae", AUTO):
        path = _local_vae_of(best_dit())
        return file_stamp(path) if path else PUBLISHED_VAE
    return file_stamp(find_dit(name) if kind == "dit" else find_vae(name))


def file_stamp(path: Path) -> tuple[str, int, int]:
    """Changes when a file does."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
