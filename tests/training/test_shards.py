"""Shards of latents: what was written is read, in any order; what is broken is replaced, counted, or refused."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load

from seedvr2_core.errors import CheckpointError, SettingError
from seedvr2_core.video.geometry import Grid
from training import pretrain
from training.buckets import Deal, tokens
from training.config import parse_command
from training.curriculum import Phase
from training.shards import HELD_OUT, Latents, Pair, ShardReader, build_index, is_finished, main, write_shard

IMAGE, CLIP = Grid(1, 4, 4), Grid(2, 4, 6)
SETTINGS = {"degradation": "full", "variants": 2}
PER_SHARD, SHARDS = 20, 2


def pair(number: int, grid: Grid) -> Pair:
    draw = torch.Generator().manual_seed(number)
    hq = 3 * torch.randn(16, *grid, generator=draw)
    text = torch.full((2, 8), float(number)) if number % 2 else None
    return Pair(hq, [hq + 1, hq + 2], {"number": number}, text)


def write(folder) -> list[str]:
    names = []
    for kind, grid, first in (("clip", CLIP, 1000), ("image", IMAGE, 0)):
        for shard in range(SHARDS):
            numbers = range(first + shard * PER_SHARD, first + (shard + 1) * PER_SHARD)
            names.append(f"{kind}-{shard:06d}")
            write_shard(folder, names[-1], ((f"{n:06d}", pair(n, grid)) for n in numbers), SETTINGS)
    build_index(folder, names)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write(folder)
    return folder


@pytest.fixture
def latents(folder):
    return Latents(folder, seed=0)


def test_a_sample_comes_back_as_it_was_written(folder):
    reader = ShardReader(folder)
    # In no order at all.
    for number in (70, 3, 41, 0, 79, 25):
        written = 1000 + number if number < 40 else number - 40
        expected = pair(written, CLIP if number < 40 else IMAGE)
        hq, lq, text, really = reader.read(number, variant=1)
        assert really == number
        assert torch.equal(hq, expected.hq) and torch.equal(lq, expected.lq[1])
        assert (text is None) == (expected.text is None) and (text is None or torch.equal(text, expected.text))
        assert reader.about(number) == {"number": written}


def test_a_table_of_all_samples_is_written_for_analysis(folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    main(["export-parquet", str(folder), str(tmp_path / "samples.parquet")])
    rows = parquet.read_table(tmp_path / "samples.parquet").to_pylist()
    assert [row["number"] for row in rows] == list(range(80))
    row, reader = rows[45], ShardReader(folder)
    assert (row["shard"], row["kind"], row["t"], row["h"], row["w"]) == ("image-000000", "image", *IMAGE)
    assert [row["offset"], row["size"]] == reader.columns["hq"][45].tolist()
    assert json.loads(row["about"]) == reader.about(45) and row["text_size"] == reader.columns["txt"][45][1]


def test_without_pyarrow_there_is_no_table_and_it_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SettingError, match="pip install pyarrow"):
        main(["export-parquet", str(folder), str(tmp_path / "samples.parquet")])


def test_an_object_store_is_read_in_ranges(folder, latents):
    remote = fsspec.filesystem("memory")
    remote.put(str(folder), "/bucket/latents", recursive=True)
    stored = Latents("memory://bucket/latents", seed=0)
    for step in range(4):
        a, b = (one.batch(step, Deal(samples=6)) for one in (stored, latents))
        assert torch.equal(a.hq, b.hq) and torch.equal(a.lq, b.lq) and a.ids.tolist() == b.ids.tolist()
    assert all(isinstance(column, np.memmap) for column in ShardReader("memory://bucket/latents").columns.values())
    remote.rm("/bucket", recursive=True)
    with pytest.raises(CheckpointError, match="holds no finished latents"):
        Latents("memory://bucket/latents", seed=0)


def test_a_store_whose_library_is_missing_names_it():
    with pytest.raises(CheckpointError, match=r"nowhere://latents cannot be opened .*pip"):
        Latents("nowhere://latents", seed=0)


def test_an_address_stays_one_on_the_command_line():
    for text, data in (("s3://bucket/latents", "s3://bucket/latents"), ("runs//latents", Path("runs/latents"))):
        assert parse_command("pretrain", pretrain.RECIPES, ["--config", "nano", "--data", text]).data == data


def test_a_shard_is_a_tar_that_anyone_can_read(folder):
    with tarfile.open(folder / "image-000001.tar") as tar:
        names = tar.getnames()
        assert names[:5] == [f"000020.{part}" for part in ("hq.safetensors", "lq0.safetensors", "lq1.safetensors",
                                                           "json")] + ["000021.hq.safetensors"]  # fmt: skip
        content = tar.extractfile("000021.hq.safetensors").read()
    assert torch.equal(load(content)["latent"], pair(21, IMAGE).hq)


def test_columns_are_mapped_and_not_read(folder):
    assert all(isinstance(column, np.memmap) for column in ShardReader(folder).columns.values())


def test_the_scale_makes_the_variance_of_all_clean_latents_one(folder, latents):
    everything = torch.cat([pair(n, grid).hq.flatten() for grid, first in ((CLIP, 1000), (IMAGE, 0))
                            for n in range(first, first + 40)])  # fmt: skip
    assert latents.scale == pytest.approx(1 / everything.std().item(), rel=1e-4)


def test_an_autoencoder_that_has_a_scale_keeps_it(tmp_path):
    write_shard(tmp_path, "image-000000", [("0", pair(0, IMAGE))], SETTINGS)
    build_index(tmp_path, ["image-000000"], scale=0.9152)
    assert ShardReader(tmp_path).scale == 0.9152


def test_latents_that_are_all_held_out_are_refused(tmp_path):
    write_shard(tmp_path, "image-000000", [(str(number), pair(number, IMAGE)) for number in range(12)], SETTINGS)
    build_index(tmp_path, ["image-000000"])
    latents = Latents(tmp_path, seed=0)
    for ask in (lambda: latents.shapes, lambda: latents.plan(Deal())):
        with pytest.raises(CheckpointError, match="There are 12 pairs of latents, by kind, and the first 16 of each"):
            ask()


def test_equal_samples_make_equal_files(folder, tmp_path):
    write(tmp_path)
    assert (tmp_path / "image-000000.tar").read_bytes() == (folder / "image-000000.tar").read_bytes()


def test_batches_take_the_kinds_in_turn_and_depend_on_the_step_alone(latents, folder):
    assert [latents.batch(step, Deal(samples=3)).hq.shape[2:] for step in range(4)] == [IMAGE, CLIP] * 2
    deal = Deal(samples=4, micros=2)
    batch, again = latents.batch(5, deal, micro=1), Latents(folder, seed=0).batch(5, deal, micro=1)
    assert torch.equal(batch.hq, again.hq) and torch.equal(batch.lq, again.lq)
    assert not torch.equal(batch.hq, latents.batch(5, deal).hq)


def test_further_turns_have_batches_of_their_own(latents):
    deal = Deal(samples=3, micros=2)
    first, *others = ([latents.batch(0, deal, micro).ids.tolist() for micro in (turn, turn + 1)] for turn in (0, 2, 4))
    assert all(first != other for other in others) and others[0] != others[1]


def test_shards_and_plain_files_make_the_same_batches(tmp_path):
    from safetensors.torch import save_file

    pairs = [pair(n, IMAGE) for n in range(30)]
    (tmp_path / "plain").mkdir()
    plain = {"hq": torch.stack([p.hq for p in pairs]), "lq": torch.stack([p.lq[0] for p in pairs])}
    save_file(plain, tmp_path / "plain/image.safetensors")
    single = ((f"{i}", Pair(p.hq, p.lq[:1], {})) for i, p in enumerate(pairs))
    write_shard(tmp_path / "shards", "image-000000", single, {})
    build_index(tmp_path / "shards", ["image-000000"])
    ours, theirs = (Latents(tmp_path / name, seed=3) for name in ("shards", "plain"))
    for step in range(3):
        a, b = (latents.batch(step, Deal(samples=4)) for latents in (ours, theirs))
        assert a.bucket == b.bucket and (a.ids == b.ids).all()
        for one, other in ((a.hq, b.hq), (a.lq, b.lq)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_held_out_samples_are_in_no_batch(latents):
    kept = {round(z.sum().item(), 3) for hq, _ in latents.held_out() for z in hq}
    drawn = {round(z.sum().item(), 3) for step in range(30) for z in latents.batch(step, Deal(samples=4)).hq}
    assert len(kept) == 2 * HELD_OUT
    assert len(drawn) == 80 - 2 * HELD_OUT
    assert not kept & drawn


def test_a_batch_has_one_shape_and_keeps_its_budget(latents):
    for step in range(8):
        batch = latents.batch(step, Deal(tokens=40))
        assert tuple(batch.hq.shape[2:]) == batch.bucket
        assert len(batch.ids) * tokens(batch.bucket) <= 40
        # Both variants of the degraded latent occur.
        torch.testing.assert_close((batch.lq - batch.hq).mean(dim=(1, 2, 3, 4)) / latents.scale % 1,
                                   torch.zeros(len(batch.ids)), atol=1e-3, rtol=0)  # fmt: skip


def test_micro_batches_are_parts_of_the_planned_batch(latents):
    deal = Deal(tokens=32, micros=2)
    parts = [latents.batch(2, deal, micro) for micro in range(2)]
    whole = latents.plan(deal)(2)
    assert np.array_equal(np.concatenate([part.ids for part in parts]), whole.ids)


def many_shapes(folder) -> Latents:
    """Clips of ten shapes, three of each."""
    grids = [Grid(3, 4, 4 + 2 * i) for i in range(10) for _ in range(3)]
    write_shard(folder, "clip-000000", ((f"{n}", pair(n, grid)) for n, grid in enumerate(grids)), SETTINGS)
    build_index(folder, ["clip-000000"])
    return Latents(folder, seed=0)


def test_as_many_are_held_out_of_a_kind_whatever_its_shapes(tmp_path):
    latents = many_shapes(tmp_path)
    assert sum(len(hq) for hq, _ in latents.held_out()) == HELD_OUT
    plan = latents.plan(Deal(samples=2))
    assert {n for step in range(plan.steps_in_epoch) for n in plan(step).ids} == set(range(HELD_OUT, 30))


def test_a_shape_with_fewer_samples_than_micro_batches_fills_them_all(tmp_path):
    latents = many_shapes(tmp_path)
    deal = Deal(tokens=20, micros=8)
    sizes = {len(latents.batch(step, deal, micro).ids) for step in range(6) for micro in range(8)}
    assert min(sizes) >= 1


def test_a_phase_takes_its_own_samples_as_long_as_it_says_and_spends_the_budget_on_them(latents):
    clips = Phase(share=1.0, frames=(5,))
    for step in range(4):
        batch = latents.batch(step, Deal(tokens=24, phase=clips))
        assert batch.bucket == (2, 4, 6) and batch.hq.shape[2:] == batch.lq.shape[2:] == batch.bucket
        assert len(batch.ids) == 24 // tokens(batch.bucket)


def test_a_phase_of_shorter_clips_cuts_longer_ones(tmp_path):
    latents = many_shapes(tmp_path)
    whole = latents.batch(1, Deal(tokens=120, phase=Phase(share=1.0)))
    short = latents.batch(1, Deal(tokens=120, phase=Phase(share=1.0, frames=(5,))))
    assert whole.hq.shape[2] == 3 and short.hq.shape[2] == short.lq.shape[2] == short.bucket.t == 2
    assert len(whole.ids) == 120 // tokens(whole.bucket) and len(short.ids) == 120 // tokens(short.bucket)


def test_both_variants_of_a_sample_are_used(latents):
    batches = [latents.batch(step, Deal(samples=24)) for step in range(4)]
    shifts = [(batch.lq - batch.hq).mean(dim=(1, 2, 3, 4)) / latents.scale for batch in batches]
    assert set(torch.cat(shifts).round().tolist()) == {1.0, 2.0}


def test_an_unreadable_sample_is_replaced_by_the_next_of_its_shape_and_counted(folder, tmp_path, caplog):
    write(tmp_path)
    reader = ShardReader(tmp_path)
    offset = int(reader.columns["hq"][45][0])
    with (tmp_path / "image-000000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 64)
    *_, really = reader.read(45)
    assert really == 46
    assert list(reader.unreadable) == [45]
    assert "sample 45 in image-000000.tar" in caplog.text
    # Again, and in another process, it is the same; it is counted once.
    assert reader.read(45)[-1] == ShardReader(tmp_path).read(45)[-1] == 46
    assert len(reader.unreadable) == 1


def test_a_shard_cut_short_is_refused_when_it_is_no_accident(tmp_path):
    write(tmp_path)
    with (tmp_path / "clip-000001.tar").open("r+b") as file:
        file.truncate(4096)
    reader = ShardReader(tmp_path)
    with pytest.raises(CheckpointError, match=r"clip-000001\.tar.*cut short"):
        for number in range(20, 40):
            reader.read(number)


def test_a_wrong_offset_is_an_unreadable_sample(tmp_path):
    names = write(tmp_path)
    offsets = np.load(tmp_path / "index/hq.npy")
    # Amid the tensor; and at a whole one of another shape.
    for wrong in ([offsets[45][0] + 5, offsets[45][1]], offsets[3]):
        changed = offsets.copy()
        changed[45] = wrong
        np.save(tmp_path / "index/hq.npy", changed)
        columns = np.load(tmp_path / "index/shard.npy")
        assert names[columns[45]] == "image-000000"
        reader = ShardReader(tmp_path)
        assert reader.read(45)[-1] == 46 and list(reader.unreadable) == [45]


def test_a_tensor_of_another_shape_is_an_unreadable_sample(tmp_path):
    write(tmp_path)
    places, shards = np.load(tmp_path / "index/hq.npy"), np.load(tmp_path / "index/shard.npy")
    places[45], shards[45] = places[3], shards[3]
    np.save(tmp_path / "index/hq.npy", places)
    np.save(tmp_path / "index/shard.npy", shards)
    reader = ShardReader(tmp_path)
    assert reader.read(45)[-1] == 46
    assert "expected a latent of [1, 4, 4]" in reader.unreadable[45]


def test_a_lost_shard_stops_training_in_words(tmp_path):
    write(tmp_path)
    (tmp_path / "image-000001.tar").unlink()
    latents = Latents(tmp_path, seed=0)
    with pytest.raises(CheckpointError, match=r"image-000001\.tar.*precompute it again"):
        for step in range(20):
            latents.batch(step, Deal(samples=8))


def test_a_damaged_index_says_how_to_mend_it(tmp_path):
    write(tmp_path)
    (tmp_path / "index/hq.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CheckpointError, match=r"index is damaged.*finished shards are kept"):
        ShardReader(tmp_path)
    (tmp_path / "index/about.json").write_text("{")
    with pytest.raises(CheckpointError, match="index is damaged"):
        ShardReader(tmp_path)


def test_a_full_disk_leaves_no_half_shard_and_says_so(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_shard(tmp_path, "image-000000", [("0", pair(0, IMAGE))], SETTINGS)
    assert not list(tmp_path.iterdir())


def test_a_shard_without_its_manifest_is_not_finished(folder, tmp_path):
    assert is_finished(folder, "image-000000", SETTINGS)
    write_shard(tmp_path, "image-000000", [("0", pair(0, IMAGE))], SETTINGS)
    (tmp_path / "image-000000.json").unlink()
    assert not is_finished(tmp_path, "image-000000", SETTINGS)
    with pytest.raises(CheckpointError, match="image-000000 is not finished"):
        build_index(tmp_path, ["image-000000"])


def test_a_shard_made_with_other_settings_is_refused(folder):
    with pytest.raises(SettingError, match="another degradation"):
        is_finished(folder, "image-000000", {**SETTINGS, "degradation": "light"})


def test_a_folder_without_an_index_names_the_stage_before(tmp_path):
    with pytest.raises(CheckpointError, match="precompute"):
        Latents(tmp_path, seed=0)


def test_manifests_say_what_the_samples_were_made_with(folder):
    assert json.loads((folder / "clip-000000.json").read_text())["settings"] == SETTINGS
    assert ShardReader(folder).settings == SETTINGS
