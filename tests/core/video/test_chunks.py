"""Chunks cover a clip exactly, fades are ramps, and both compose to the community node's batching."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
from einops import rearrange
from torch import Tensor

from seedvr2_core.video import chunks, color, geometry
from tests.core.published import batches, plateau_cosine_weights


def sources(total: int, first: int = 2) -> Iterator[tuple[Tensor, bool]]:
    """Latents numbered 0, 1, ...: `first` of them, then one at a time, as the encoder sends them."""
    numbers = torch.arange(total).view(1, total, 1, 1)
    for start, stop in [(0, min(first, total)), *((i, i + 1) for i in range(first, total))]:
        yield numbers[:, start:stop], stop == total


@pytest.mark.parametrize("length", range(chunks.OVERLAP + 1, 9))
@pytest.mark.parametrize("first", [1, 2, 5])
def test_chunks_cover_a_clip_of_any_length(length, first):
    for total in range(1, 30):
        spans = []
        for start, latents, last in chunks.overlapping(sources(total, first), length):
            assert latents.flatten().tolist() == list(range(start, start + latents.shape[1]))
            spans.append((start, start + latents.shape[1], last))
        assert [last for _, _, last in spans] == [False] * (len(spans) - 1) + [True]
        assert spans[0][0] == 0 and spans[-1][1] == total
        assert all(stop - start == min(length, total) for start, stop, _ in spans)
        for (start, stop, _), (following, _, last) in pairwise(spans):
            assert start < following
            shared = stop - following
            assert shared >= chunks.OVERLAP if last else shared == chunks.OVERLAP


@pytest.mark.parametrize("overlap", [1, 2, 3, 16])
def test_every_faded_frame_holds_some_of_both_chunks(overlap):
    weights = chunks.linear_weights(overlap)
    assert weights.min() > 0 and weights.max() < 1
    torch.testing.assert_close(weights.diff(), torch.full((overlap - 1,), 1 / (overlap + 1)))
    torch.testing.assert_close(weights + weights.flip(0), torch.ones(overlap))


def test_a_fade_between_equal_chunks_changes_nothing():
    frames = torch.rand(4, 3, 5, 6)
    assert torch.equal(chunks.crossfade(frames, frames), frames)


def test_half_precision_fades_in_fp32():
    a, b = torch.rand(2, 5, 3, 4, 4).bfloat16()
    faded = chunks.crossfade(a, b)
    assert faded.dtype == torch.bfloat16
    assert torch.equal(faded, chunks.crossfade(a.float(), b.float()).bfloat16())


def test_the_node_batching_is_a_composition_of_ours(golden):
    tensors, meta = golden("pipeline/batching")
    for name, case in meta["cases"].items():
        assembled, output = node_upscale(tensors[f"{name}/frames01"], case)
        before_post = rearrange(tensors[f"{name}/assembled_before_post"], "t h w c -> t c h w")
        torch.testing.assert_close(assembled, before_post, atol=2e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        difference = (rearrange(output, "t c h w -> t h w c") - tensors[f"{name}/output01"]).abs()
        if case["color_correction"] == "lab":
            assert difference.max() < 2e-2 and (difference < 1e-5).float().mean() > 0.999
        else:
            assert difference.max() < 2e-6, name


def node_upscale(frames01: torch.Tensor, case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The community node with an identity for a model: batches of frames, blended, then corrected slice by slice."""
    frames = rearrange(frames01, "t h w c -> t c h w")
    prepended = case["prepend_frames"]
    frames = frames[geometry.mirror_indices_before(len(frames), prepended)]
    rows, columns = geometry.Target.short_side(case["resolution"]).size(*frames.shape[2:])
    clip = geometry.to_clip(geometry.resize(frames, rows, columns))
    clip = geometry.crop(clip, rows // 2 * 2, columns // 2 * 2)

    spans = batches(len(clip), case["batch_size"], case["temporal_overlap"])
    assert [stop - start for start, stop in spans] == case["batch_kept_frames"]
    full = case["batch_size"] if case["uniform_batch_size"] else 1
    encoded = [geometry.padded_length(max(stop - start, full)) for start, stop in spans]
    assert encoded == case["batch_encoded_frames"]

    assembled, writes = clip[:0], []
    for batch, (start, stop) in enumerate(spans):
        decoded = clip[start:stop] + case["bump_per_batch"] * batch
        shared = len(assembled) - start
        writes.append((len(assembled), stop, batch))
        blended = torch.lerp(assembled[start:], decoded[:shared], plateau_cosine_weights(shared).view(-1, 1, 1, 1))
        assembled = torch.cat([assembled[:start], blended, decoded[shared:]])
    assert writes == [tuple(write) for write in case["writes"]]

    lab = partial(color.lab, lightness_kept=0.8)
    correct = {"none": lambda content, style: content, "wavelet": color.capped_wavelet, "lab": lab}
    correct = correct[case["color_correction"]]
    slices = [correct(assembled[start:stop], clip[start:stop]) for start, stop, _ in writes]
    return assembled, geometry.to_frames(torch.cat(slices))[prepended:]
