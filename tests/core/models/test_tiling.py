"""Tiles against the community node's, and what they promise beside that."""

import pytest
import torch

from seedvr2_core.errors import SettingError
from seedvr2_core.models.tiling import decode_tiled, encode_tiled

RUNS = {"encode": encode_tiled, "decode": decode_tiled}


@pytest.mark.parametrize("case", ["enc_96x80_t64_o16", "enc_48x104_t48_o8", "dec_10x7_t48_o16", "dec_4x12_t32_o8"])
def test_tiles_match_the_community_node(golden, tiny_vae, case):
    tensors, meta = golden("vae/tiny_a_tiled")
    spec = meta["cases"][case]
    (tile, _), (overlap, _) = spec["tile_size"], spec["tile_overlap"]
    out = RUNS[spec["kind"]](tiny_vae("tiny_a"), tensors[f"{case}/x"], tile, overlap)
    # The node drops the time axis of a single frame.
    torch.testing.assert_close(out.view(spec["out_shape"]), tensors[f"{case}/y_tiled"], atol=5e-5, rtol=0)


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


@pytest.mark.parametrize("overlap", [0, 8, 16, 40])
@pytest.mark.parametrize(("height", "width"), [(48, 48), (56, 200), (120, 16)])
def test_tiles_that_agree_blend_into_the_whole(height, width, overlap):
    vae, clip = Recorder(), torch.randn(1, 3, 2, height, width)
    latent = encode_tiled(vae, clip, tile=48, overlap=overlap)
    torch.testing.assert_close(latent, clip[..., ::8, ::8])
    assert max(map(max, vae.sizes)) <= 48
    torch.testing.assert_close(decode_tiled(Recorder(), latent, tile=48, overlap=overlap), Recorder().decode(latent))


def test_what_fits_into_one_tile_is_exact(random_vae):
    vae, clip = random_vae, torch.rand(1, 3, 5, 32, 48) * 2 - 1
    moments = encode_tiled(vae, clip, tile=48, overlap=16)
    assert torch.equal(moments, vae.encode(clip))
    assert torch.equal(decode_tiled(vae, moments[:, :16], tile=48, overlap=16), vae.decode(moments[:, :16]))


@pytest.mark.parametrize(("tile", "overlap"), [(100, 16), (64, 12), (64, 64), (0, 0), (64, -8)])
def test_impossible_tiles_are_refused(tile, overlap):
    for run in RUNS.values():
        with pytest.raises(SettingError, match=f"Tiles of {tile} pixels that overlap by {overlap}"):
            run(Recorder(), torch.zeros(1, 3, 1, 64, 64), tile, overlap)
