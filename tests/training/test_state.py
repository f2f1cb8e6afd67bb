"""Saved runs: there is a whole checkpoint at every moment."""

from __future__ import annotations

import pytest
import torch

from seedvr2_core.errors import CheckpointError
from training import state


def test_what_was_saved_comes_back(tmp_path):
    state.save(tmp_path, {"step": 3, "module": {"weight": torch.arange(4.0)}})
    saved = state.load(tmp_path)
    assert saved["step"] == 3
    assert torch.equal(saved["module"]["weight"], torch.arange(4.0))


def test_a_new_directory_holds_no_run(tmp_path):
    assert state.load(tmp_path) is None


def test_a_failure_while_writing_leaves_the_last_checkpoint_whole(tmp_path):
    state.save(tmp_path, {"step": 1, "weight": torch.ones(1000)})
    with pytest.raises(Exception, match="pickle"):
        # The tensor is written before the function, which cannot be.
        state.save(tmp_path, {"step": 2, "weight": torch.zeros(1000), "hook": lambda: None})
    saved = state.load(tmp_path)
    assert saved["step"] == 1
    assert torch.equal(saved["weight"], torch.ones(1000))
    assert [path.name for path in tmp_path.iterdir()] == [state.FILE]


def test_a_process_killed_while_writing_leaves_the_last_checkpoint_whole(tmp_path):
    state.save(tmp_path, {"step": 1})
    (tmp_path / f".{state.FILE}.partial").write_bytes(b"half a file")
    assert state.load(tmp_path)["step"] == 1
    state.save(tmp_path, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == [state.FILE]


def test_averaged_weights_are_read_from_a_run_and_asked_for_where_there_is_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no checkpoint\.pt"):
        state.load_averaged(tmp_path)
    state.save(tmp_path, {"step": 1, "ema": {"module": {"weight": torch.ones(2)}, "updates": 1}})
    assert torch.equal(state.load_averaged(tmp_path)["weight"], torch.ones(2))
