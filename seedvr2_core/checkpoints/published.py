"""The published files: where they are, how large, and the hash that tells them from anything else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# on_progress(stage, done, total), in bytes.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Published:
    """One file on the Hugging Face hub."""

    repo: str
    path: str  # inside the repository
    size: int  # bytes; rounded where only the rounded figure is published
    sha256: str | None = None  # None where nobody published it
    one_step: bool = True  # False: the older SeedVR, which needs many steps and guidance

    @property
    def file(self) -> str:
        return self.path.rpartition("/")[2]


COMFY, NUMZ, BYTEDANCE = "Comfy-Org/SeedVR2", "numz/SeedVR2_comfyUI", "ByteDance-Seed"

MODELS = {
    "3b": Published(
        repo=COMFY, path="diffusion_models/seedvr2_3b_fp16.safetensors", size=6_784_263_336,
        sha256="98669fd2c06df5eca88baf68cd5c478775c8e61fc110e598c52b350145ea2660",
    ),
    "7b": Published(
        repo=COMFY, path="diffusion_models/seedvr2_7b_fp16.safetensors", size=16_480_000_000,
        sha256="2742ca6fee63bc5cc1773f426dd4b07b78cad27f51c9ea5cd42b035e6b592252",
    ),
    "7b-sharp": Published(
        repo=COMFY, path="diffusion_models/seedvr2_7b_sharp_fp16.safetensors", size=16_480_000_000,
        sha256="70823bca54b9c24eeb56e1c452697c7c2a430867e58db0e376c6e260f3a4489d",
    ),
    "vae": Published(
        repo=COMFY, path="vae/seedvr2_ema_vae_fp16.safetensors", size=501_324_814,
        sha256="20678548f420d98d26f11442d3528f8b8c94e57ee046ef93dbb7633da8612ca1",
    ),
    # Made from the first upload of the 3B, which its authors replaced on 2025-06-22; some prefer its look.
    "3b-v1": Published(
        repo=NUMZ, path="seedvr2_ema_3b_fp16.safetensors", size=6_783_000_000,
        sha256="2fd0e03a3dad24e07086750360727ca437de4ecd456f769856e960ae93e2b304",
    ),
    "seedvr-3b": Published(
        repo=f"{BYTEDANCE}/SeedVR-3B", path="seedvr_ema_3b.pth", size=13_600_000_000, one_step=False
    ),
    "seedvr-7b": Published(
        repo=f"{BYTEDANCE}/SeedVR-7B", path="seedvr_ema_7b.pth", size=33_000_000_000, one_step=False
    ),
}  # fmt: skip

PROMPTS = {
    "positive": Published(
        repo=f"{BYTEDANCE}/SeedVR2-3B", path="pos_emb.pt", size=595_100,
        sha256="fa07a14844314772266b66c3b95deb0027696d8fe7065721263db5176f45d799",
    ),
    "negative": Published(
        repo=f"{BYTEDANCE}/SeedVR2-3B", path="neg_emb.pt", size=656_540,
        sha256="6a43e5800ef2354f1c156d27535834da055cbec8248298b8923492bba2076581",
    ),
}  # fmt: skip


def sha256_of(path: Path, on_progress: Progress | None = None) -> str:
    """SHA-256 of a file, in hex. Reads all of it, at roughly half a gigabyte a second."""
    total, done, digest = path.stat().st_size, 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            done += len(block)
            if on_progress:
                on_progress("verify", done, total)
    return digest.hexdigest()
