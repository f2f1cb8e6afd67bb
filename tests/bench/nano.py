"""What the repository says and shows of nano, made again from its runs and from real media.

    python -m tests.bench.nano record   --runs RUNS --card card.json
    python -m tests.bench.nano pictures --data DATA

`record` writes `nano.json` beside the model, and the curves; `pictures` draws the others with the nano that ships.
RUNS holds the folders of the guide's "From nothing to nano", DATA the folder `lq`. Curves need matplotlib.
"""
# T H W frames, height, width

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from seedvr2_core import Settings, Target, load_models, pick, restore
from seedvr2_core.video.files import open_reader, probe
from training.config import load_saved
from training.degradation import upsample
from training.journal import METRICS, VALIDATION
from training.shards import ShardReader

ROOT = Path(__file__).parents[2]
MEDIA, THUMBNAILS, ASSETS = ROOT / "tests/media", ROOT / "workflows", ROOT / "seedvr2_core/assets"
# Height and width of a template's thumbnail in ComfyUI's browser, and pixels between two pictures.
THUMBNAIL, GAP = (294, 470), 8
HALVINGS = ("04", "02", "01")

Row = dict[str, Any]


# Of the runs.


def rows(run: Path, name: str) -> list[Row]:
    return [json.loads(line) for line in (run / name).read_text("utf-8").splitlines()]


def record(runs: Path, card: Path) -> Row:
    """The recipe of every stage, where its curves end, which of the runs nano's files are, and the scorecard."""
    stages = ("vae", "pretrain", "distill/04", "distill/02", "distill/01", "vae_decoder", "apt")
    recipes = {name.partition("/")[0]: load_saved(runs / name) for name in stages}
    recipes["precompute"] = ShardReader(runs / "latents").settings
    ends = {name.replace("/", "_"): rows(runs / name, VALIDATION)[-1] for name in stages}
    made_of = {}
    for path in pick("nano"):
        with safe_open(path, "pt") as file:
            made_of[path.name] = file.metadata()["seedvr2_run"]
    scores = json.loads(card.read_text("utf-8"))
    return {"recipes": recipes, "validation": ends, "made_of": made_of, "scorecard": scores}


def draw_curves(runs: Path, out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 6.3), layout="tight")
    axes = iter(figure.subplots(2, 3).flat)

    def panel(title: str) -> Any:
        axis = next(axes)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        return axis

    def validated(axis: Any, run: Path, **keys: str) -> None:
        found = rows(run, VALIDATION)
        for label, key in keys.items():
            axis.plot([row["step"] for row in found], [row[key] for row in found], "o-", ms=3, label=label)
        axis.legend(fontsize=8)

    def trained(axis: Any, run: Path, key: str, mean_of: int, start: int = 0, label: str | None = None) -> None:
        found = [row[key] for row in rows(run, METRICS) if row.get(key) is not None]
        smooth = np.convolve(found, np.full(mean_of, 1 / mean_of), "valid")
        axis.plot(start + mean_of + np.arange(len(smooth)), smooth, label=label)

    validated(panel("autoencoder: PSNR of held-out crops, dB"), runs / "vae", pictures="psnr_image", clips="psnr_clip")
    validated(panel("its decoder alone: fine detail, 1 as in the originals"), runs / "vae_decoder",
              pictures="detail_image", clips="detail_clip")  # fmt: skip
    trained(panel("flow matching: loss, mean of 100 steps"), runs / "pretrain", "loss", 100)
    axis, start = panel("distillation: loss, mean of 25 steps"), 0
    for name in HALVINGS:
        run = runs / "distill" / name
        trained(axis, run, "loss", 25, start, f"{2 * int(name)} to {int(name)} steps")
        start += len(rows(run, METRICS))
    axis.legend(fontsize=8)
    axis = panel("adversarial stage, mean of 25 steps")
    trained(axis, runs / "apt", "d_adv", 25, label="discriminator's adversarial loss")
    trained(axis, runs / "apt", "g_adv", 25, label="generator's")
    axis.axhline(np.log(2), color="gray", ls=":", label="ln 2: an even game")
    axis.legend(fontsize=8)
    axis = panel("adversarial stage: fidelity and spread")
    trained(axis, runs / "apt", "l1", 25, label="L1")
    trained(axis, runs / "apt", "feature_matching", 25, label="feature matching")
    validated(axis, runs / "apt", **{"spread of held-out latents, original 1": "std_1"})
    figure.savefig(out, dpi=100)


# Of real media.


@dataclass(frozen=True)
class Scene:
    """Some frames of a medium, enlarged and restored as one clip."""

    source: Path | str  # below DATA, or anywhere
    start: int = 0
    frames: int = 1
    one_shot: bool = False


@dataclass(frozen=True)
class Crop:
    """A rectangle of one enlarged frame."""

    scene: Scene
    frame: int = 0  # of the source
    y: int = 0
    x: int = 0

    def of(self, clip: np.ndarray, height: int | None = None, width: int | None = None) -> np.ndarray:
        frame = clip[self.frame - self.scene.start]
        return frame[self.y :, self.x :][:height, :width]


class Studio:
    """Enlarges and restores scenes by twice their sides, each of them once."""

    def __init__(self, data: Path):
        self.data = data
        self.models = load_models(*pick("nano"), torch.device("cpu"), torch.float32)
        self.shown: dict[Scene, tuple[np.ndarray, np.ndarray]] = {}

    def show(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Enlarged by bicubic, and restored: T H W 3 in codes of 8 bits."""
        if scene not in self.shown:
            with open_reader(probe(self.data / scene.source)) as reader:
                read = [frame.floats()[..., :3] for frame in islice(reader, scene.start, scene.start + scene.frames)]
            clip = torch.stack(read)
            height, width = (2 * side for side in clip.shape[1:3])
            enlarged = upsample(clip.permute(0, 3, 1, 2), height, width).permute(0, 2, 3, 1)
            restored = restore(clip, self.models, Settings(target=Target.scale(2), one_shot=scene.one_shot))
            self.shown[scene] = to_codes(enlarged), to_codes(restored)
        return self.shown[scene]

    def beside(self, crop: Crop, height: int | None = None, width: int | None = None) -> np.ndarray:
        """Enlarged, left, and restored, right."""
        return side_by_side([crop.of(clip, height, width) for clip in self.show(crop.scene)])

    def split(self, crop: Crop, height: int, width: int) -> np.ndarray:
        """One picture, enlarged left of a white line and restored right of it."""
        before, after = (crop.of(clip, height, width) for clip in self.show(crop.scene))
        middle = width // 2
        return side_by_side([before[:, : middle - 1], after[:, middle + 1 :]], gap=2)

    def profiles(self, crop: Crop, height: int, width: int) -> np.ndarray:
        """How one row of pixels changes from frame to frame, downwards: enlarged, left, and restored, right."""
        rows = [clip[:, crop.y, crop.x : crop.x + width // 2 - 1] for clip in self.show(crop.scene)]
        return side_by_side([row[np.arange(height) * len(row) // height] for row in rows], gap=2)


def to_codes(frames: Tensor) -> np.ndarray:
    return (frames.clamp(0, 1) * 255).round().byte().numpy()


def side_by_side(pictures: Sequence[np.ndarray], gap: int = GAP) -> np.ndarray:
    white = np.full((len(pictures[0]), gap, 3), 255, np.uint8)
    return np.hstack([part for picture in pictures for part in (white, picture)][1:])


def one_above_other(pictures: Sequence[np.ndarray], gap: int = GAP) -> np.ndarray:
    return side_by_side([picture.swapaxes(0, 1) for picture in pictures], gap).swapaxes(0, 1)


def draw_pictures(studio: Studio) -> dict[Path, np.ndarray]:
    """Every picture of nano's work in the documentation and beside the templates."""
    stream = Crop(Scene(MEDIA / "stream.mp4", frames=33), frame=20)
    stones = Crop(Scene("lq/clips/chaplin_640x360_audio.mp4", 32, 17), frame=40, y=40, x=780)
    knitting = Crop(Scene("lq/clips/portrait_480x908_audio.mp4", 21, 17), frame=29, y=820, x=100)
    trip = Scene("lq/clips/roadtrip_10bit_426x240.webm", 26, 33)
    hall = Crop(Scene("lq/clips/museum_256x256.mp4", 0, 17), y=109, x=21)
    plants = Crop(Scene("lq/clips/plants_256x128.mp4", 0, 17), y=100, x=140)
    wolf = Crop(Scene("lq/images/wolf_gray_236x236.jpg"), y=89, x=1)
    tree = Crop(Scene("lq/images/tree_rgba16_342x256.png"), y=113, x=263)
    photo = Crop(Scene("lq/images/oldphoto_scratched_rgba_400x256.png"), y=103, x=265)
    height, width = THUMBNAIL
    half = width // 2 - 1
    before, after = studio.show(trip)
    across = studio.show(replace(trip, one_shot=True))[1]
    cut = [np.hstack([clip[number - trip.start, ::2, ::2] for clip in (before, across, after)]) for number in (41, 42)]
    pictures = {
        "stream_before_after.png": studio.beside(stream),
        "clips_before_after.jpg": one_above_other([studio.beside(crop, 360, 420) for crop in (stones, knitting)]),
        "cut.jpg": np.vstack(cut),
    }
    thumbnails = {
        "restore_video": studio.split(stream, height, width),
        "image_upscale": studio.split(wolf, height, width),
        "image_batch": side_by_side([studio.split(crop, height, half) for crop in (tree, photo)], gap=2),
        "long_video_low_memory": studio.split(plants, height // 2, width // 2).repeat(2, 0).repeat(2, 1),
        "video_stages": studio.split(hall, height, width),
        "compare": side_by_side(
            [studio.split(hall, height, half), studio.profiles(replace(hall, y=240), height, half)], gap=2
        ),
    }
    return {**{MEDIA / name: picture for name, picture in pictures.items()},
            **{THUMBNAILS / f"{name}.jpg": picture for name, picture in thumbnails.items()}}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.nano", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    ended = commands.add_parser("record", help="nano.json and the curves")
    ended.add_argument("--runs", type=Path, required=True)
    ended.add_argument("--card", type=Path, required=True, help="what training.scorecard wrote")
    shown = commands.add_parser("pictures", help="before and after")
    shown.add_argument("--data", type=Path, required=True)
    options = parser.parse_args(argv)
    if options.command == "record":
        (ASSETS / "nano.json").write_text(json.dumps(record(options.runs, options.card), indent=1) + "\n")
        draw_curves(options.runs, MEDIA / "nano_curves.png")
        return
    for path, picture in draw_pictures(Studio(options.data)).items():
        Image.fromarray(picture).save(path, quality=90)


if __name__ == "__main__":
    main()
