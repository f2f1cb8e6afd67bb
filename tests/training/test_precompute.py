"""Precomputing: samples depend on their number alone, shards are made once, by whoever, and never by halves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from seedvr2_core.checkpoints import load_prompts
from seedvr2_core.errors import MediaError, SettingError
from seedvr2_core.models.vae import VAEConfig, VideoVAE
from tests.training.test_data import write_clip
from training import precompute
from training.buckets import aspect_sizes
from training.config import to_yaml
from training.data import DataConfig, Dataset
from training.precompute import (
    REPLACED,
    Captions,
    PairCrops,
    Precompute,
    Work,
    encode,
    main,
    make_sample,
    parse_part,
    run,
    tasks,
)
from training.procedural import still
from training.shards import HELD_OUT, Latents, ShardReader
from training.weights import latent_scale, open_vae, published

CONFIG = Precompute(
    vae=Path("unused"),
    crops=(PairCrops(kind="image", count=5, size=32, aspects=3), PairCrops(kind="clip", count=3, size=32, frames=5)),
    degradation="nano",
    variants=2,
    data=DataConfig(seed=1, stills=2, still_size=96),
    shard_samples=2,
    batch=2,
    workers=0,
)
SHARDS = ["image-1x32x3-000000", "image-1x32x3-000001", "image-1x32x3-000002", "clip-5x32-000000", "clip-5x32-000001"]


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(VAEConfig(widths=(8, 8, 8, 8), blocks=1, groups=2, scale=1.0)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    run(CONFIG, folder, None, vae)
    return folder


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_every_sample_is_in_one_shard(folder):
    assert [task.name for task in tasks(CONFIG)] == SHARDS
    reader = ShardReader(folder)
    assert len(reader) == 8 and reader.variants == 2
    assert [reader.about(i)["index"] for i in range(8)] == [0, 1, 2, 3, 4, 0, 1, 2]


def test_a_latent_is_that_of_its_pixels(folder, vae):
    mean = replace(CONFIG, latent="mean", dtype="fp32", crops=CONFIG.crops[1:])
    target = folder.parent / "mean"
    run(mean, target, None, vae)
    sample = make_sample(Dataset.load(None, CONFIG.data), mean, mean.crops[0], 1)
    hq, lq, _, _ = ShardReader(target).read(1, variant=1)
    torch.testing.assert_close(hq, encode(vae, sample.clean[None], None)[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lq, encode(vae, sample.degraded[1][None], None)[0], atol=1e-5, rtol=1e-4)


def test_the_samples_for_validation_are_from_sources_of_their_own():
    data = replace(CONFIG.data, stills=30, still_size=64)
    config = replace(CONFIG, crops=(PairCrops(kind="image", count=HELD_OUT + 60, size=32),), variants=1, data=data)
    dataset = Dataset.load(None, data)
    sources = [make_sample(dataset, config, config.crops[0], i).about["source"] for i in range(HELD_OUT + 60)]
    assert len(set(sources[:HELD_OUT])) > 1 and not set(sources[:HELD_OUT]) & set(sources[HELD_OUT:])


WIDE = {"film.mp4": np.zeros((5, 48, 96, 3), np.uint8)}


def test_shapes_that_the_data_is_too_small_for_are_left_out():
    crops = PairCrops(kind="clip", count=40, size=48, frames=5, aspects=5)
    dataset = Dataset({}, WIDE, [], DataConfig(seed=1, real=1.0))
    config = replace(CONFIG, crops=(crops,), variants=1, data=dataset.config)
    shapes = {tuple(make_sample(dataset, config, crops, i).clean.shape[2:]) for i in range(40)}
    assert shapes == set(crops.sizes(dataset)) and len(shapes) > 1
    assert all(h <= 48 and w <= 96 for h, w in shapes)
    assert any(h > 48 for h, w in aspect_sizes(48**2, 5))


def test_no_shape_makes_a_file_for_validation_one_to_train_on():
    tall = {f"{n}.png": np.zeros((1, 96, 48, 3), np.uint8) for n in range(10)}
    wide = {f"wide{n}.png": np.zeros((1, 48, 96, 3), np.uint8) for n in range(10)}
    for seed in range(8):
        dataset = Dataset(tall | wide, {}, [], DataConfig(seed=seed, real=1.0))
        crops = PairCrops(count=HELD_OUT + 40, size=48, aspects=7)
        config = replace(CONFIG, crops=(crops,), variants=1, data=dataset.config)
        sources = [make_sample(dataset, config, crops, i).about["source"] for i in range(HELD_OUT + 40)]
        assert not set(sources[:HELD_OUT]) & set(sources[HELD_OUT:])


def test_data_that_is_too_small_for_every_shape_is_refused_before_anything_is_made():
    dataset = Dataset({}, WIDE, [], DataConfig(real=1.0))
    for crops in (PairCrops(kind="clip", count=1, size=48, frames=9, aspects=3), PairCrops(count=1, size=64)):
        with pytest.raises(SettingError, match=rf"No source is large.* for {crops.name}"):
            crops.sizes(dataset)


def test_a_sampled_latent_lies_around_its_mean_and_is_drawn_once(folder, vae):
    clip = make_sample(Dataset.load(None, CONFIG.data), CONFIG, CONFIG.crops[1], 0).clean[None]
    mean = encode(vae, clip, None)
    drawn = [encode(vae, clip, [torch.Generator().manual_seed(seed)]) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], mean)


def test_every_parameter_of_every_degradation_is_kept(folder):
    about = ShardReader(folder).about(6)
    assert about["kind"] == "clip" and about["size"] == [32, 32] and about["frames"] == 5
    assert [log["profile"] for log in about["degradations"]] == ["nano", "nano"]
    assert len(about["degradations"][0]["passes"][0]["jpeg"]["quality"]) == 5


def test_shapes_of_one_area_become_buckets(folder):
    latents = Latents(folder, seed=0)
    shapes = {tuple(bucket)[1:] for bucket in latents.store.buckets if bucket.t == 1}
    assert 1 < len(shapes) <= 3
    assert all(h * w in range(8, 33) for h, w in shapes)


def test_the_scale_is_the_autoencoders_own_and_measured_only_where_it_began_with_nothing(folder, vae, tmp_path):
    """What is learnt on latents has to meet the same numbers at inference."""
    assert Latents(folder, seed=0).scale == vae.config.scale == 1.0
    for name, init in (("scratch", None), ("tuned", "nano")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(to_yaml({"init": init}))
    nano = open_vae("nano")
    assert latent_scale("nano", nano) == latent_scale(tmp_path / "tuned", vae) == nano.config.scale != 1
    assert latent_scale(tmp_path / "scratch", vae) is None


def test_pixels_are_rounded_once_on_their_way_into_a_coarse_type():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 3, 1, 16, 16)

    class Seen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

        def encode(self, clip):
            self.clip = clip
            return torch.zeros(1, 32, 1, 2, 2)

    vae = Seen()
    encode(vae, codes, None)
    assert torch.equal(vae.clip, (codes.float() / 255 * 2 - 1).bfloat16())


def test_a_second_run_makes_nothing_again(folder, vae, monkeypatch):
    before = tars(folder)

    def fail(*args):
        raise AssertionError("a finished shard was made again")

    monkeypatch.setattr(precompute, "write", fail)
    run(CONFIG, folder, None, vae)
    assert tars(folder) == before


def test_parts_of_the_work_add_up_to_the_same_files(folder, vae, tmp_path):
    run(CONFIG, tmp_path, None, vae, (1, 2))
    assert {path.stem for path in tmp_path.glob("*.tar")} == set(SHARDS[1::2])
    assert not (tmp_path / "index").exists()
    run(CONFIG, tmp_path, None, vae, (0, 2))
    assert tars(tmp_path) == tars(folder)
    for column in folder.glob("index/*.npy"):
        np.testing.assert_array_equal(np.load(column), np.load(tmp_path / "index" / column.name))


def test_a_run_that_was_cut_off_goes_on_where_it_was(folder, vae, tmp_path, monkeypatch):
    whole, made = precompute.make_sample, []

    def interrupted(*args):
        made.append(args)
        if len(made) == 4:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(precompute, "make_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, tmp_path, None, vae)
    assert [path.stem for path in tmp_path.glob("*.tar")] == SHARDS[:1]
    monkeypatch.setattr(precompute, "make_sample", whole)
    run(CONFIG, tmp_path, None, vae)
    assert tars(tmp_path) == tars(folder)


def test_worker_processes_make_the_same_files(vae, tmp_path):
    few = replace(CONFIG, crops=(PairCrops(kind="image", count=2, size=32),))
    for workers in (0, 1):
        run(replace(few, workers=workers), tmp_path / str(workers), None, vae)
    assert tars(tmp_path / "0") == tars(tmp_path / "1")


def test_other_settings_in_the_same_folder_are_refused(folder, vae):
    with pytest.raises(SettingError, match="another degradation"):
        run(replace(CONFIG, degradation="light"), folder, None, vae)


def test_a_file_that_vanishes_is_replaced_by_the_same_other_sample(monkeypatch, caplog):
    dataset, crops = Dataset.load(None, CONFIG.data), CONFIG.crops[0]
    expected = make_sample(dataset, CONFIG, crops, 2 + crops.count).clean
    whole = dataset.sample

    def sometimes(number, *args, **options):
        if number == 2:
            raise MediaError("walk.mp4 cannot be decoded.")
        return whole(number, *args, **{**options, "size": expected.shape[-2:]})

    monkeypatch.setattr(dataset, "sample", sometimes)
    replacement = make_sample(dataset, CONFIG, crops, 2)
    assert torch.equal(replacement.clean, expected)
    assert "walk.mp4" in caplog.text and "walk.mp4" in replacement.about[REPLACED]
    work = Work(CONFIG, None)
    work.count("image-2", replacement)
    work.count("image-1", make_sample(dataset, CONFIG, crops, 1))
    # Nor is the same one again, as where nothing is written.
    work.count("image-2", replacement)
    # One is an accident, more among so few are not.
    with pytest.raises(MediaError, match=r"2 of 8 samples.*walk\.mp4"):
        work.count("image-3", replacement)


ONE_PHOTO = replace(CONFIG, crops=(PairCrops(kind="image", count=2, size=32),), data=DataConfig(real=1.0, stills=0))


@pytest.fixture
def photo(tmp_path) -> Path:
    (tmp_path / "data/summer").mkdir(parents=True)
    Image.fromarray(still(0, 0, 64)).save(tmp_path / "data/summer/beach.png")
    return tmp_path / "data"


def test_a_caption_beside_a_source_goes_into_its_samples(vae, photo, tmp_path):
    embedding = torch.randn(3, 8)
    save_file({"embedding": embedding}, photo / "summer/beach.txt.safetensors")
    run(ONE_PHOTO, tmp_path / "out", photo, vae)
    reader = ShardReader(tmp_path / "out")
    assert torch.equal(reader.read(0)[2], embedding) and reader.text_width == 8


@pytest.mark.parametrize("name", ["beach.safetensors", "beach.txt.safetensors"])
def test_captions_may_lie_in_a_folder_of_their_own(vae, photo, tmp_path, name):
    (tmp_path / "text").mkdir()
    embedding = torch.randn(3, 8)
    save_file({"embedding": embedding}, tmp_path / "text" / name)
    run(replace(ONE_PHOTO, captions=tmp_path / "text"), tmp_path / "out", photo, vae)
    assert torch.equal(ShardReader(tmp_path / "out").read(1)[2], embedding)


def test_shots_of_clips_and_folders_of_frames_have_the_caption_of_their_source(tmp_path):
    (tmp_path / "clips").mkdir()
    for number, name in enumerate(("walk", "0001", "v1.5")):
        save_file({"t": torch.full((1, 4), float(number))}, tmp_path / f"clips/{name}.txt.safetensors")
    captions = Captions(None, tmp_path)
    for number, source in enumerate(("clips/walk.mp4#2", "clips/0001", "clips/v1.5")):
        assert captions.of(source)[0, 0] == number
    assert captions.of("clips/other.mp4") is None and Captions(None, None).of("image3") is None


def test_a_caption_of_another_width_is_named(tmp_path):
    for name, width in (("a", 8), ("b", 9)):
        save_file({"t": torch.ones(2, width)}, tmp_path / f"{name}.txt.safetensors")
    captions = Captions(None, tmp_path)
    assert captions.of("a.png").shape == (2, 8)
    with pytest.raises(SettingError, match=r"b\.txt\.safetensors is 9 wide.*8"):
        captions.of("b.png")


def test_something_else_in_place_of_a_caption_is_named(tmp_path):
    save_file({"t": torch.ones(2)}, tmp_path / "a.txt.safetensors")
    (tmp_path / "b.txt.safetensors").write_bytes(b"a sandy beach")
    for name, words in (("a", r"holds \[2\], expected one tensor"), ("b", "cannot be read")):
        with pytest.raises(SettingError, match=words):
            Captions(None, tmp_path).of(f"{name}.png")


def test_samples_without_a_caption_get_the_prompt_of_a_published_model(vae, photo, tmp_path):
    run(replace(ONE_PHOTO, prompt="nano"), tmp_path / "out", photo, vae)
    latents = Latents(tmp_path / "out", seed=0)
    assert latents.text_width == 192
    assert torch.equal(latents.store.read(0)[2], load_prompts(published("nano", "dit")).positive)
    # A caption has to fit it.
    save_file({"t": torch.ones(2, 8)}, photo / "summer/beach.txt.safetensors")
    with pytest.raises(SettingError, match="8 wide, and texts before it 192"):
        run(replace(ONE_PHOTO, prompt="nano"), tmp_path / "again", photo, vae)


def test_a_data_set_begun_before_there_were_prompts_and_filters_goes_on(folder, vae):
    for name in SHARDS:
        manifest = folder / f"{name}.json"
        made = json.loads(manifest.read_text())
        del made["settings"]["prompt"], made["settings"]["filter"]
        manifest.write_text(json.dumps(made))
    before = tars(folder)
    run(CONFIG, folder, None, vae)
    assert tars(folder) == before


def test_another_filter_makes_another_data_set(vae, photo, tmp_path):
    Image.fromarray(still(0, 1, 64)).save(photo / "dunes.png")
    run(ONE_PHOTO, tmp_path / "out", photo, vae)
    (photo / "filter.jsonl").write_text(json.dumps({"source": "dunes.png", "fails": ["noise_quantile"]}) + "\n")
    with pytest.raises(SettingError, match="another filter"):
        run(ONE_PHOTO, tmp_path / "out", photo, vae)
    run(ONE_PHOTO, tmp_path / "filtered", photo, vae)
    reader = ShardReader(tmp_path / "filtered")
    assert {reader.about(i)["source"] for i in range(2)} == {"summer/beach.png"}


def test_a_film_that_breaks_off_while_samples_are_made_is_replaced(vae, tmp_path):
    Image.fromarray(still(0, 0, 64)).save(tmp_path / "beach.png")
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name)
    crops = PairCrops(kind="clip", count=4, size=32, frames=5)
    config = replace(CONFIG, crops=(crops,), degradation="light",
                     data=DataConfig(real=1.0, stills=0, moving_photo=0.0, keep_clips=False))  # fmt: skip
    dataset = Dataset.load(tmp_path, config.data)
    samples = [make_sample(dataset, config, crops, number) for number in range(4)]
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:300])
    for number, before in enumerate(samples):
        after = make_sample(dataset, config, crops, number)
        assert after.about["source"] == "b.mp4"
        assert (REPLACED in after.about) == (before.about["source"] == "a.mp4")
        assert torch.equal(after.clean, make_sample(dataset, config, crops, number).clean)


@pytest.mark.parametrize(("text", "part"), [("0/1", (0, 1)), ("3/8", (3, 8))])
def test_parts_are_counted_from_zero(text, part):
    assert parse_part(text) == part


@pytest.mark.parametrize("text", ["4/4", "-1/2", "half", "1"])
def test_a_part_that_does_not_exist_is_refused(text):
    with pytest.raises(SettingError, match="--shard"):
        parse_part(text)


def test_the_command_says_in_words_what_it_cannot_do(tmp_path, capsys):
    command = ["--config", "pico", "--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    assert main([*command, "degradation=odd"]) == 1
    assert "choose one of" in capsys.readouterr().err
    assert main([*command, "--dry-run"]) == 0
    assert "2 shards, 96 samples" in capsys.readouterr().out
    assert main([*command, "vae=nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
