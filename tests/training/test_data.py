"""Sources, crops and pairs: a pure function of seed and position, with what they may not hold left out."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from seedvr2_core.errors import MediaError, SettingError
from training.data import (
    CLIP_SUFFIXES,
    EXCLUDED_STEMS,
    IMAGE_SUFFIXES,
    DataConfig,
    Dataset,
    PairJob,
    decode,
    list_media,
    write_pairs,
)
from training.degradation import MIXTURES
from training.procedural import moving_view, still
from training.randomness import key, rng, torch_rng

TINY = DataConfig(stills=2, still_size=96)


def write_clip(path, frames: int = 6, size: int = 64) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            picture = np.full((size, size, 3), 30 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "train/images").mkdir(parents=True)
    (folder / "train/clips").mkdir()
    for index in range(3):
        Image.fromarray(still(5, index, 120)).save(folder / f"train/images/photo{index}.png")
    write_clip(folder / "train/clips/grey.mp4")
    write_clip(folder / f"train/clips/{EXCLUDED_STEMS[0]}.mp4")
    return folder


@pytest.fixture(scope="module")
def dataset(root):
    return Dataset.load(root, TINY)


def test_keys_differ_in_every_argument_and_never_change():
    places = [(0, "crop", 0, 0), (1, "crop", 0, 0), (0, "noise", 0, 0), (0, "crop", 1, 0), (0, "crop", 0, 1)]
    assert len({key(*place) for place in places}) == len(places)
    # A checkpoint resumes into the same stream only while this number stays.
    assert key(0, "crop", 0, 0) == 4208231453201670769


def test_a_generator_does_not_depend_on_what_was_drawn_before():
    expected = rng(0, "noise", 3, 1).random(4)
    rng(0, "noise", 3, 0).random(100)
    np.testing.assert_array_equal(rng(0, "noise", 3, 1).random(4), expected)
    first, second = (torch.randn(4, generator=torch_rng(0, "noise", 3, 1)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_procedural_picture_is_reproducible_and_has_detail():
    picture = still(0, 3, 96)
    assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, still(0, 3, 96))
    assert not np.array_equal(picture, still(0, 4, 96))
    assert picture.std() > 10


def test_a_moving_view_moves():
    view = moving_view(still(0, 0, 128), rng(0, "test"), frames=5, size=64)
    assert view.shape == (5, 64, 64, 3) and view.dtype == np.uint8
    changes = np.abs(np.diff(view.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert (changes > 0.5).all()


def test_loading_leaves_out_what_may_not_be_trained_on(dataset):
    assert (len(dataset.images), len(dataset.clips), len(dataset.stills)) == (3, 1, 2)
    assert dataset.clips[0].shape == (6, 64, 64, 3)


def test_every_non_commercial_training_file_is_excluded(sample):
    manifest = json.loads(sample("manifest.json").read_text())
    restricted = {
        item["file"].rsplit("/", 1)[-1].rsplit(".", 1)[0]
        for item in manifest["items"]
        if item["set"] == "train" and "non-commercial" in item["licence"].lower()
    }
    assert restricted == set(EXCLUDED_STEMS)


def test_every_training_file_is_found(sample):
    train = sample("manifest.json").parent / "train"
    assert len(list_media(train / "images", IMAGE_SUFFIXES, EXCLUDED_STEMS)) == 111
    assert len(list_media(train / "clips", CLIP_SUFFIXES, EXCLUDED_STEMS)) == 24


def test_a_cache_gives_the_same_crops(root, dataset, tmp_path):
    for _ in range(2):
        cached = Dataset.load(root, TINY, cache_dir=tmp_path)
        assert torch.equal(cached.sample_batch(4, batch=4, size=32), dataset.sample_batch(4, batch=4, size=32))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(("kind", "frames"), [("image", 1), ("clip", 5)])
def test_a_batch_depends_on_its_step_alone(dataset, kind, frames):
    batch = dataset.sample_batch(9, kind=kind, batch=3, size=32, frames=frames)
    assert batch.shape == (3, 3, frames, 32, 32) and batch.dtype == torch.float32
    assert batch.min() >= -1 and batch.max() <= 1
    dataset.sample_batch(8, kind=kind, batch=3, size=32, frames=frames)
    assert torch.equal(batch, dataset.sample_batch(9, kind=kind, batch=3, size=32, frames=frames))
    assert not torch.equal(batch, dataset.sample_batch(10, kind=kind, batch=3, size=32, frames=frames))


def test_a_crop_does_not_depend_on_the_batch_around_it(dataset):
    batch = dataset.sample_batch(2, batch=4, size=32)
    torch.testing.assert_close(dataset.crop(2, 3, size=32) / 127.5 - 1, batch[3])


def test_real_and_procedural_sources_mix_in_their_shares():
    white, black = np.full((1, 64, 64, 3), 255, np.uint8), np.zeros((1, 64, 64, 3), np.uint8)
    mixed = Dataset([white], [], [black], DataConfig(real=0.8))
    shares = [mixed.crop(0, slot, size=16).float().mean() / 255 for slot in range(500)]
    assert np.mean(shares) == pytest.approx(0.8, abs=0.05)


def test_a_clip_keeps_its_frames_in_order(root):
    only_clips = Dataset.load(root, DataConfig(stills=0, real=1.0, moving_photo=0.0))
    for slot in range(5):
        levels = only_clips.crop(0, slot, kind="clip", size=16, frames=5).float().mean(dim=(0, 2, 3))
        assert (levels.diff() > 15).all()


def test_procedural_pictures_alone_are_enough():
    alone = Dataset.load(None, TINY)
    assert alone.sample_batch(0, batch=2, size=32).shape == (2, 3, 1, 32, 32)
    assert alone.sample_batch(0, kind="clip", batch=1, size=32, frames=5).shape == (1, 3, 5, 32, 32)


def test_a_pair_is_a_crop_and_its_degraded_self(dataset):
    clean, degraded = dataset.pair(6, MIXTURES["nano"], size=64)
    assert torch.equal(clean, dataset.crop(6, size=64))
    assert degraded.shape == clean.shape == (3, 1, 64, 64) and degraded.dtype == torch.uint8
    difference = (clean.float() - degraded.float()).abs().mean()
    assert 1 < difference < 80


def test_written_pairs_do_not_depend_on_the_number_of_workers(root, dataset, tmp_path):
    job = PairJob(root=root, cache_dir=tmp_path / "cache", count=5, size=32, data=TINY)
    one = np.load(write_pairs(tmp_path / "one.npy", job, workers=1))
    two = np.load(write_pairs(tmp_path / "two.npy", job, workers=2))
    assert one.shape == (5, 2, 3, 1, 32, 32)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[3], dataset.pair(3, MIXTURES["nano_mixed"], size=32).numpy())


def test_a_crop_larger_than_every_source_is_refused(dataset):
    with pytest.raises(SettingError, match="smaller crop"):
        dataset.sample_batch(0, batch=1, size=512)


def test_an_image_of_several_frames_is_refused(dataset):
    with pytest.raises(SettingError, match="kind='clip'"):
        dataset.sample_batch(0, batch=1, size=32, frames=5)


def test_a_folder_without_media_is_refused(tmp_path):
    with pytest.raises(MediaError, match="no training media"):
        Dataset.load(tmp_path, TINY)


def test_a_broken_file_is_named(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a film")
    with pytest.raises(MediaError, match=r"broken\.mp4"):
        decode(broken)


def test_an_unknown_degradation_is_refused(root, tmp_path):
    with pytest.raises(SettingError, match="nano"):
        write_pairs(tmp_path / "x.npy", PairJob(root=root, cache_dir=tmp_path, count=1, degradation="odd"))
