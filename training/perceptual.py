"""Metrics that come with libraries and weights of their own: LPIPS, DISTS, NIQE, MUSIQ, CLIP-IQA, DOVER, VMAF, E*warp.

None is required. `Metric.open` loads one or says in words why it cannot, so that a table can name what it lacks.
Nothing here is bundled: pyiqa is under PolyForm-Noncommercial and DOVER under a licence for research, which is why both
stay optional and DOVER in a process of its own.
"""
# T H W frames, height, width

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import ModuleType
from urllib.error import URLError

import av
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seedvr2_core.errors import SettingError
from seedvr2_core.video.geometry import to_uint8

from .metrics import Metric, Opened, warp_error

# Where a checkout of DOVER lies, with its weights.
DOVER_VARIABLE = "DOVER_DIR"
DOVER_SCRIPT, DOVER_WEIGHTS = "evaluate_a_set_of_videos.py", "pretrained_weights/DOVER.pth"
# RAFT wants sides that are multiples of 8, and at least 128.
RAFT_MULTIPLE, RAFT_MIN_SIDE = 8, 128
# What libraries raise when their weights are neither there nor to be had.
NO_WEIGHTS = (OSError, URLError, RuntimeError, ValueError)


class MetricMissing(SettingError):
    """An optional metric that cannot run here."""


def library(name: str, package: str | None = None) -> ModuleType:
    """Import an optional library.

    Raises:
        MetricMissing: it is not installed, or lacks a library of its own.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = package or name.split(".")[0]
        raise MetricMissing(f"it needs the library {package} ({error}); pip install {package}") from error


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def weights_hash(module: nn.Module) -> str:
    """The start of the SHA-256 of all weights, which tells one file of weights from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _loaded(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    try:
        return build().eval().requires_grad_(False).to(device)
    except ImportError as error:
        raise MetricMissing(f"a library that it needs is missing ({error})") from error
    except NO_WEIGHTS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MetricMissing(f"its weights cannot be loaded ({reason}); download them once with a connection") from error


def _rounded(frames: Tensor) -> Tensor:
    """Frames on the grid of 8 bits, 0..1."""
    return (to_uint8(frames) if frames.is_floating_point() else frames).float() / 255


def _by_frame(network: Callable[..., Tensor], device: torch.device, reference: bool) -> Callable:
    @torch.inference_mode()
    def measure(pred: Tensor, gt: Tensor | None) -> float:
        clips = (pred, gt) if reference else (pred,)
        frames = zip(*(clip.split(1) for clip in clips), strict=True)
        values = [float(network(*(_rounded(frame).to(device) for frame in group)).mean()) for group in frames]
        return sum(values) / len(values)

    return measure


def open_torchmetrics(module: str, name: str, options: dict, device: torch.device) -> Opened:
    """A metric of torchmetrics on pairs of frames in 0..1."""
    build = getattr(library(module, "torchmetrics[image]"), name)
    network = _loaded(lambda: build(**options), device)
    made_of = {"torchmetrics": version("torchmetrics"), "torchvision": version("torchvision")}
    return Opened(_by_frame(network, device, True), {**made_of, "weights": weights_hash(network)})


def open_pyiqa(name: str, device: torch.device) -> Opened:
    """A metric of pyiqa on frames in 0..1, without reference."""
    create = library("pyiqa").create_metric
    network = _loaded(lambda: create(name, device=device), device)
    made_of = {"pyiqa": version("pyiqa"), "weights": weights_hash(network)}
    return Opened(_by_frame(network, device, False), made_of)


def open_warp_error(device: torch.device) -> Opened:
    """E*warp: the warping error by RAFT's flow, of the original where there is one."""
    models = library("torchvision.models.optical_flow", "torchvision")
    weights = models.Raft_Large_Weights.C_T_SKHT_V2
    network = _loaded(lambda: models.raft_large(weights=weights), device)

    @torch.inference_mode()
    def measure(pred: Tensor, gt: Tensor | None) -> float:
        return warp_error(pred, lambda i, j: estimated_flow(network, pred if gt is None else gt, i, j, device))

    made_of = {"torchvision": version("torchvision"), "raft": str(weights), "weights": weights_hash(network)}
    return Opened(measure, made_of)


def estimated_flow(network: nn.Module, frames: Tensor, i: int, j: int, device: torch.device) -> Tensor:
    """Flow 2 H W in pixels from frame i to frame j."""
    height, width = frames.shape[-2:]
    rows, columns = (max(RAFT_MIN_SIDE, -(-side // RAFT_MULTIPLE) * RAFT_MULTIPLE) for side in (height, width))
    border = (0, columns - width, 0, rows - height)
    pair = [F.pad(_rounded(frames[k : k + 1]), border, mode="replicate").to(device) * 2 - 1 for k in (i, j)]
    flows = network(*pair)
    return flows[-1][0, :, :height, :width].cpu()


def open_vmaf(device: torch.device) -> Opened:
    """VMAF by an ffmpeg that was built with libvmaf."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise MetricMissing("it needs an ffmpeg built with libvmaf, and there is no ffmpeg; install one")
    filters = subprocess.run([program, "-hide_banner", "-filters"], capture_output=True, text=True, check=False).stdout
    if " libvmaf " not in filters:
        raise MetricMissing(f"{program} was built without libvmaf; install an ffmpeg that has it")
    about = subprocess.run([program, "-version"], capture_output=True, text=True, check=False).stdout.splitlines()

    def measure(pred: Tensor, gt: Tensor | None) -> float:
        with tempfile.TemporaryDirectory() as folder:
            paths = [write_lossless(Path(folder) / f"{name}.mkv", clip) for name, clip in (("p", pred), ("g", gt))]
            graph = "[0:v]format=yuv420p[p];[1:v]format=yuv420p[g];[p][g]libvmaf=log_fmt=json:log_path=vmaf.json"
            inputs = [argument for path in paths for argument in ("-i", path.name)]
            _run([program, "-v", "error", *inputs, "-lavfi", graph, "-f", "null", "-"], folder)
            return float(json.loads((Path(folder) / "vmaf.json").read_text())["pooled_metrics"]["vmaf"]["mean"])

    return Opened(measure, {"ffmpeg": about[0] if about else "unknown"})


def open_dover(device: torch.device) -> Opened:
    """DOVER's technical score, 0..100, by its own program in its own process."""
    folder = os.environ.get(DOVER_VARIABLE)
    if folder is None or not (Path(folder) / DOVER_SCRIPT).exists():
        raise MetricMissing(f"it needs a checkout of DOVER; name its folder in the variable {DOVER_VARIABLE}")
    weights = Path(folder) / DOVER_WEIGHTS
    if not weights.exists():
        raise MetricMissing(f"{folder} lacks {DOVER_WEIGHTS}; download it there")

    def measure(pred: Tensor, gt: Tensor | None) -> float:
        with tempfile.TemporaryDirectory() as clips:
            write_lossless(Path(clips) / "clip.mkv", pred)
            _run([sys.executable, DOVER_SCRIPT, "-dir", clips, "-d", str(device)], folder)
            result = Path(folder) / "dover_predictions" / f"val-custom_{Path(clips).name}.pkl"
            with result.open("rb") as file:
                (scores,) = pickle.load(file).values()
            result.unlink()
            return 100 * float(scores["technical"])

    return Opened(measure, {"weights": hashlib.sha256(weights.read_bytes()).hexdigest()[:16]})


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SettingError(f"{Path(command[0]).name} {command[1]} failed while measuring: {last}")


def write_lossless(path: Path, frames: Tensor) -> Path:
    """Frames T 3 H W as a video file that holds them exactly."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt = "bgr0"
        stream.time_base = Fraction(1, 25)
        for index, frame in enumerate(frames):
            codes = to_uint8(frame) if frame.is_floating_point() else frame
            picture = av.VideoFrame.from_ndarray(codes.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            picture.pts = index
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def _lpips(backbone: str) -> dict:
    return {"net_type": backbone, "normalize": True}  # frames in 0..1


_LPIPS = ("torchmetrics.image.lpip", "LearnedPerceptualImagePatchSimilarity")
_DISTS = ("torchmetrics.image.dists", "DeepImageStructureAndTextureSimilarity")
# Their order is that of the tables.
OPTIONAL = (
    Metric(name="lpips", better="lower", open=partial(open_torchmetrics, *_LPIPS, _lpips("alex")), min_side=64),
    Metric(name="lpips_vgg", better="lower", open=partial(open_torchmetrics, *_LPIPS, _lpips("vgg")), min_side=64),
    Metric(name="dists", better="lower", open=partial(open_torchmetrics, *_DISTS, {}), min_side=64),
    Metric(name="vmaf", better="higher", open=open_vmaf, min_frames=2, min_side=64, decimals=1),
    Metric(name="niqe", better="lower", open=partial(open_pyiqa, "niqe"), reference=False, min_side=97),
    Metric(name="musiq", better="higher", open=partial(open_pyiqa, "musiq"), reference=False, min_side=32, decimals=1),
    Metric(name="clip_iqa", better="higher", open=partial(open_pyiqa, "clipiqa"), reference=False, min_side=32),
    Metric(name="dover", better="higher", open=open_dover, reference=False, min_frames=8, min_side=64, decimals=1),
    Metric(name="warp_error", better="lower", open=open_warp_error, reference=False, min_frames=2, decimals=2),
)  # fmt: skip
