"""Evaluation: folders against folders, tables that say what they lack, and what is refused."""

from __future__ import annotations

import json
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image

from seedvr2_core.errors import MediaError, SettingError
from training import evaluate, perceptual
from training.evaluate import (
    BENCHMARKS,
    GROUPS,
    METRICS,
    cut_border,
    eval_items,
    find_sets,
    main,
    parse_metrics,
    read,
    recognise,
)
from training.perceptual import OPTIONAL, MetricMissing, write_lossless
from training.procedural import still


def put(folder, *names, size: int = 48, index: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(still(2, index, size)).save(folder / f"{name}.png")


def put_clip(folder, name: str, frames: int = 3, level: int = 0) -> None:
    (folder / name).mkdir(parents=True)
    for number in range(frames):
        picture = np.full((32, 40, 3), 20 * number + level, np.uint8)
        Image.fromarray(picture).save(folder / name / f"{number:04d}.png")


@pytest.fixture
def folders(tmp_path):
    for side in ("pred", "gt"):
        put(tmp_path / side, "leaves", "stones")
    return tmp_path / "pred", tmp_path / "gt"


def test_folders_are_compared_by_name(folders):
    pred, gt = folders
    Image.fromarray(still(2, 1, 48)).save(pred / "stones.png")
    results = evaluate.evaluate(pred, gt)
    clips = results.sets["pred"]
    assert clips["leaves"]["ssim"] == 1 and clips["stones"]["ssim"] < 0.9
    assert clips["leaves"]["psnr"] == math.inf


def test_a_folder_of_pictures_is_a_clip(tmp_path):
    put_clip(tmp_path / "pred", "walk", level=5)
    put_clip(tmp_path / "gt", "walk")
    values = evaluate.evaluate(tmp_path / "pred", tmp_path / "gt").sets["pred"]["walk"]
    assert values["psnr"] == pytest.approx(20 * math.log10(255 / 5), abs=1e-3)
    assert values["temporal_profile"] < 2


@pytest.mark.parametrize("change", ["size", "length"])
def test_mismatched_sizes_are_an_error_and_name_the_clip(tmp_path, change):
    put_clip(tmp_path / "pred", "walk", frames=4 if change == "length" else 3)
    put_clip(tmp_path / "gt", "walk")
    if change == "size":
        for picture in (tmp_path / "pred/walk").iterdir():
            Image.open(picture).crop((0, 0, 38, 32)).save(picture)
    with pytest.raises(SettingError, match="walk: restored is"):
        evaluate.evaluate(tmp_path / "pred", tmp_path / "gt")


def test_a_missing_or_extra_clip_is_named(folders):
    pred, gt = folders
    put(gt, "more")
    with pytest.raises(MediaError, match="lacks more"):
        find_sets(pred, gt)
    (gt / "more.png").rename(pred / "other.png")
    with pytest.raises(MediaError, match="has other beside"):
        find_sets(pred, gt)


def test_the_border_is_left_out(folders):
    pred, gt = folders
    picture = still(2, 0, 48).copy()
    picture[:4] = 0
    for name in ("leaves", "stones"):
        Image.fromarray(picture).save(pred / f"{name}.png")
    assert evaluate.evaluate(pred, gt, ["psnr"]).sets["pred"]["leaves"]["psnr"] < 30
    assert evaluate.evaluate(pred, gt, ["psnr"], border=4).sets["pred"]["leaves"]["psnr"] == math.inf
    with pytest.raises(SettingError, match="does not fit"):
        cut_border(read(pred / "leaves.png"), 24)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_benchmarks_are_recognised_by_their_folders(tmp_path, benchmark):
    for name in (benchmark.name, benchmark.name.lower(), f"{benchmark.name}_x4"):
        assert recognise(tmp_path / name) == benchmark
        assert recognise(tmp_path / name / "results") == benchmark
    assert recognise(tmp_path / "holiday") is None


def test_several_benchmarks_are_measured_at_once_each_with_its_originals(tmp_path):
    put(tmp_path / "pred/UDM10", "a", "b")
    put(tmp_path / "gt/udm10/GT", "a", "b")
    put(tmp_path / "gt/udm10/LQ", "a", "b", size=12)
    put(tmp_path / "pred/VideoLQ", "c")
    results = evaluate.evaluate(tmp_path / "pred", tmp_path / "gt", ["psnr"])
    assert set(results.sets["UDM10"]) == {"a", "b"}
    assert results.sets["VideoLQ"] == {"c": {}}
    assert results.remarks == ["UDM10: 2 of 10 clips", "VideoLQ: 1 of 50 clips"]


def test_without_originals_only_metrics_that_need_none_can_run(folders):
    with pytest.raises(SettingError, match="without originals"):
        evaluate.evaluate(folders[0], None)


def test_metrics_are_chosen_by_name_and_in_groups():
    assert parse_metrics("lpips, SSIM,psnr") == ("psnr", "ssim", "lpips")
    assert parse_metrics("all") == tuple(METRICS)
    assert parse_metrics("panel,clip-iqa") == (*GROUPS["panel"], "clip_iqa")
    with pytest.raises(SettingError, match="no metric 'pnsr'"):
        parse_metrics("pnsr")


@pytest.mark.parametrize("metric", OPTIONAL, ids=lambda metric: metric.name)
def test_an_optional_metric_that_is_missing_says_what_it_needs(metric, monkeypatch):
    def missing(name, package=None):
        raise MetricMissing(f"it needs the library {package or name}")

    monkeypatch.setattr(perceptual, "library", missing)
    monkeypatch.setattr(perceptual.shutil, "which", lambda name: None)
    monkeypatch.delenv(perceptual.DOVER_VARIABLE, raising=False)
    with pytest.raises(MetricMissing, match="it needs"):
        metric.open(torch.device("cpu"))


def test_a_library_that_is_not_installed_is_named():
    with pytest.raises(MetricMissing, match="pip install no_such_library"):
        perceptual.library("no_such_library")


def test_weights_that_cannot_be_had_are_named(monkeypatch):
    def create_metric(name, device):
        raise OSError("no route to host")

    monkeypatch.setattr(perceptual, "library", lambda *names: types.SimpleNamespace(create_metric=create_metric))
    with pytest.raises(MetricMissing, match="no route to host"):
        METRICS["musiq"].open(torch.device("cpu"))


def test_what_is_missing_is_in_every_table_and_what_is_there_is_measured(folders, tmp_path, monkeypatch, capsys):
    def missing(name, package=None):
        raise MetricMissing(f"it needs the library {package or name}; pip install {package or name}")

    monkeypatch.setattr(perceptual, "library", missing)
    command = ["--pred", str(folders[0]), "--gt", str(folders[1]), "--out", str(tmp_path / "out/table")]
    # Asked for by name: measured without it, but not as if nothing were amiss.
    assert main([*command, "--metrics", "psnr,ssim,lpips"]) == 1
    written = json.loads((tmp_path / "out/table.json").read_text())
    assert list(written["not_measured"]) == ["lpips"] and "pip install" in written["not_measured"]["lpips"]
    assert written["sets"]["pred"]["mean"] == {"psnr": "inf", "ssim": 1.0}
    assert written["options"]["metrics"] == ["psnr", "ssim", "lpips"] and "torch" in written["versions"]
    table = (tmp_path / "out/table.md").read_text()
    assert "| pred | 2 | inf | 1.000 |" in table and "- not measured: lpips, it needs" in table
    assert table.strip() in capsys.readouterr().out
    assert main([*command, "--metrics", "panel"]) == 0


def test_a_networks_version_and_weights_are_recorded(folders, monkeypatch):
    class Distance(torch.nn.Linear):
        def __init__(self, **options):
            super().__init__(1, 1)
            torch.nn.init.ones_(self.weight)

        def forward(self, pred, gt):
            assert pred.max() <= 1 and pred.shape == gt.shape
            return (pred - gt).abs().mean()

    fake = types.SimpleNamespace(LearnedPerceptualImagePatchSimilarity=Distance)
    monkeypatch.setattr(perceptual, "library", lambda *names: fake)
    pred, gt = folders
    for folder in folders:
        put(folder, "leaves", "stones", size=64)
    results = evaluate.evaluate(pred, gt, ["lpips"])
    assert results.sets["pred"]["leaves"] == {"lpips": 0.0}
    assert len(results.versions["lpips"]["weights"]) == 16


def test_a_lossless_file_holds_the_frames_exactly(tmp_path):
    frames = torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8)
    assert torch.equal(read(write_lossless(tmp_path / "clip.mkv", frames)), frames)


def test_a_refusal_is_one_sentence_and_exit_code_1(tmp_path, capsys):
    assert main(["--pred", str(tmp_path / "nowhere"), "--gt", str(tmp_path)]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_eval_items_are_cut_and_degraded_the_same_every_time(tmp_path):
    (tmp_path / "eval/images").mkdir(parents=True)
    Image.fromarray(still(2, 0, 90)).save(tmp_path / "eval/images/leaves.png")
    (item,) = eval_items(tmp_path, side=64)
    (whole,) = eval_items(tmp_path)
    assert item.name == "leaves" and item.frames.shape == (1, 3, 64, 64)
    assert torch.equal(item.frames, whole.frames[..., 13:77, 13:77])
    assert item.degraded().shape == (1, 3, 16, 16)
    assert torch.equal(item.degraded(), item.degraded())


def test_eval_items_need_something_to_evaluate(tmp_path):
    with pytest.raises(MediaError, match="nothing to evaluate"):
        next(eval_items(tmp_path))
