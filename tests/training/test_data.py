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
    MOST_HELD_OUT,
    DataConfig,
    Dataset,
    Loader,
    Pool,
    decode,
    list_media,
    list_sources,
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
    assert dataset.clips.sources[0].shape == (6, 64, 64, 3)


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


def test_a_sample_has_as_many_variants_as_asked_for_and_says_how_they_came_about(dataset):
    sample = dataset.sample(6, MIXTURES["mixed"], size=(48, 64), variants=2)
    assert sample.clean.shape == (3, 1, 48, 64)
    assert [degraded.shape for degraded in sample.degraded] == [sample.clean.shape] * 2
    assert not torch.equal(*sample.degraded)
    assert json.loads(json.dumps(sample.about)) == sample.about
    assert len(sample.about["degradations"]) == 2 and sample.about["source"]
    assert torch.equal(sample.degraded[0], dataset.pair(6, MIXTURES["mixed"], size=(48, 64))[1])


def test_a_crop_may_have_any_shape(dataset):
    assert dataset.crop(0, size=(32, 80)).shape == (3, 1, 32, 80)
    assert dataset.crop(0, kind="clip", size=(40, 24), frames=5).shape == (3, 5, 40, 24)


def test_frames_before_a_crop_lead_up_to_it_and_are_dropped(root):
    only_clips = Dataset.load(root, DataConfig(stills=0, real=1.0, moving_photo=0.0))
    leads = []
    for index in range(12):
        sample = only_clips.sample(index, MIXTURES["nano"], kind="clip", size=32, frames=1)
        leads.append(sample.about["degradations"][0]["lead"])
        assert leads[-1] == sample.about["start"]
        assert sample.degraded[0].shape == sample.clean.shape == (3, 1, 32, 32)
    assert len(set(leads)) > 2


def two_shots() -> np.ndarray:
    red, blue = (np.full((6, 48, 48, 3), colour, np.uint8) for colour in ((200, 40, 20), (20, 40, 200)))
    return np.concatenate([red, blue])


def test_a_clip_is_split_where_it_cuts_to_another_shot(tmp_path):
    (tmp_path / "clips/film").mkdir(parents=True)
    for number, frame in enumerate(two_shots()):
        Image.fromarray(frame).save(tmp_path / f"clips/film/{number:03d}.png")
    dataset = Dataset.load(tmp_path, DataConfig(stills=0, real=1.0, moving_photo=0.0))
    assert [len(shot) for shot in dataset.clips.sources] == [6, 6]
    for slot in range(8):
        crop = dataset.crop(0, slot, kind="clip", size=16, frames=5).float()
        assert crop.std(dim=1).max() < 1


def test_clips_that_are_not_kept_give_the_same_crops(tmp_path):
    (tmp_path / "clips/film").mkdir(parents=True)
    for number, frame in enumerate(two_shots()):
        Image.fromarray(frame + np.uint8(number)).save(tmp_path / f"clips/film/{number:03d}.png")
    config = DataConfig(stills=0, real=1.0, moving_photo=0.0)
    kept, lazy = (Dataset.load(tmp_path, DataConfig(**{**vars(config), "keep_clips": keep})) for keep in (True, False))
    for slot in range(3):
        crops = [data.crop(0, slot, kind="clip", size=16, frames=5) for data in (kept, lazy)]
        assert torch.equal(*crops)


def test_a_folder_of_ones_own_needs_no_layout(tmp_path):
    (tmp_path / "holiday/raw").mkdir(parents=True)
    (tmp_path / "holiday/0001").mkdir()
    (tmp_path / "eval").mkdir()
    for name in ("holiday/beach", "holiday/raw/img_1234", "holiday/raw/img_1235", "eval/kept_out"):
        Image.fromarray(still(0, 0, 32)).save(tmp_path / f"{name}.png")
    for number in range(3):
        Image.fromarray(still(0, 0, 32)).save(tmp_path / f"holiday/0001/{number:05d}.png")
    write_clip(tmp_path / "holiday/walk.mp4")
    images, clips = list_sources(tmp_path)
    assert [path.stem for path in images] == ["beach", "img_1234", "img_1235"]
    assert [path.name for path in clips] == ["walk.mp4", "0001"]


def test_an_unreadable_file_is_left_out_named_and_counted(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.fromarray(still(0, number, 64)).save(tmp_path / f"images/photo{number}.png")
    (tmp_path / "broken.mp4").write_bytes(b"not a film")
    dataset = Dataset.load(tmp_path, TINY)
    assert len(dataset.images) == 3 and not dataset.clips
    assert [path.name for path in dataset.unreadable] == ["broken.mp4"]
    assert "broken.mp4" in caplog.text
    (tmp_path / "images/photo0.png").write_bytes(b"no picture")
    with pytest.raises(MediaError, match="2 of 4 files cannot be read"):
        Dataset.load(tmp_path, TINY)


def test_a_film_that_breaks_off_is_left_out_and_named(tmp_path):
    for name in ("whole", "half"):
        write_clip(tmp_path / f"{name}.mp4")
    content = (tmp_path / "half.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[: len(content) // 2])
    dataset = Dataset.load(tmp_path, TINY)
    assert dataset.clips.names == ["whole.mp4"]
    assert [path.name for path in dataset.unreadable] == ["half.mp4"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_that_breaks_off_is_named(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(still(0, 0, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(MediaError, match=f"photo.{suffix} cannot be decoded"):
        decode(path)


def test_sources_of_one_name_in_different_folders_are_both_used(tmp_path):
    for number, folder in enumerate(("a/x/y/z", "b/x/y/z")):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(still(0, number, 32)).save(tmp_path / folder / "photo.png")
    assert Dataset.load(tmp_path, TINY).images.names == ["a/x/y/z/photo.png", "b/x/y/z/photo.png"]


def test_a_changed_file_is_decoded_anew_in_spite_of_the_cache(tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(still(0, 0, 32)).save(photo)
    (before,) = Loader(tmp_path / "cache").images([photo]).values()
    Image.fromarray(still(0, 1, 40)).save(photo)
    (after,) = Loader(tmp_path / "cache").images([photo]).values()
    assert before.shape[1] == 32 and after.shape[1] == 40


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


SOURCES = {name: np.full((1, 64, 64, 3), level, np.uint8) for level, name in enumerate(
    [f"photo{n}.png" for n in range(28)] + ["film.mp4#0", "film.mp4#1"])}  # fmt: skip


def drawn_from(dataset: Dataset, part: str) -> set[str]:
    return {dataset.sample(i, MIXTURES["nano"], size=16, part=part).about["source"] for i in range(120)}


def test_what_is_kept_for_validation_is_never_trained_on():
    config = DataConfig(stills=0, real=1.0, held_out=0.2)
    dataset = Dataset(SOURCES, {}, [], config)
    held_out, training = drawn_from(dataset, "held out"), drawn_from(dataset, "training")
    assert held_out | training == set(SOURCES) and not held_out & training
    assert len(held_out) in (5, 6) and dataset.split() == f"Kept for validation: {len(held_out)} of 30 photographs."


def test_a_film_is_kept_with_all_its_shots_wherever_it_lies():
    kept = []
    for seed in range(40):
        for names in (list(SOURCES), list(reversed(SOURCES))):
            pool = Pool.of({name: SOURCES[name] for name in names}, "image", DataConfig(seed=seed))
            kept.append({pool.names[i] for i in pool.held_out})
    assert kept[::2] == kept[1::2]
    films = [{name for name in names if "film" in name} for names in kept]
    assert set() in films and {"film.mp4#0", "film.mp4#1"} in films and all(len(film) != 1 for film in films)


def test_no_more_are_kept_than_a_validation_looks_at():
    assert len(Pool.of([SOURCES["photo0.png"]] * 1000, "image", DataConfig()).held_out) == MOST_HELD_OUT


def test_of_few_sources_none_is_kept_and_that_is_said():
    few = Dataset({name: SOURCES[name] for name in list(SOURCES)[:9]}, {}, [], DataConfig(stills=0, real=1.0))
    assert drawn_from(few, "held out") == drawn_from(few, "training") == set(list(SOURCES)[:9])
    assert few.split().endswith("0 of 9 photographs. So few photographs are trained on and validated with alike.")


def test_a_crop_larger_than_what_is_kept_comes_from_the_rest():
    sources = {name: np.repeat(np.repeat(frames, 2, 1), 2, 2) for name, frames in SOURCES.items()}
    config = DataConfig(stills=0, real=1.0)
    pool = Pool.of(sources, "image", config)
    small = {name: SOURCES[name] if i in pool.held_out else frames for i, (name, frames) in enumerate(sources.items())}
    sample = Dataset(small, {}, [], config).sample(0, MIXTURES["nano"], size=100, part="held out")
    assert sample.clean.shape[-1] == 100


def film(height: int, width: int, frames: int = 6) -> np.ndarray:
    return np.arange(frames, dtype=np.uint8)[:, None, None, None] + np.zeros((frames, height, width, 3), np.uint8)


@pytest.mark.parametrize("stills", [0, 2])
def test_without_photographs_pictures_are_frames_of_clips(stills):
    pictures = [np.full((1, 64, 64, 3), 99, np.uint8)] * stills
    dataset = Dataset({}, {"film.mp4": film(64, 64)}, pictures, DataConfig(real=1.0, moving_photo=0.0))
    samples = [dataset.sample(i, MIXTURES["nano"], size=32) for i in range(20)]
    assert {sample.about["source"] for sample in samples} == {"film.mp4"}
    assert {sample.clean[0, 0, 0, 0].item() for sample in samples} == set(range(6))


def test_clips_that_are_not_kept_decoded_give_pictures_too(root):
    clips = Dataset.load(root, DataConfig(stills=0, keep_clips=False)).clips
    alone = Dataset({}, dict(zip(clips.names, clips.sources, strict=True)), [], DataConfig(moving_photo=1.0))
    assert alone.crop(0, size=32).shape == (3, 1, 32, 32)
    assert alone.crop(0, kind="clip", size=32, frames=5).shape == (3, 5, 32, 32)


@pytest.mark.parametrize(
    "config, kind, size, fits",
    [
        (DataConfig(real=1.0, moving_photo=0.0), "clip", (64, 96), True),
        (DataConfig(real=1.0, moving_photo=0.0), "clip", (96, 64), False),
        # A camera needs room to move over a photograph.
        (DataConfig(real=1.0), "clip", (64, 96), False),
        (DataConfig(real=1.0), "clip", (64, 64), True),
        (DataConfig(real=1.0), "image", (96, 96), True),
        # A fifth of the pictures are procedural ones, which are smaller here.
        (DataConfig(real=0.8), "image", (96, 96), False),
        (DataConfig(real=0.8), "image", (48, 48), True),
    ],
)
def test_a_size_fits_if_all_that_it_may_be_cut_from_have_it(config, kind, size, fits):
    photo, still = np.zeros((1, 96, 96, 3), np.uint8), np.zeros((1, 48, 48, 3), np.uint8)
    dataset = Dataset([photo], [film(64, 96)], [still], config)
    assert dataset.fits(kind, size, 5 if kind == "clip" else 1) is fits
    if fits:
        for index in range(20):
            dataset.crop(index, kind=kind, size=size, frames=5 if kind == "clip" else 1)
