"""The critic: where it is read, what it starts from, that samples stay apart, and what has to be fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from seedvr2_core.models.dit import SEEDVR2_3B, SEEDVR2_7B, DiT
from training.discriminator import Discriminator, Readout, tap_blocks
from training.restorer import Restorer


def random(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


@pytest.fixture
def inputs(tiny_dit):
    samples, condition = torch.randn(2, 2, 16, 2, 4, 4).unbind()
    return samples, condition, torch.randn(2, 5, tiny_dit.text_dim), torch.tensor([0.3, 0.8])


def test_8_taps_keep_their_relative_depth():
    assert [tap_blocks(depth) for depth in (36, 32, 8, 6)] == [(16, 26, 36), (14, 23, 32), (4, 6, 8), (3, 4, 6)]
    assert tap_blocks(2) == (1, 2)


@pytest.mark.parametrize("config, millions", [(SEEDVR2_7B, 340), (SEEDVR2_3B, 236)], ids=["7b", "3b"])
def test_heads_of_the_published_sizes(config, millions):
    with torch.device("meta"):
        readout = Readout(config.dim, config.heads, taps=3)
    assert sum(p.numel() for p in readout.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_new_discriminator_is_indifferent_and_starts_from_the_transformer(tiny_dit, inputs):
    dit = random(DiT(tiny_dit))
    discriminator = Discriminator.of(dit)
    assert torch.equal(discriminator(*inputs).logits, torch.zeros(2))
    own = discriminator.state_dict()
    shared = [name for name in dit.state_dict() if not name.startswith("vid_out")]
    assert shared and all(torch.equal(own[name], dit.state_dict()[name]) for name in shared)
    # A copy: training it leaves the transformer alone.
    random(discriminator)
    assert not torch.equal(discriminator.state_dict()[shared[0]], dit.state_dict()[shared[0]])


def test_the_trunk_computes_what_the_transformer_does(tiny_dit, inputs):
    # Behind the last tap, the transformer's own head gives its velocity: the loop over the blocks is the same.
    samples, condition, _, u = inputs
    restorer = random(Restorer(replace(tiny_dit, out_norm=False)))
    features = Discriminator.of(restorer.dit)(samples, condition, [restorer.prompt] * 2, u).features
    velocity = restorer.velocity(samples, condition, u)
    last = restorer.dit.vid_out(features[-1]).view(2, 2, 2, 2, 2, 2, 16)
    torch.testing.assert_close(last.permute(0, 6, 1, 2, 4, 3, 5).reshape(velocity.shape), velocity)


def test_samples_in_one_batch_do_not_meet(tiny_dit, inputs):
    discriminator = random(Discriminator(tiny_dit))
    together = discriminator(*inputs)
    for i in range(2):
        alone = discriminator(*(part[i : i + 1] for part in inputs))
        torch.testing.assert_close(together.logits[i : i + 1], alone.logits)


def test_every_input_matters(tiny_dit, inputs):
    discriminator = random(Discriminator(tiny_dit))
    before = discriminator(*inputs).logits
    for i in range(len(inputs)):
        changed = [part * 0.5 if j == i else part for j, part in enumerate(inputs)]
        assert not torch.allclose(discriminator(*changed).logits, before)


def test_every_weight_receives_a_gradient(tiny_dit, inputs):
    discriminator = random(Discriminator(tiny_dit))
    discriminator(*inputs).logits.sum().backward()
    silent = {name for name, p in discriminator.named_parameters() if p.grad is None or not p.grad.any()}
    # The last layer's text goes nowhere, as in the transformer; the rest all learns.
    assert all(name.startswith("blocks.1.") for name in silent), silent


def test_with_a_trunk_in_bf16_patches_and_logits_stay_fp32(tiny_dit, inputs):
    discriminator = random(Discriminator(tiny_dit))
    exact = discriminator(*inputs).logits
    for name, part in discriminator.named_children():
        if name not in discriminator.in_fp32:
            part.bfloat16()
    critique = discriminator(*inputs)
    assert critique.logits.dtype == torch.float32 and critique.features[0].dtype == torch.bfloat16
    assert {p.dtype for p in discriminator.blocks.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(critique.logits, exact, atol=0.1, rtol=0.1)
    # Samples in bf16 are read too.
    assert discriminator(inputs[0].bfloat16(), *inputs[1:]).logits.isfinite().all()
