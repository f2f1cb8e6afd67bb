"""The critic of pixels: what it takes, what a picture is to it, how far a patch reaches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seedvr2_core.errors import SettingError
from training.patch_discriminator import PatchConfig, PatchDiscriminator, StillConv3d

SMALL = PatchConfig(width=8, levels=3, groups=4)


@pytest.fixture
def critic():
    """With an opinion: a new one has none."""
    torch.manual_seed(0)
    critic = PatchDiscriminator(SMALL)
    nn.init.normal_(critic.to_logit.weight, std=0.1)
    return critic


@pytest.mark.parametrize("frames, patches", [(1, 1), (5, 2), (9, 3), (17, 5)])
def test_pictures_and_clips_get_a_logit_a_patch(critic, frames, patches):
    assert critic(torch.randn(2, 3, frames, 32, 48)).shape == (2, patches, 4, 6)


def test_a_new_discriminator_is_indifferent():
    assert (PatchDiscriminator(SMALL)(torch.randn(1, 3, 1, 16, 16)) == 0).all()


def test_a_picture_is_a_clip_in_which_nothing_moves(critic):
    picture = torch.randn(2, 3, 1, 32, 32)
    still = critic(picture.expand(-1, -1, 5, -1, -1))
    torch.testing.assert_close(critic(picture).expand_as(still), still, rtol=1e-4, atol=1e-5)


def test_the_shortcut_for_a_lone_frame_is_the_convolution_of_its_copies():
    conv = StillConv3d(3, 4, 4, stride=(2, 2, 2)).double()
    frame = torch.randn(1, 3, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(conv(frame), nn.Conv3d.forward(conv, frame.expand(-1, -1, 3, -1, -1)))


def test_every_frame_and_pixel_counts(critic):
    clip = torch.randn(1, 3, 5, 16, 16, requires_grad=True)
    critic(clip).square().sum().backward()
    assert (clip.grad.abs().sum(1) > 0).all()


def test_it_sees_whether_a_clip_moves(critic):
    clip = torch.randn(1, 3, 5, 16, 16)
    assert not torch.allclose(critic(clip), critic(clip.flip(2)), atol=1e-4)


@pytest.mark.parametrize("levels, reach", [(3, 38), (4, 78), (5, 158)])
def test_a_patch_is_as_large_as_the_config_says(levels, reach):
    critic = PatchDiscriminator(PatchConfig(width=1, levels=levels, groups=1)).double()
    nn.init.ones_(critic.to_logit.weight)
    # Without norms, which see everything, and with all taps alive.
    critic.levels = nn.Sequential(*(layer for layer in critic.levels if isinstance(layer, StillConv3d)))
    for layer in critic.levels:
        nn.init.ones_(layer.weight)
    picture = torch.zeros(1, 3, 1, 512, 512, dtype=torch.float64, requires_grad=True)
    logits = critic(picture)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows = picture.grad[0, 0, 0].abs().sum(1).nonzero()
    assert len(rows) == rows.max() - rows.min() + 1 == reach


def test_the_default_is_the_published_practice():
    with torch.device("meta"):
        critic = PatchDiscriminator(PatchConfig())
    widths = [layer.out_channels for layer in critic.levels if isinstance(layer, StillConv3d)]
    assert widths == [64, 128, 256, 512, 512]
    assert not any("parametrizations" in name for name, _ in critic.named_modules())


def test_a_width_that_its_groups_do_not_divide_is_refused():
    with pytest.raises(SettingError, match="10 cannot be split into 4"):
        PatchConfig(width=10, groups=4)
