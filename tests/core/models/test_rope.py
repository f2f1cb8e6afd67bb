"""Rotary embedding against the published angles and rotations."""

import pytest
import torch

from seedvr2_core.models.rope import Turns, factors, frequencies, rotate, text_angles, video_angles
from seedvr2_core.video.geometry import Grid

ATOL = {"3b": 2e-5, "7b": 1e-4}
KINDS = {"3b": "video_text", "7b": "video"}


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def angles_of(golden, name):
    """Golden tensors, and our angles of the same video and text tokens."""
    tensors, meta = golden(f"dit/rope_{name}")
    kind, head_dim = KINDS[name], meta["head_dim"]
    lengths = meta.get("text_lengths", [0] * len(meta["window_shapes"]))
    windows = zip(meta["window_shapes"], lengths, strict=True)
    video = torch.cat([video_angles(kind, head_dim, Grid(*shape), length) for shape, length in windows])
    text = [text_angles(kind, head_dim, length) for length in lengths]
    return tensors, video, torch.cat(text) if name == "3b" else None


def turns(angles, head_dim=128, count=1):
    """The rotation of equal sequences with these angles."""
    return [Turns(count, factors(angles, head_dim))]


def test_frequencies_match(golden):
    for name, kind in KINDS.items():
        tensors, meta = golden(f"dit/rope_{name}")
        assert torch.equal(frequencies(kind, meta["head_dim"]), tensors["freqs"])


@pytest.mark.parametrize("name", KINDS)
def test_angles_match(golden, name):
    tensors, video, text = angles_of(golden, name)
    # There every angle is given twice, once for each channel of a pair.
    close(video, tensors["vid_angles"][:, ::2], ATOL[name])
    if text is not None:
        close(text, tensors["txt_angles"][:, ::2], ATOL[name])


@pytest.mark.parametrize("name", KINDS)
def test_queries_and_keys_are_rotated_as_published(golden, name):
    tensors, video, text = angles_of(golden, name)
    for stream, angles in (("vid", video), ("txt", text)):
        if angles is None:
            continue
        for part in "qk":
            out = rotate(tensors[f"{stream}_{part}"].clone(), turns(angles))
            close(out, tensors[f"{stream}_{part}_out"], ATOL[name])


def test_only_the_3b_kind_rotates_text():
    assert text_angles("video", 128, 5) is None
    assert text_angles("video_text", 128, 5).shape == (5, 63)


def test_time_counts_on_from_the_text():
    text = text_angles("video_text", 128, 8)
    video = video_angles("video_text", 128, Grid(1, 1, 1), 7)
    # The first video token stands, in time only, where an eighth text token would.
    assert torch.equal(video[0, :21], text[7, :21])
    assert torch.equal(video[0, 21:], torch.zeros(42))


def test_a_window_of_one_token_lies_at_its_beginning():
    one, two = (video_angles("video", 128, Grid(1, 1, length), 0) for length in (1, 2))
    assert torch.equal(one[0], two[0])


def test_products_depend_on_the_difference_of_positions():
    angles = text_angles("video_text", 48, 20)
    q, k = (torch.randn(1, 1, 48).repeat(20, 1, 1) for _ in range(2))
    q, k = (rotate(x, turns(angles, 48))[:, 0] for x in (q, k))
    scores = q @ k.T
    close(scores[:-5, :-5], scores[5:, 5:], 1e-4)


def test_half_precision_is_rotated_in_fp32():
    angles = video_angles("video", 128, Grid(2, 4, 4), 0)
    x = torch.randn(32, 2, 128).bfloat16()
    out = rotate(x.clone(), turns(angles))
    assert torch.equal(out, rotate(x.float(), turns(angles)).bfloat16())
    assert torch.equal(out[..., 60:], x[..., 60:])


def test_equal_sequences_share_their_rotation():
    long, short = (video_angles("video_text", 48, Grid(1, 1, length), 2) for length in (5, 3))
    x = torch.randn(2 * 5 + 3, 2, 48)
    expected = torch.cat([rotate(part.clone(), turns(angles, 48)) for part, angles in
                          zip(x.split([5, 5, 3]), (long, long, short), strict=True)])  # fmt: skip
    assert torch.equal(rotate(x.clone(), turns(long, 48, count=2) + turns(short, 48)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_keeps_what_is_rotated_and_turns_back(dtype):
    angles = video_angles("video_text", 48, Grid(1, 2, 3), 2)
    x = torch.randn(12, 2, 48, dtype=dtype)
    held, kept = x.clone().requires_grad_(), x.clone()
    out = rotate(held, turns(angles, 48, count=2))
    assert torch.equal(held, kept)
    direction = torch.randn_like(out)
    out.backward(direction)
    # The inverse of a rotation is the rotation by the opposite angles.
    assert torch.equal(held.grad, rotate(direction.clone(), turns(-angles, 48, count=2)))
    assert torch.equal(out, rotate(x, turns(angles, 48, count=2)))
    # Without a gradient it is done in place.
    assert torch.equal(out, x)
