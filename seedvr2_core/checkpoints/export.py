"""Write a checkpoint that this package, and others that know the published names, can read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.dit import DiTConfig
from ..models.vae import VAEConfig
from .sizes import CONFIG_KEY


def save(
    path: Path,
    module: nn.Module,
    config: DiTConfig | VAEConfig,
    extra_tensors: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a module as safetensors, in the types it has: under its final name stands the whole file or the old one.

    Args:
        path: the file, replaced if it exists; its folder is made.
        module: a DiT or VideoVAE.
        config: what it was built from; goes into the metadata, for what shapes cannot show.
        extra_tensors: more tensors by name, such as `positive_conditioning` and `negative_conditioning`.
        metadata: more metadata; `modelspec.title` becomes the label of a model of unpublished size.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    # Clones, since safetensors refuses tensors that share memory.
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in {**module.state_dict(), **(extra_tensors or {})}.items()
    }
    about = {"format": "pt", CONFIG_KEY: json.dumps(dataclasses.asdict(config)), **(metadata or {})}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, metadata=about)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written ({error}); make room, or choose another folder.") from error
    finally:
        unfinished.unlink(missing_ok=True)
