"""What a GPU would find on the wrong device is found without one. Slow: run with `-m slow`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
    pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler"),
]


def pretend(*argv: object) -> str:
    """Run a module where a GPU seems to be; what it prints."""
    command = [sys.executable, "-m", "tests.pretend_gpu", *map(str, argv)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    return run.stdout


def test_tensors_of_two_devices_do_not_meet():
    code = "import torch; x = torch.ones(3, device='cuda'); print((x * 2).sum().item()); x @ torch.ones(3)"
    with pytest.raises(AssertionError, match=r"6\.0\n(?s:.*)tensors of cuda:0 and of the cpu"):
        pretend("timeit", "-n1", "-r1", code)


@pytest.mark.parametrize(
    "files",
    [
        ["test_gpu.py", "-k", "not large_frames and not parts"],
        ["attention/test_attention.py", "checkpoints", "models/test_linear.py", "video", "memory/test_streaming.py"],
    ],
)
def test_what_is_marked_for_a_gpu_passes(files):
    folder = ROOT / "tests/core"
    paths = [folder / name if (folder / name).exists() else name for name in files]
    assert " passed" in pretend("pytest", "-m", "gpu", "-p", "no:cacheprovider", *paths)


def lines(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


@pytest.mark.parametrize(
    ("options", "limit", "codes"),
    [
        ("--same --dtype fp32 --color lab", "80G", 0.5),
        ("--same --dtype fp32 --steps 2 --cfg 2", "80G", 0.5),
        ("--size 144x96 --dtype fp32 --color none", "50M", 0.5),  # blocks and state wait in host memory
        ("--same", "80G", 8),  # bf16: what is made up differs
        ("--same --packing fp8", "80G", 8),
    ],
)
def test_a_clip_is_restored_as_on_a_cpu(tmp_path, options, limit, codes):
    """To a mean of so many codes of 255."""
    clip = tmp_path / "clip.mp4"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=48, height=32, pix_fmt="yuv420p")
        y, x = np.mgrid[:32, :48]
        for number in range(6):
            frame = np.stack([x * 5, y * 7, (x + y + 4 * number) * 3], axis=-1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    command = ["restore", clip, "--model", "nano", *options.split()]
    subprocess.run([sys.executable, "-m", "seedvr2_core", *command, tmp_path / "cpu.mp4", "--device", "cpu"], cwd=ROOT)
    report = tmp_path / "report.json"
    gpu = ("--device", "cuda", "--memory-limit", limit, "--json", report)
    said = pretend("seedvr2_core", *command, tmp_path / "gpu.mp4", *gpu)
    cpu, gpu = lines(tmp_path / "cpu.mp4"), lines(tmp_path / "gpu.mp4")
    assert gpu.shape == cpu.shape and len(gpu) == 6
    assert np.abs(gpu - cpu).mean() < codes
    if limit == "50M":
        assert "its state in host memory, 7 of 8 blocks streamed" in said
        assert json.loads(report.read_text())["peak_device_bytes"] <= 50 << 20


def test_every_stage_of_training_takes_steps(tmp_path):
    latents = tmp_path / "latents"
    latents.mkdir()
    for name, t in (("image", 1), ("clip", 2)):
        hq, noise = torch.randn(2, 24, 16, t, 16, 16)
        save_file({"hq": hq, "lq": hq + noise / 2}, latents / f"{name}.safetensors")

    for kind in ("train", "eval"):
        pictures = tmp_path / "pictures" / kind / "images"
        pictures.mkdir(parents=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)).save(pictures / "noise.png")

    def train(stage: str, *settings: str, data: Path = latents) -> None:
        out = tmp_path / stage
        shared = ("--data", data, "--device", "cuda", "--threads", 1, "run.save_every=1")
        pretend(f"training.{stage}", "--config", "nano", "--out", out, *shared, *settings)
        assert list(out.rglob("step_000001")) and list(out.rglob("metrics.jsonl"))

    crops = [f"crops.{kind}.{name}={value}" for kind in range(3) for name, value in (("batch", 1), ("size", 32))]
    train("vae", "run.steps=2", "run.parallel.precision=fp32", "init=nano", *crops, data=tmp_path / "pictures")
    train("pretrain", "batch=2", "run.steps=2", "run.parallel.precision=bf16")
    train("distill", "batch=2", "run.steps=1", f"teacher={tmp_path / 'pretrain'}")
    train("apt", "batch=2", "run.steps=2", "pretrained=nano", "distilled=nano")
    recomputed = "run.parallel.activation_checkpoint=true"
    train("lora", "batch=2", "run.steps=2", "lora.base=bf16", "lora.offload_blocks=4", recomputed)
