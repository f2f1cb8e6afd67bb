"""What a stage starts from: a run of the stage before, a checkpoint file, or a published model by its name.

    l text tokens   c channels
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seedvr2_core.checkpoints import load_dit, load_prompts, load_vae
from seedvr2_core.checkpoints.folders import NAMED, pick
from seedvr2_core.errors import CheckpointError
from seedvr2_core.models.dit import DiTConfig
from seedvr2_core.models.vae import VAEConfig, VideoVAE
from seedvr2_core.models.windows import WindowConfig
from seedvr2_core.video.geometry import Grid

from . import config as configs
from . import state
from .adapters import ADAPTER_CONFIG, AboutAdapters, LoraConfig, load_adapters, merged
from .restorer import Restorer

NAMES = ("nano", *NAMED)


def published(where: str | Path, kind: str) -> Path:
    """The file of a transformer ("dit") or an autoencoder ("vae"): a path, or the one that a name stands for.

    Raises:
        CheckpointError: there is no such file, or the named model is not on this machine.
    """
    if str(where) in NAMES:
        dit, vae = pick(str(where))
        return dit if kind == "dit" else vae
    path = Path(where)
    if not path.exists():
        raise CheckpointError(f"{path} is neither a run directory, a checkpoint nor one of {', '.join(NAMES)}; run the "
                              "stage before, or fetch a published model with: seedvr2 download 3b")
    return path


def is_run(where: str | Path) -> bool:
    """Whether a path is the directory of a run."""
    return str(where) not in NAMES and Path(where).is_dir()


def open_vae(where: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> VideoVAE:
    """An autoencoder: the averaged weights of a run of `training.vae`, a checkpoint, or that of a published model.

    Raises:
        CheckpointError: there is none.
    """
    if not is_run(where):
        return load_vae(published(where, "vae"), dtype, device)
    return build_vae(Path(where), state.load_averaged(Path(where))).to(device, dtype)


def latent_scale(where: str | Path, vae: VideoVAE) -> float | None:
    """By what transformers see the latents of an autoencoder multiplied; None where that is still to be found, of a run
    that began with nothing.

    Args:
        where: as for `open_vae`.
        vae: what that made of it.

    Raises:
        CheckpointError: what the run began with is gone.
    """
    if not is_run(where):
        return vae.config.scale
    start = (configs.load_saved(Path(where)) or {}).get("init")
    return None if start is None else latent_scale(start, open_vae(start))


def build_vae(run: Path, tensors: Mapping[str, Tensor]) -> VideoVAE:
    """The autoencoder of a run, with these weights of it."""
    with torch.device("meta"):
        vae = VideoVAE(vae_config(run))
    _load(vae, tensors, run)
    return vae.eval()


def open_restorer(
    where: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Restorer:
    """A transformer with its prompt: the averaged weights of a run, a checkpoint, or a published model.

    A published model brings its positive prompt, which a run of fine-tuning may go on training. A run of
    `training.lora`, and a folder of adapters in peft's format, is opened merged into what it is for.

    Raises:
        CheckpointError: there is none.
    """
    if is_run(where):
        return build_restorer(Path(where), read_weights(Path(where)), device).to(device, dtype)
    path = published(where, "dit")
    dit = load_dit(path, dtype, device)
    prompt = load_prompts(path).positive
    restorer = empty_restorer(dit.config, len(prompt))
    restorer.dit = dit
    restorer.prompt = nn.Parameter(prompt.to(device, dtype))
    return restorer


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a run, or the adapters of a folder in peft's format.

    Raises:
        CheckpointError: there are none.
    """
    return load_adapters(folder) if AboutAdapters.in_folder(folder) else state.load_averaged(folder)


def build_restorer(folder: Path, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Restorer:
    """The transformer of a run or a folder of adapters, with these weights of it, in fp32, and its prompt.

    Adapters are merged in fp32, whatever type their base had in training: it is rounded once.

    Raises:
        CheckpointError: the weights are of another model, or what adapters are for is not on this machine.
    """
    if about := about_adapters(folder):
        base = open_restorer(about.base, torch.float32, device)
        if not about.prompted:
            nn.init.zeros_(base.prompt)
        return merged(base, about.config, tensors, folder)
    restorer = empty_restorer(dit_config(folder), len(tensors.get("prompt", ())))
    _load(restorer, tensors, folder)
    restorer.dit.reset_frequencies()
    return restorer


def about_adapters(folder: Path) -> AboutAdapters | None:
    """What a run of `training.lora`, or a folder in peft's format, adapts; None: it is a run of another stage, or its
    generator was trained as a whole.

    Raises:
        CheckpointError: nothing can be made of the folder.
    """
    about = _adapters_of(folder)
    base, met = about, {folder.resolve()}
    while base and is_run(base.base):
        if (place := Path(base.base).resolve()) in met:
            raise CheckpointError(f"The adapters in {folder} are for a model that is in turn made of {place}; expected "
                                  "one that ends at a checkpoint. Mend base_model_name_or_path in its "
                                  f"{ADAPTER_CONFIG}.")
        met.add(place)
        base = _adapters_of(place)
    return about


def _adapters_of(folder: Path) -> AboutAdapters | None:
    saved = configs.load_saved(folder) or {}
    if "lora" not in saved or saved.get("generator") == "full":
        return AboutAdapters.in_folder(folder)
    # Older runs call it base.
    base = saved.get("init", saved.get("base"))
    return AboutAdapters(base, LoraConfig(**saved["lora"]), saved.get("text", {}).get("mode") != "none")


def open_negative(where: str | Path) -> Tensor | None:
    """The negative prompt l c of a checkpoint or published model, or the one that a run, or the base of its adapters,
    was trained with; None where there is none.

    Raises:
        CheckpointError: there is no such model.
    """
    if not is_run(where):
        return load_prompts(published(where, "dit")).negative
    named = (configs.load_saved(Path(where)) or {}).get("text", {}).get("negative")
    if named is None and (about := about_adapters(Path(where))):
        named = about.base
    return None if named is None else open_negative(named)


def empty_restorer(config: DiTConfig, prompt_tokens: int) -> Restorer:
    """A restorer whose weights have no values yet: nothing is spent on drawing billions that are overwritten."""
    with torch.device("meta"):
        restorer = Restorer(config)
        restorer.prompt = nn.Parameter(torch.empty(prompt_tokens, config.text_dim))
    return restorer


def _load(module: nn.Module, tensors: Mapping[str, Tensor], run: Path) -> None:
    computed = {name: torch.zeros(tensor.shape) for name, tensor in module.state_dict().items() if name not in tensors}
    try:
        # What is computed and not trained is not among the averages; whoever owns it fills it in.
        module.load_state_dict({**computed, **tensors}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{run} holds weights of another stage or model: {str(error).splitlines()[-1].strip()}"
                              ) from error


def dit_config(run: Path) -> DiTConfig:
    """What the transformer of a run was built from."""
    saved = dict(_saved_model(run))
    windows = saved.pop("windows")
    # Runs begun before windows could be fixed do not say.
    size = windows.get("size")
    return DiTConfig(
        **saved,
        windows=WindowConfig(
            splits=Grid(*windows["splits"]),
            train_area=tuple(windows["train_area"]),
            max_t=windows["max_t"],
            size=None if size is None else Grid(*size),
        ),
    )


def vae_config(run: Path) -> VAEConfig:
    """What the autoencoder of a run was built from."""
    saved = _saved_model(run)
    return VAEConfig(**{**saved, "widths": tuple(saved["widths"])})


def _saved_model(run: Path) -> Mapping[str, Any]:
    saved = configs.load_saved(run)
    if not saved or "model" not in saved:
        raise CheckpointError(f"{run} holds no {configs.CONFIG_FILE} that names a model; it is no run of a stage.")
    return saved["model"]
