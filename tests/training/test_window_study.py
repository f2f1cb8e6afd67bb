"""Seams: found where they were planted, nowhere else, and told from what patches and pictures do by themselves."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from seedvr2_core.errors import SettingError
from seedvr2_core.models.windows import WindowConfig
from seedvr2_core.video.geometry import Grid
from training import loop, window_study
from training.config import OptimConfig, RunConfig, override, to_yaml
from training.pretrain import Pretraining, PretrainStage
from training.weights import dit_config, open_restorer
from training.window_study import Mode, Trial, borders, boundary_energy, measure, modes_of, profile

NANO = WindowConfig(train_area=(16, 16))
FIXED = replace(NANO, size=Grid(1, 4, 4))
GRID, TOKEN = Grid(1, 8, 16), 4


def picture(seed=0):
    """1 3 32 64: noise, in which neighbours differ alike everywhere."""
    return torch.rand(1, 3, GRID.h * TOKEN, GRID.w * TOKEN, generator=torch.Generator().manual_seed(seed))


def with_steps(frames, columns, height=2.0):
    """The picture, and a step up at each of these columns."""
    up = torch.zeros(frames.shape[-1])
    for number, column in enumerate(columns):
        up[column:] += height * (-1) ** number
    return frames + up


def test_borders_are_where_windows_meet():
    rows, columns = borders(GRID, FIXED)
    assert (rows.regular, rows.shifted, rows.other) == ((4,), (2, 6), (1, 3, 5, 7))
    assert (columns.regular, columns.shifted) == ((4, 8, 12), (2, 6, 10, 14))
    assert borders(Grid(1, 4, 4), FIXED)[0] == window_study.Borders((), (), (1, 2, 3))


@pytest.mark.parametrize("kind, other", [("regular", "shifted"), ("shifted", "regular")])
def test_a_seam_is_found_at_the_borders_it_lies_on(kind, other):
    places, wanted = borders(GRID, FIXED), picture()
    seamed = with_steps(wanted, [place * TOKEN for place in getattr(places[1], kind)])
    # A third of a step is what neighbours in noise differ by; one of two axes has the seam.
    assert boundary_energy(seamed, wanted, places, kind, TOKEN) > 1.5
    assert boundary_energy(seamed, wanted, places, other, TOKEN) == pytest.approx(0, abs=1e-5)


def test_restored_like_the_original_has_none():
    places = borders(GRID, FIXED)
    assert boundary_energy(picture(), picture(), places, "regular", TOKEN) == 0


def test_a_grid_of_patches_is_no_seam():
    wanted = picture()
    patches = with_steps(wanted, range(TOKEN, wanted.shape[-1], TOKEN), height=4.0)
    assert abs(boundary_energy(patches, wanted, borders(GRID, FIXED), "regular", TOKEN)) < 0.2


def test_a_flat_picture_and_one_without_borders_are_no_accident():
    flat = torch.full((1, 3, 32, 64), 0.5)
    assert boundary_energy(flat, flat, borders(GRID, FIXED), "shifted", TOKEN) == 0
    assert boundary_energy(flat, flat, borders(Grid(1, 4, 4), FIXED), "regular", TOKEN) is None


def test_a_profile_begins_at_the_border():
    seamed = with_steps(picture(), (16, 32, 48))
    values = profile([seamed], axis=-1, window=4, token=TOKEN)
    assert len(values) == 16 and values.argmax() == 0 and values[0] > 3 * values[1:].max()


def test_what_windows_add_is_measured_against_other_windows_at_the_same_places():
    wanted = [picture(0), picture(1)]
    modes = [Mode("four", FIXED), Mode("six", replace(NANO, size=Grid(1, 6, 6))), Mode("six again", NANO)]
    columns = [place * TOKEN for place in borders(GRID, FIXED)[1].regular]
    # All are bad in one way, and one has seams on top.
    bad = [with_steps(frames, (8, 24), height=1.0) for frames in wanted]
    seamed = [with_steps(frames, columns) for frames in bad]
    trial = Trial(Grid(1, 32, 64), GRID, TOKEN, ["a", "b"], wanted, {"four": seamed, "six": bad, "six again": bad})
    four, six, _ = measure(trial, modes)
    assert len(four.psnr) == len(four.seams["regular"]) == 2
    assert min(four.seams["regular"]) > 1 and max(map(abs, four.seams["shifted"])) < 0.5
    assert max(six.seams["regular"]) < 0.5


def test_windows_that_coincide_have_nothing_to_be_compared_with():
    frames = [picture()]
    trial = Trial(Grid(1, 32, 32), Grid(1, 8, 8), TOKEN, ["a"], frames, {"adaptive": frames, "fixed": frames})
    rows = measure(trial, [Mode("adaptive", NANO), Mode("fixed", replace(NANO, size=Grid(1, 6, 6)))])
    assert [row.seams for row in rows] == [{"regular": [], "shifted": []}] * 2


def test_fixed_windows_are_as_large_as_those_of_the_training_unless_named():
    assert [mode.windows.size for mode in modes_of(NANO)] == [None, Grid(1, 6, 6)]
    assert [mode.windows.size for mode in modes_of(FIXED)] == [None, Grid(1, 4, 4)]
    assert [mode.windows.size for mode in modes_of(NANO, [Grid(1, 8, 8)])] == [None, Grid(1, 8, 8)]


@pytest.fixture(scope="module")
def fixed_run(tiny_dit, latents, tmp_path_factory):
    """A run of two steps with fixed windows, chosen as on a command line."""
    config = override(
        Pretraining(
            model=tiny_dit,
            run=RunConfig(steps=2, save_every=2, validate_every=3, async_save=False),
            optim=OptimConfig(lr=1e-3, final_lr=1e-3),
            batch=2,
        ),
        ["model.windows.size=1,2,1"],
    )
    directory = tmp_path_factory.mktemp("fixed") / "run"
    loop.run(PretrainStage(config, latents), config, {"g": config.optim}, directory)
    return directory


def test_a_run_is_trained_with_fixed_windows_and_opened_with_them(fixed_run, tiny_dit):
    expected = replace(tiny_dit, windows=replace(tiny_dit.windows, size=Grid(1, 2, 1)))
    assert dit_config(fixed_run) == open_restorer(fixed_run).dit.config == expected


def test_a_run_from_before_windows_could_be_fixed_is_adaptive(tiny_dit, tmp_path):
    config = Pretraining(model=tiny_dit, run=RunConfig(steps=1), optim=OptimConfig(lr=0, final_lr=0))
    saved = yaml.safe_load(to_yaml(config))
    del saved["model"]["windows"]["size"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert dit_config(tmp_path) == tiny_dit


def test_the_study_of_a_model_runs_from_the_command_line(tmp_path, capsys):
    images = tmp_path / "eval" / "images"
    images.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / "one.png")
    words = ["--model", "nano", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--sizes", "256x64", "64x64"]
    assert window_study.main(words) == 0
    rows = json.loads((tmp_path / "out" / "window_study.json").read_text())["rows"]
    assert [(row["size"], row["window"]) for row in rows] == [
        ("256 x 64", [1, 3, 11]), ("256 x 64", [1, 6, 6]), ("64 x 64", [1, 6, 6]), ("64 x 64", [1, 6, 6]),
    ]  # fmt: skip
    assert rows[0]["psnr"] != rows[1]["psnr"] and rows[2]["psnr"] == rows[3]["psnr"]
    assert "| 256 x 64 | adaptive | 1 x 3 x 11 |" in capsys.readouterr().out


def test_what_is_not_there_is_refused_in_a_sentence(tmp_path, capsys):
    assert window_study.main(["--model", "nano", "--out", str(tmp_path)]) == 1
    assert "--data is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        window_study.main(["--model", "nano", "--out", str(tmp_path), "--sizes", "100x64"])
    assert "multiples of 16" in capsys.readouterr().err
    with pytest.raises(SettingError, match="holds nothing"):
        override(NANO, ["size=1,0,4"])


def test_twins_learn_the_same_in_their_own_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(window_study, "TWIN_STILLS", 2)
    words = ["--steps", "2", "--sizes", "48x48", "--pictures", "2"]
    assert window_study.main(["--twins", "--out", str(tmp_path), *words]) == 0
    sizes = [dit_config(tmp_path / name).windows.size for name in ("adaptive", "fixed_1_x_4_x_4")]
    assert sizes == [None, Grid(1, 4, 4)]
    assert (tmp_path / "window_study.md").read_text().count("| 48 x 48 |") == 2
