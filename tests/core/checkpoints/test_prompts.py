"""Prompt embeddings: inside the file, or beside it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seedvr2_core.checkpoints import load_prompts, prompts
from seedvr2_core.checkpoints.published import PROMPTS, sha256_of
from seedvr2_core.errors import CheckpointError


@pytest.fixture
def published(monkeypatch):
    """Declare files in a folder to be the published prompt embeddings."""

    def declare(folder: Path) -> None:
        files = {sign: replace(f, sha256=sha256_of(folder / f.file)) for sign, f in PROMPTS.items()}
        monkeypatch.setattr(prompts, "PROMPTS", files)

    return declare


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_prompts_inside_the_file_come_first(write, dit, prefix):
    tensors = {prefix + name: tensor for name, tensor in dit.state_dict().items()}
    inside = {"positive_conditioning": torch.full((3, 16), 1.0), "negative_conditioning": torch.full((4, 16), 2.0)}
    path = write("model.safetensors", tensors | {prefix + name: t.bfloat16() for name, t in inside.items()})
    write("pos_emb.pt", torch.zeros(58, 5120))
    found = load_prompts(path)
    assert found.positive.dtype == torch.bfloat16
    torch.testing.assert_close(found.positive.float(), inside["positive_conditioning"])
    torch.testing.assert_close(found.negative.float(), inside["negative_conditioning"])


def test_published_prompts_are_found_beside_the_file(write, vae, published, tmp_path):
    # Any file without prompts of its own will do; a transformer of width 5120 would be too large for a test.
    path = write("models/vae.safetensors", vae.state_dict())
    write("models/pos_emb.pt", torch.full((58, 5120), 3.0, dtype=torch.bfloat16))
    write("models/neg_emb.pt", torch.zeros(64, 5120, dtype=torch.bfloat16))
    published(tmp_path / "models")
    found = load_prompts(path)
    assert (found.positive.shape, found.positive[0, 0].item()) == ((58, 5120), 3.0)
    assert found.negative.shape == (64, 5120)


def test_a_prompt_file_that_is_not_the_published_one_is_refused(write, dit):
    path = write("model.safetensors", dit.state_dict())
    write("pos_emb.pt", torch.zeros(58, 5120))
    with pytest.raises(CheckpointError, match=r"pos_emb\.pt is not the published prompt embedding.*seedvr2 download"):
        load_prompts(path)


def test_a_model_without_prompts_says_how_to_get_them(write, dit):
    with pytest.raises(CheckpointError, match=r"no pos_emb\.pt beside it; fetch it with: seedvr2 download prompts"):
        load_prompts(write("model.safetensors", dit.state_dict()))


def test_prompts_of_another_width_are_refused(write, dit):
    tensors = {**dit.state_dict(), "positive_conditioning": torch.zeros(3, 20)}
    with pytest.raises(CheckpointError, match=r"positive prompt .* is 20 wide, expected 16"):
        load_prompts(write("model.safetensors", tensors))


def test_a_prompt_of_ones_own_can_be_given_directly(write):
    found = load_prompts(write("mine.pt", torch.ones(12, 5120)))
    assert found.positive.shape == (12, 5120)
    assert found.negative is None
