"""Attention of many windows which share the text of their sample: no gathered copies, no text repeated per window.

Every window attends to itself and to all text of its sample; text asks in every window separately. Queries and keys
arrive as the projection left them: the norm over a head and the rotary embedding are part of the call. The reference
defines the answer: fp32 inside, one rounding at the end.

    n video tokens, l text tokens of all samples   w windows   heads, d attention heads and their width
    m rotated pairs of channels   r rows of text that come out: for every window the length of its sample's text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.frame_attention import Tile

# A tile of two heads' worth of keys and values must fit shared memory.
MAX_HEAD_DIM = 256


@dataclass(frozen=True, kw_only=True)
class WindowMap:
    """Which tokens every window holds. Made once per clip and kind of layer, by `window_map`."""

    order: Tensor  # n int32, index of every video token, window after window
    starts: Tensor  # w+1 int32, where each window begins in `order`
    text_starts: Tensor  # w int32, first text token of the window's sample
    text_lengths: Tensor  # w int32
    text_rows: Tensor  # w int32, where the window's text begins among what comes out
    longest: int  # tokens of the largest window, its text included
    rows: int  # r
    samples: tuple[tuple[int, int], ...]  # of each sample: windows, text tokens


def window_map(
    order: Tensor, windows: Sequence[Sequence[int]], text_lengths: Sequence[int], device: torch.device | str = "cpu"
) -> WindowMap:
    """Lay out the windows of a batch.

    Args:
        order: n, index of every video token of all samples, window after window.
        windows: of every sample the number of tokens in each of its windows.
        text_lengths: text tokens of every sample.
    """
    starts = (0, *accumulate(text_lengths))
    flat = [length for lengths in windows for length in lengths]
    first = [start for start, lengths in zip(starts, windows, strict=False) for _ in lengths]
    texts = [text for text, lengths in zip(text_lengths, windows, strict=True) for _ in lengths]
    rows = (0, *accumulate(texts))

    def table(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return WindowMap(
        order=order.to(device, torch.int32),
        starts=table((0, *accumulate(flat))),
        text_starts=table(first),
        text_lengths=table(texts),
        text_rows=table(rows[:-1]),
        longest=max(length + text for length, text in zip(flat, texts, strict=True)),
        rows=rows[-1],
        samples=tuple((len(lengths), text) for lengths, text in zip(windows, text_lengths, strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class StreamCall:
    """Queries, keys and values of one stream of tokens, as projected: not normalised, not rotated.

    Each is tokens heads d with adjacent channels, so they may be views into one tensor tokens (3 heads d).
    """

    q: Tensor | None  # None: this stream does not ask. Video always does.
    k: Tensor
    v: Tensor
    norm_q: Tensor  # d, weights of the RMS norm
    norm_k: Tensor


@dataclass(frozen=True, kw_only=True)
class WindowCall:
    """Softmax attention inside windows, scale 1/sqrt(d), no mask."""

    vid: StreamCall  # n
    txt: StreamCall  # l; without queries no text comes out
    cos: Tensor  # n+l m fp32, rotary angles of video tokens, then text tokens
    sin: Tensor
    eps: float  # of the norms
    windows: WindowMap


# The library rounds queries and keys once more, when they are normalised and turned. The sharper the attention the more
# that matters: with scores of a standard deviation of 16 it is 1.6 % off in bf16, a kernel 1.1 %, and they 1.9 % apart.
SLACK = 2.5
# Loads depend on loads, of the order of the tokens: only from five stages on are keys and values a whole tile ahead.
# Shared memory is for 16 bits and heads of 128, as compiled by Triton 3.6.
TILES = (
    # Two warpgroups; 192 KiB on Hopper, 160 before.
    Tile(queries=128, keys=64, warps=8, stages=5),
    # 96 KiB: fits compute capability 8.6 and 8.9.
    Tile(queries=128, keys=32, warps=8, stages=5),
    # Small windows, such as those of a picture at its borders: less of a tile stays empty. Two blocks fit on Hopper.
    Tile(queries=64, keys=32, warps=4, stages=5),
    # Little shared memory, nothing ahead.
    Tile(queries=128, keys=64, warps=8, stages=2),
)


def tiles(d: int) -> tuple[Tile, ...]:
    """The tiles worth trying for heads of this width; none: leave it to the library."""
    return TILES if d <= MAX_HEAD_DIM else ()


def attend(call: WindowCall, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """Run the kernel, on a GPU and in fp16 or bf16.

    Returns:
        video n heads d in the order of its tokens; text r heads d, or None if it did not ask (see `mean_over_windows`).
    """
    from .triton_windows import run

    return run(call, tile)


def reference(call: WindowCall) -> tuple[Tensor, Tensor | None]:
    """What `attend` means."""
    windows, n = call.windows, len(call.vid.k)
    vid, txt = call.vid, call.txt
    vid_q, vid_k = (_turn(x, w, call, 0) for x, w in ((vid.q, vid.norm_q), (vid.k, vid.norm_k)))
    txt_k = _turn(txt.k, txt.norm_k, call, n)
    txt_q = txt_k[:, :0] if txt.q is None else _turn(txt.q, txt.norm_q, call, n)
    vid_out, txt_out = torch.empty_like(vid_q), []
    spans = zip(windows.starts.tolist(), windows.starts[1:].tolist(), strict=False)
    texts = zip(windows.text_starts.tolist(), windows.text_lengths.tolist(), strict=True)
    for (start, stop), (first, length) in zip(spans, texts, strict=True):
        inside, text = windows.order[start:stop].long(), slice(first, first + length)
        k, v = torch.cat([vid_k[inside], txt_k[text]]), torch.cat([vid.v[inside], txt.v[text]]).float()
        asked = vid_q[inside] if txt.q is None else torch.cat([vid_q[inside], txt_q[text]])
        scores = torch.einsum("qhd,khd->hqk", asked, k) / k.shape[-1] ** 0.5
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        vid_out[inside] = out[: stop - start]
        txt_out.append(out[stop - start :])
    vid_out = vid_out.to(vid.v.dtype)
    return vid_out, None if txt.q is None else torch.cat(txt_out).to(vid.v.dtype)


def _turn(x: Tensor, weight: Tensor, call: WindowCall, first: int) -> Tensor:
    """Normalise and rotate tokens heads d, the first of which is number `first` of all; fp32."""
    x = F.rms_norm(x.float(), x.shape[-1:], weight.float(), call.eps)
    cos, sin = (table[first : first + len(x), None] for table in (call.cos, call.sin))
    even, odd = x[..., : 2 * cos.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., 2 * cos.shape[-1] :]], dim=-1)


def mean_over_windows(text: Tensor, windows: WindowMap) -> Tensor:
    """Text r heads d as it comes out of all windows -> l heads d, the mean over the windows of its sample."""
    parts = text.split([count * length for count, length in windows.samples])
    return torch.cat(
        [
            part.unflatten(0, (count, length)).mean(dim=0)
            for part, (count, length) in zip(parts, windows.samples, strict=True)
        ]
    )
