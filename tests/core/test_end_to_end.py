"""The published script from frames to frames, step by step, with a given prediction in place of the transformer."""

import pytest
import torch

from seedvr2_core.diffusion.conditioning import with_mask
from seedvr2_core.diffusion.sampler import sample
from seedvr2_core.models.vae import posterior
from seedvr2_core.video import color, geometry
from tests.core.published import area_size, centre_crop, repeat_last_indices

ATOL = 3e-5


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", ["clip7_20x30", "image_33x41", "clip3_nofix"])
def test_frames_come_out_as_published(golden, tiny_vae, case):
    tensors, meta = golden("pipeline/end_to_end")
    tensors = {key.removeprefix(f"{case}/"): x for key, x in tensors.items() if key.startswith(f"{case}/")}
    spec, vae = meta["cases"][case], tiny_vae("tiny_a")
    scale = vae.config.scale
    assert scale == spec["scaling_factor"]

    frames = tensors["frames_u8"].float() / 255
    size = area_size(spec["res_h"], spec["res_w"], *frames.shape[-2:])
    style = geometry.to_clip(centre_crop(geometry.resize(frames, *size)))  # T 3 H W
    clip = style.transpose(0, 1)[None]
    close(clip[0], tensors["transformed"])

    clip = clip[:, :, repeat_last_indices(len(style))]
    assert clip.shape[2] == spec["padded_frames"]
    mean, _ = posterior(vae.encode(clip))
    latent = mean * scale
    close(latent[0].permute(1, 2, 3, 0), tensors["lq_latent"])
    assert with_mask(latent).mean().item() == pytest.approx(spec["condition_mean"], abs=ATOL)

    noise, pred = (tensors[name].permute(3, 0, 1, 2)[None] for name in ("noise", "pred"))
    clean = sample(lambda x, u: pred, noise)
    close(clean[0].permute(1, 2, 3, 0), tensors["x0"])

    decoded = vae.decode(clean / scale)
    # The published code drops the time axis of a single frame.
    close(decoded[0], tensors["decoded"].view(decoded[0].shape))

    content = decoded[0].transpose(0, 1)[: len(style)]
    fixed = content if spec["color_fix"] == "none" else color.wavelet(content, style)
    close(fixed, tensors["color_fixed"])

    codes = geometry.to_uint8(geometry.to_frames(fixed)).permute(0, 2, 3, 1)
    difference = (codes.int() - tensors["output_u8"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3
