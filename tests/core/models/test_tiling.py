"""Tiles against the community node's and against the whole, and what they promise beside that."""

import math
from itertools import islice, pairwise

import pytest
import torch

from seedvr2_core.checkpoints import load_vae
from seedvr2_core.checkpoints.folders import NANO_VAE
from seedvr2_core.errors import SettingError
from seedvr2_core.memory.streaming import DeviceState
from seedvr2_core.models.tiling import TiledVAE, cut, ramps
from seedvr2_core.models.vae import CausalState, posterior
from seedvr2_core.models.vae_fast import FastVAE
from seedvr2_core.video.files import open_reader, probe
from seedvr2_core.video.geometry import LATENT_PIXELS, to_clip

OVERLAPS = pytest.mark.parametrize("overlap", [0, 8, 16, 24, 40])


@pytest.mark.parametrize("case", ["enc_96x80_t64_o16", "enc_48x104_t48_o8", "dec_10x7_t48_o16", "dec_4x12_t32_o8"])
def test_where_one_tile_decides_it_is_that_of_the_community_node(golden, tiny_vae, case):
    """The node's tiles are ours; between them it goes over along a cosine."""
    tensors, meta = golden("vae/tiny_a_tiled")
    spec = meta["cases"][case]
    (tile, _), (overlap, _) = spec["tile_size"], spec["tile_overlap"]
    out = getattr(TiledVAE(tiny_vae("tiny_a"), tile, overlap), spec["kind"])(tensors[f"{case}/x"])
    # The node drops the time axis of a single frame.
    out, expected = out.view(spec["out_shape"]), tensors[f"{case}/y_tiled"]
    alone = torch.ones(out.shape[-2:], dtype=torch.bool)
    scale = LATENT_PIXELS if spec["kind"] == "decode" else 1
    for mask in (alone, alone.T):
        spans = cut(mask.shape[0] // scale, tile // LATENT_PIXELS, overlap // LATENT_PIXELS)
        for before, after in pairwise(spans):
            mask[after.start * scale : before.stop * scale] = False
    assert 0 < alone.sum() < alone.numel()
    torch.testing.assert_close(out[..., alone], expected[..., alone], atol=5e-5, rtol=0)


class Recorder:
    """Stands in for the autoencoder: nearest neighbour both ways, remembering the sizes it was asked for."""

    def __init__(self):
        self.sizes = []

    def encode(self, clip):
        self.sizes.append(tuple(clip.shape[-2:]))
        return clip[..., ::8, ::8]

    def decode(self, latent):
        self.sizes.append(tuple(latent.shape[-2:]))
        return latent.repeat_interleave(8, dim=-2).repeat_interleave(8, dim=-1)


@OVERLAPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("height", "width"), [(48, 48), (56, 200), (120, 16)])
def test_tiles_that_agree_blend_into_the_whole(height, width, overlap, dtype):
    vae, clip = Recorder(), torch.randn(1, 3, 2, height, width).to(dtype)
    tiled = TiledVAE(vae, 48, overlap)
    latent = tiled.encode(clip)
    # In bf16 as well: weights of which each is rounded to it would not sum to one.
    assert latent.dtype == dtype
    close = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(latent, clip[..., ::8, ::8], **close)
    assert max(map(max, vae.sizes)) <= 48
    torch.testing.assert_close(tiled.decode(latent), Recorder().decode(latent), **close)


@OVERLAPS
@pytest.mark.parametrize("side", [48, 56, 96, 200])
def test_weights_sum_to_one_everywhere(side, overlap):
    spans = cut(side // 8, 6, overlap // 8)
    total = torch.zeros(side, dtype=torch.float64)
    for span, weight in zip(spans, ramps(spans, overlap // 8, 8), strict=True):
        assert weight.min() > 0
        total[span.start * 8 : span.stop * 8] += weight
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-15, rtol=0)


def test_from_one_tile_to_the_next_it_goes_along_a_straight_line():
    first, second = ramps(cut(10, 6, 2), 2, 8)
    line = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    torch.testing.assert_close(second[:16], line)
    torch.testing.assert_close(first[-16:], 1 - line)
    assert (first[:-16] == 1).all() and (second[16:] == 1).all()


@pytest.mark.parametrize("make", [lambda vae: vae, FastVAE], ids=["plain", "fast"])
@pytest.mark.parametrize("begin", [CausalState, DeviceState])
def test_time_may_be_cut_anywhere(random_vae, make, begin):
    tiled, clip = TiledVAE(make(random_vae), 48, 16), torch.rand(1, 3, 13, 40, 72) * 2 - 1
    moments = tiled.encode(clip)
    torch.testing.assert_close(in_slices(tiled.encode_slice, clip, [5, 8], begin()), moments, atol=2e-5, rtol=0)
    latent = posterior(moments)[0]
    clip = tiled.decode(latent)
    torch.testing.assert_close(in_slices(tiled.decode_slice, latent, [1, 2, 1], begin()), clip, atol=2e-5, rtol=0)


def in_slices(step, x, lengths, state):
    parts, out = x.split(lengths, dim=2), []
    for i, part in enumerate(parts):
        y, state = step(part, state, last=i == len(parts) - 1)
        out.append(y)
    assert not state
    return torch.cat(out, dim=2)


def test_a_slice_leaves_the_state_it_was_given_as_it_was(random_vae):
    tiled, latent = TiledVAE(random_vae, 16, 8), torch.randn(1, 16, 2, 2, 4)
    _, state = tiled.decode_slice(latent[:, :, :1], CausalState())
    first = tiled.decode_slice(latent[:, :, 1:], state)[0]
    assert torch.equal(first, tiled.decode_slice(latent[:, :, 1:], state)[0])


def test_what_fits_into_one_tile_is_exact(random_vae):
    tiled, clip = TiledVAE(random_vae, 48, 16), torch.rand(1, 3, 5, 32, 48) * 2 - 1
    moments = tiled.encode(clip)
    assert torch.equal(moments, random_vae.encode(clip))
    assert torch.equal(tiled.decode(moments[:, :16]), random_vae.decode(moments[:, :16]))


def test_a_real_clip_in_tiles_is_close_to_the_whole(sample):
    """Measured: 58 dB blended, 50 dB side by side."""
    vae = FastVAE(load_vae(NANO_VAE, torch.float32))
    reader = open_reader(probe(sample("lq/clips/chaplin_640x360_audio.mp4")))
    frames = torch.stack([frame.floats() for frame in islice(reader, 5)])
    clip = to_clip(frames[:, 80:208, 240:400]).permute(3, 0, 1, 2)[None]
    latent = posterior(vae.encode(clip))[0]
    whole = vae.decode(latent)
    blended, side_by_side = (psnr(TiledVAE(vae, 96, overlap).decode(latent), whole) for overlap in (48, 0))
    assert blended > 54
    assert blended > side_by_side + 4


def psnr(clip, expected):
    """Decibels, of clips in -1..1."""
    return 10 * math.log10(4 / (clip.clamp(-1, 1) - expected.clamp(-1, 1)).square().mean().item())


@pytest.mark.parametrize(("tile", "overlap"), [(100, 16), (64, 12), (64, 64), (64, 72), (0, 0), (-64, 0), (64, -8)])
def test_impossible_tiles_are_refused(tile, overlap):
    with pytest.raises(SettingError, match=f"Tiles of {tile} pixels that overlap by {overlap}"):
        TiledVAE(Recorder(), tile, overlap)
