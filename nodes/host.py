"""What ComfyUI is like this month: the only file that imports it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy.patcher_extension import CallbacksMP
from comfy_api.latest import ComfyExtension, Input, InputImpl, Types, io, ui
from PIL import Image
from server import PromptServer
from torch import Tensor, nn

from ..seedvr2_core.checkpoints.folders import COMFYUI_FOLDERS, EXTENSIONS
from ..seedvr2_core.device import is_out_of_memory
from ..seedvr2_core.errors import MediaError, SeedVR2Error
from ..seedvr2_core.memory.stages import resident_bytes

__all__ = ["ComfyExtension", "Input", "InputImpl", "Types", "io", "ui"]

log = logging.getLogger(__name__)

for _error in (SeedVR2Error, *SeedVR2Error.__subclasses__()):
    # ComfyUI shows it in front of the sentence; without this, that is the path of this folder.
    _error.__module__ = "SeedVR2"

# The key of our own folder, below which users of `extra_model_paths.yaml` may name more.
MODELS_KEY = "seedvr2"
# Where ComfyUI's own loaders look for such files.
OTHER_KEYS = ("diffusion_models", "vae")
# Seconds between two previews; encoding one takes some milliseconds.
PREVIEW_EVERY = 1.0
# Parts into which progress is divided.
STEPS = 1000
# What no name may hold on Windows, such as the colons of a time, becomes a line.
LEGAL = str.maketrans(dict.fromkeys(':*?"<>|', "_"))

ModelPatcher = comfy.model_patcher.ModelPatcher


def register_folders() -> None:
    """Tell ComfyUI of `models/SEEDVR2`, beside whatever else users put under its key."""
    own = Path(folder_paths.models_dir) / COMFYUI_FOLDERS[0]
    folder_paths.add_model_folder_path(MODELS_KEY, str(own), is_default=True)
    # The set of a new key is empty, which means that every file is a model.
    folder_paths.folder_names_and_paths[MODELS_KEY][1].update(EXTENSIONS)


def own_directory() -> Path:
    """Where downloads go."""
    return Path(folder_paths.get_folder_paths(MODELS_KEY)[0])


def model_files() -> Iterator[tuple[str, Path]]:
    """Name below its folder, and path, of every file that could be a checkpoint."""
    for key in (MODELS_KEY, *OTHER_KEYS):
        for name in folder_paths.get_filename_list(key):
            path = folder_paths.get_full_path(key, name)
            if path and name.lower().endswith(EXTENSIONS):
                yield name, Path(path)


def temp_directory() -> Path:
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True)
class Saved:
    """A file to be written below ComfyUI's output folder."""

    path: Path
    preview: ui.PreviewVideo


def output_file(prefix: str, suffix: str, width: int, height: int) -> Saved:
    """The next free name of this prefix, which may hold folders and ComfyUI's %placeholders%."""
    drive, rest = os.path.splitdrive(prefix)
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        drive + rest.translate(LEGAL), folder_paths.get_output_directory(), width, height
    )
    file = f"{name}_{counter:05}_{suffix}"
    return Saved(Path(folder) / file, ui.PreviewVideo([ui.SavedResult(file, subfolder, io.FolderType.output)]))


def device() -> torch.device:
    """Where to compute, as tensors name it: some devices have an index that ComfyUI leaves out."""
    return torch.empty(0, device=management.get_torch_device()).device


def managed(module: nn.Module) -> ModelPatcher:
    """Put a module, which lies where models wait, into ComfyUI's care. It stays there as long as the result lives."""
    # Looked up late: where the hardware allows, ComfyUI puts another one in its place while it starts.
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    return patcher(module, load_device=management.get_torch_device(), offload_device=offload_device())


def offload_device() -> torch.device:
    """Where models wait until they are needed."""
    return management.unet_offload_device()


def load(patchers: Sequence[ModelPatcher], working_bytes: int) -> None:
    """Bring modules to the device, with so much room beside them; others have to go if need be."""
    # Ours have none of the layers of ComfyUI that can be left behind.
    management.load_models_gpu(list(patchers), memory_required=working_bytes, force_full_load=True)
    for patcher in patchers:
        # Which it does not do for `--novram`.
        patcher.model.to(device())
    # Without a module there it makes no room; and models that it moves piece by piece it would leave where they are
    # until the memory is taken, but our plans count what is free.
    make_room(patchers, working_bytes)


def unload(patcher: ModelPatcher) -> None:
    """Bring a module back to where it waits, if ComfyUI has it on the device: somebody else is going to move it."""
    for loaded in [loaded for loaded in management.current_loaded_models if loaded.model is patcher]:
        loaded.model_unload()
        management.current_loaded_models.remove(loaded)


def on_unload(patcher: ModelPatcher, forget: Callable[[], None]) -> None:
    """Have this called when ComfyUI takes a module off the device, or frees all memory because the user says so."""
    # Also called, then with False, when nobody holds the module any more.
    patcher.add_callback(CallbacksMP.ON_DETACH, lambda patcher, all_of_it: all_of_it and forget())


def free_bytes(patchers: Sequence[ModelPatcher]) -> int:
    """What the device could offer to these models if every other one that ComfyUI has there were gone."""
    # A model that nobody holds any more is None.
    others = [loaded for loaded in management.current_loaded_models if loaded.model not in (None, *patchers)]
    place = management.get_torch_device()
    theirs = sum(loaded.model_loaded_memory() for loaded in others if loaded.device == place)
    # Ours may lie there without ComfyUI's doing: it may be where models wait.
    ours = resident_bytes([patcher.model for patcher in patchers], device())
    return int(management.get_free_memory(device()) + theirs + ours)


def make_room(patchers: Sequence[ModelPatcher], working_bytes: float) -> None:
    """Have so much free on the device beside these models; others have to go if need be."""
    ours = [loaded for loaded in management.current_loaded_models if loaded.model in patchers]
    place = management.get_torch_device()
    management.free_memory(working_bytes + management.extra_reserved_memory(), place, keep_loaded=ours)


def empty_frames(count: int, height: int, width: int, channels: int) -> Tensor:
    """Room for frames T H W c where ComfyUI keeps images between nodes, in fp32.

    Raises:
        MediaError: there is not enough.
    """
    place = management.intermediate_device()
    if place == device():
        make_room([], 4 * count * height * width * channels)
    try:
        return torch.empty(count, height, width, channels, device=place)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MediaError(
            f"{count} frames of {width} x {height} do not fit into the memory of {place.type} at once; choose a "
            "smaller size, or restore from file to file with SeedVR2 Restore Video."
        ) from error


def keep(x: Tensor) -> Tensor:
    """Where ComfyUI keeps tensors between nodes."""
    return x.to(management.intermediate_device())


def bring(x: Tensor) -> Tensor:
    """To the device."""
    return x.to(device())


def check_interrupt() -> None:
    """Raises ComfyUI's own exception when the user has stopped the run."""
    management.throw_exception_if_processing_interrupted()


class Progress:
    """What a node shows while it works: its bar, how long it will take, and frames that are finished.

    A call may raise, when the user has stopped the run.
    """

    def __init__(self, node_id: str):
        self.node_id = node_id
        self.bar = comfy.utils.ProgressBar(STEPS, node_id=node_id)
        self.start = time.perf_counter()
        self.shown = self.said = -float("inf")

    def __call__(self, share: float, text: str) -> None:
        """Show that this share, 0..1, is done; `text` says of what."""
        check_interrupt()
        now = time.perf_counter()
        self.bar.update_absolute(int(STEPS * share))
        if now - self.said >= PREVIEW_EVERY:
            self.said = now
            left = (now - self.start) * (1 - share) / share if share > 0.01 else None
            self.say(text if left is None else f"{text}, {duration(left)} left")

    def finish(self, text: str) -> None:
        """Show what was done, and how long it took."""
        self.bar.update_absolute(STEPS)
        self.say(f"{text} in {duration(time.perf_counter() - self.start)}")

    def say(self, text: str) -> None:
        """Show text on the node."""
        if PromptServer.instance is not None:
            PromptServer.instance.send_progress_text(text, self.node_id)

    def preview(self, frame: Tensor, share: float) -> None:
        """Show a finished frame H W c, floats in 0..1 or codes in uint8, unless one has just been shown."""
        now = time.perf_counter()
        if now - self.shown < PREVIEW_EVERY:
            return
        self.shown = now
        pixels = frame[..., :3].cpu()
        if pixels.is_floating_point():
            pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
        image = Image.fromarray(pixels.numpy())
        self.bar.update_absolute(int(STEPS * share), preview=("JPEG", image, args.preview_size))


def duration(seconds: float) -> str:
    """Time as people read it: 45 s, 3:20 min, 1:05 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02} min"
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02} h"


@contextmanager
def source_file(video: Input.Video | None, path: str) -> Iterator[Path]:
    """The file to read: that of a video, or the one a path names.

    A video that was loaded from a file and not cut is that file. Others are written to a temporary file, by ComfyUI in
    its own way, which is 8 bits of H.264.

    Raises:
        MediaError: neither is given, or both, or there is no such file.
    """
    if (video is None) == (not path.strip()):
        found = "Neither is a video connected nor" if video is None else "A video is connected, and also"
        raise MediaError(f"{found} a path written; give one of the two.")
    if video is None:
        file = named_file(path)
        if not file.exists():
            raise MediaError(
                f"{file} does not exist; write the whole path of a file on the machine of ComfyUI, or the name of one "
                "in its input folder."
            )
        yield file
        return
    source = video.get_stream_source()
    if isinstance(source, str) and not is_cut(video, source):
        yield Path(source)
        return
    copy = temp_directory() / f"svr2_{time.time_ns():x}.mp4"
    try:
        video.save_to(str(copy), format=Types.VideoContainer.MP4)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def named_file(path: str) -> Path:
    """A path as a user writes it, maybe with quotes around it; relative ones lie in the input folder."""
    return Path(folder_paths.get_input_directory()) / Path(path.strip().strip("\"'")).expanduser()


def file_stamp(path: str) -> object:
    """Changes when a named file does; a path that is not written here but comes from another node tells itself."""
    if not isinstance(path, str) or not path.strip():
        return None
    file = named_file(path)
    if not file.exists():
        return None
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def is_cut(video: Input.Video, source: str) -> bool:
    """Whether a video is only a part of its file, which its class does not tell."""
    whole = InputImpl.VideoFromFile(source).get_duration()
    return abs(video.get_duration() - whole) > 0.5 / float(video.get_frame_rate())
