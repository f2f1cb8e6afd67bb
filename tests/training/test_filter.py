"""What is seen in a source, which limits it breaks, and that training leaves out what does."""

from __future__ import annotations

import io
import json

import av
import numpy as np
import pytest
from PIL import Image

from seedvr2_core.errors import MediaError
from seedvr2_core.video.shots import thumbnail
from training.data import FILTER_FILE, DataConfig, Dataset, left_out
from training.filter import (
    Limits,
    Seen,
    blockiness,
    broken,
    difference_hash,
    duplicates,
    judge,
    load_table,
    look,
    main,
    measure,
    noise,
)
from training.procedural import moving_view, still
from training.randomness import rng

ANYTHING = Limits(image_pixels=None, clip_side=None, block_quantile=None, noise_quantile=None)


def luma(picture: np.ndarray) -> np.ndarray:
    return picture @ np.array([0.299, 0.587, 0.114], np.float32)


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def moving(frames: int = 8, seed: int = 0) -> np.ndarray:
    return moving_view(still(0, seed, 160), rng(seed, "test"), frames, 64)


def write_clip(path, frames: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def seen(number: int, **changes) -> Seen:
    usual = {"source": f"{number:03d}", "kind": "image", "version": "1", "width": 64, "height": 64, "frames": 1,
             "hash": f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}", "blockiness": 1.0}  # fmt: skip
    return Seen(**{**usual, **changes})


def test_a_frozen_clip_has_no_motion_and_a_strobing_one_has_much():
    frozen = measure(iter(moving()[:1].repeat(6, axis=0)), "clip")
    assert frozen.motion == 0 and broken(frozen, ANYTHING) == ["least_motion"]
    strobe = np.zeros((6, 64, 64, 3), np.uint8)
    strobe[::2] = 90
    assert broken(measure(iter(strobe), "clip"), ANYTHING) == ["most_motion"]
    usual = measure(iter(moving()), "clip")
    assert 0.5 < usual.motion < 40 and broken(usual, ANYTHING) == []


def test_a_cut_is_counted_and_is_no_motion():
    shots = np.concatenate([np.full((6, 48, 48, 3), colour, np.uint8) for colour in ((200, 40, 20), (20, 40, 200))])
    found = measure(iter(shots), "clip")
    assert (found.frames, found.cuts, found.motion) == (12, 1, 0.0)
    assert "cuts" in broken(found, Limits(cuts=0)) and "cuts" not in broken(found, Limits())


def test_bars_are_found_on_both_sides_and_in_all_frames():
    clip = moving(frames=60)
    clip[:, :8] = clip[:, -8:] = 16
    clip[0] = 0
    found = measure(iter(clip), "clip")
    assert found.letterbox == pytest.approx(16 / 64) and "letterbox" in broken(found, ANYTHING)
    clip[:, -8:] = 120
    assert measure(iter(clip), "clip").letterbox == 0


def test_coarse_jpeg_is_blockier_wherever_its_grid_lies():
    picture = still(0, 1, 160)
    coarse = jpeg(picture, 10)
    assert blockiness(luma(picture)) < 1.15 < 1.35 < blockiness(luma(coarse))
    assert blockiness(luma(coarse[3:, 5:])) > 1.35


@pytest.mark.parametrize("sigma", [2, 8, 20])
def test_noise_is_measured_in_codes(sigma):
    y, x = np.mgrid[0:128, 0:128]
    ramp = 60 + 0.5 * x + 0.3 * y
    assert noise(ramp) < 0.1
    assert noise(ramp + np.random.default_rng(0).normal(0, sigma, ramp.shape)) == pytest.approx(sigma, rel=0.15)


def test_the_hash_survives_recompression_and_size_and_tells_pictures_apart():
    pictures = [still(0, number, 192) for number in range(6)]
    hashes = [difference_hash(thumbnail(picture)) for picture in pictures]
    small = np.asarray(Image.fromarray(jpeg(pictures[0], 40)).resize((120, 120), Image.Resampling.BICUBIC))
    assert (hashes[0] ^ difference_hash(thumbnail(small))).bit_count() <= 4
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 8


def test_of_nearly_equal_pictures_the_largest_stays():
    base = int(seen(7).hash, 16)
    near = f"{base ^ 0b1000000000000000000000000000000010000000000000001001:016x}"
    rows = {0: seen(0, hash=near), 1: seen(1, hash=seen(7).hash, width=128), 2: seen(2)}
    assert duplicates(rows, bits=4) == [0]
    assert duplicates(rows, bits=3) == []


def test_a_duplicate_of_what_is_left_out_stays():
    rows = [seen(0, width=128, letterbox=0.3), seen(1, hash=seen(0).hash)]
    assert judge(rows, ANYTHING) == [["letterbox"], []]


def test_the_worst_tenth_of_each_kind_is_left_out():
    clips = [seen(n, kind="clip", motion=1.0, noise=50.0) for n in (30, 31)]
    rows = [seen(n, noise=float(n)) for n in range(20)] + clips
    fails = judge(rows, Limits(image_pixels=None, clip_side=None))
    assert [i for i, why in enumerate(fails) if "noise_quantile" in why] == [19]
    few = judge(rows[:3], Limits(image_pixels=None))
    assert few == [[], [], []]


def test_an_unreadable_file_is_a_row_that_fails_and_says_why(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a film")
    row = look(tmp_path / "broken.mp4", "clip", tmp_path)
    assert "broken.mp4" in row.error and broken(row, Limits()) == ["unreadable"]


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        Image.fromarray(still(0, number, 64)).save(tmp_path / f"photo{number}.png")
    Image.fromarray(still(0, 2, 64)).save(tmp_path / "photo2_again.png")
    Image.fromarray(still(0, 4, 24)).save(tmp_path / "small.png")
    write_clip(tmp_path / "walk.mp4", moving())
    write_clip(tmp_path / "frozen.mp4", moving(seed=1)[:1].repeat(8, axis=0))
    return tmp_path


COMMAND = ["image_pixels=4096", "clip_side=64", "block_quantile=none", "noise_quantile=none"]


def test_the_command_writes_a_table_that_training_honours(folder, capsys):
    assert main(["filter", "--data", str(folder), *COMMAND]) == 0
    printed = capsys.readouterr().out
    assert "3 of 5 images pass" in printed and "1 fail duplicate_bits" in printed and "1 of 2 clips pass" in printed
    assert left_out(folder) == {"photo2_again.png", "small.png", "frozen.mp4"}
    dataset = Dataset.load(folder, DataConfig(stills=0))
    assert (dataset.images.names, dataset.clips.names) == (["photo0.png", "photo1.png", "photo2.png"], ["walk.mp4"])


def test_other_limits_need_no_second_look_and_a_changed_file_does(folder, monkeypatch):
    assert main(["filter", "--data", str(folder), *COMMAND]) == 0
    before = load_table(folder / FILTER_FILE)
    looked = []

    def noted(path, *args):
        looked.append(path.name)
        return look(path, *args)

    monkeypatch.setattr("training.filter.look", noted)
    assert main(["filter", "--data", str(folder), *COMMAND, "image_pixels=100", "duplicate_bits=none"]) == 0
    assert not looked and load_table(folder / FILTER_FILE) == before
    assert left_out(folder) == {"frozen.mp4"}
    Image.fromarray(still(0, 5, 80)).save(folder / "small.png")
    assert main(["filter", "--data", str(folder), *COMMAND]) == 0
    assert looked == ["small.png"] and "small.png" not in left_out(folder)


def test_a_table_elsewhere_changes_nothing_and_says_so(folder, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("tables") / "table.jsonl"
    assert main(["filter", "--data", str(folder), "--out", str(out), *COMMAND]) == 0
    assert "to train on what passes" in capsys.readouterr().out
    assert left_out(folder) is None
    row = json.loads(out.read_text().splitlines()[0])
    assert set(row) > {"source", "width", "motion", "letterbox", "hash", "blockiness", "noise", "fails"}


def test_the_command_says_in_words_what_it_cannot_do(tmp_path, capsys):
    assert main(["filter", "--data", str(tmp_path)]) == 1
    assert "no training media" in capsys.readouterr().err
    assert main(["filter", "--data", str(tmp_path / "nowhere")]) == 1
    assert "not a folder" in capsys.readouterr().err
    assert main(["filter", "--data", str(tmp_path), "noise_quantil=0.5"]) == 1
    assert "noise_quantile" in capsys.readouterr().err


def test_something_else_in_place_of_the_table_is_refused(folder):
    (folder / FILTER_FILE).write_text('{"sources": []}\n')
    with pytest.raises(MediaError, match="is no table"):
        Dataset.load(folder)
    with pytest.raises(MediaError, match="is no table"):
        load_table(folder / FILTER_FILE)


def test_a_table_that_leaves_nothing_is_named(folder):
    main(["filter", "--data", str(folder), "image_pixels=1000000000", "clip_side=100000"])
    with pytest.raises(MediaError, match=f"{FILTER_FILE} leaves none of .* other limits"):
        Dataset.load(folder, DataConfig(stills=0))
