"""Processes that share a frame agree with one that has all of it."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from seedvr2_core.errors import SettingError
from seedvr2_core.models.row_split import RowSplit
from seedvr2_core.models.vae import CausalState, VAEConfig, VideoVAE, posterior
from seedvr2_core.models.vae_fast import FastOptions, FastVAE

LATENT_ROWS, FRAMES = 5, 9


def make_vae() -> VideoVAE:
    torch.manual_seed(0)
    vae = VideoVAE(VAEConfig(widths=(8, 8, 16, 24), blocks=1, groups=4)).double().requires_grad_(False)
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.normal_(0.5, 0.5)
    return vae


def make_clip() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 3, FRAMES, 8 * LATENT_ROWS, 24, generator=generator, dtype=torch.float64) * 2 - 1


def one_process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    split = RowSplit.of_world()
    clip = make_clip()
    fast = FastVAE(make_vae(), FastOptions(split=split, winograd_from=8, winograd_rows_from=16, band=60))
    part = clip[:, :, :, split.rows(clip.shape[3], 8)]
    state, moments = CausalState(), []
    for piece in part.split([1, 4, 4], dim=2):
        out, state = fast.encode_slice(piece, state)
        moments.append(out)
    moments = torch.cat(moments, dim=2)
    torch.save((moments, fast.decode(posterior(moments)[0])), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_processes_that_share_a_frame_compute_what_one_does(size, tmp_path):
    multiprocessing.spawn(one_process, (size, str(tmp_path)), nprocs=size)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    moments, decoded = (torch.cat(bands, dim=3) for bands in zip(*parts, strict=True))
    vae = make_vae()
    expected = vae.encode(make_clip())
    torch.testing.assert_close(moments, expected, atol=1e-11, rtol=0)
    torch.testing.assert_close(decoded, vae.decode(posterior(expected)[0]), atol=1e-11, rtol=0)


def test_rows_are_shared_in_multiples_and_none_is_lost():
    for size in (1, 2, 3, 5):
        rows = [range(80)[RowSplit(rank, size).rows(80, 16)] for rank in range(size)]
        assert [row for part in rows for row in part] == list(range(80))
        assert all(len(part) % 16 == 0 and len(part) > 0 for part in rows)


@pytest.mark.parametrize(("height", "size"), [(40, 6), (44, 2)])
def test_too_few_rows_are_refused(height, size):
    with pytest.raises(SettingError, match="rows"):
        RowSplit(0, size).rows(height, 8)
