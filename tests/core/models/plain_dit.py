"""The transformer written down plainly: what `DiT` computes, without any of the ways in which it saves time.

Every token has its own row in every table, every window its own copy of queries, keys and values, and every operation
writes what it computes. Tests compare with it, and benchmarks measure against it.

    n video tokens, l text tokens of all samples   c channels   m pairs of channels   heads, d attention heads
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from seedvr2_core.models.dit import (
    ATTN,
    MLP,
    NORM_EPS,
    Block,
    DiT,
    DiTConfig,
    GeluMlp,
    Modulation,
    SwiGLU,
    WindowAttention,
    patchify,
    token_grid,
    unpatchify,
)
from seedvr2_core.models.rope import text_angles, video_angles
from seedvr2_core.models.windows import window_tokens

SHIFT, SCALE, GATE = range(3)


@dataclass(frozen=True)
class PlainLayout:
    """Where one kind of layer finds its windows."""

    windows: list[Tensor]  # of each window index into [video tokens, text tokens]: its tokens, its sample's text
    samples: list[int]  # of each window
    cos: Tensor  # n+l m
    sin: Tensor


class PlainDiT(DiT):
    """The same weights; samples must be given as a sequence."""

    def forward(self, latents, texts, timesteps, *, layouts=None):
        layouts = layouts or plain_layouts(latents, texts, self.config)
        grids, lengths = [token_grid(latent) for latent in latents], [len(text) for text in texts]
        counts = [math.prod(grid) for grid in grids]
        vid = self.vid_in(torch.cat([patchify(latent) for latent in latents]))
        txt = self.txt_in(torch.cat(list(texts)))
        embedding = rearrange(self.emb_in(timesteps), "b (c sub kind) -> sub kind b c", sub=2, kind=3)
        of_vid, of_txt = (
            torch.arange(len(x)).repeat_interleave(torch.tensor(x)).to(vid.device) for x in (counts, lengths)
        )
        for index, block in enumerate(self.blocks):
            vid, txt = _block(block, vid, txt, embedding, of_vid, of_txt, layouts[index % 2])
        if self.config.out_norm:
            ada = self.vid_out_ada
            vid = _modulate(self.vid_out_norm(vid), embedding[ATTN], (ada.out_shift, ada.out_scale), of_vid)
        out = self.vid_out(vid).split(counts)
        return [unpatchify(tokens, grid) for tokens, grid in zip(out, grids, strict=True)]


def plain_layouts(latents, texts, config: DiTConfig) -> tuple[PlainLayout, PlainLayout]:
    """Of even layers, and of odd ones."""
    return tuple(_layout(latents, texts, config, shifted) for shifted in (False, True))


def _layout(latents, texts, config: DiTConfig, shifted: bool) -> PlainLayout:
    grids, lengths = [token_grid(latent) for latent in latents], [len(text) for text in texts]
    windows, samples, vid_angles, txt_angles = [], [], [], []
    vid_start, txt_start = 0, sum(math.prod(grid) for grid in grids)
    for sample, (grid, length) in enumerate(zip(grids, lengths, strict=True)):
        order, shapes = window_tokens(grid, config.windows, shifted)
        text = torch.arange(txt_start, txt_start + length)
        for tokens in order.split([math.prod(shape) for shape in shapes]):
            windows.append(torch.cat([vid_start + tokens, text]))
            samples.append(sample)
        angles = torch.cat([video_angles(config.rope, config.head_dim, shape, length) for shape in shapes])
        vid_angles.append(angles[order.argsort()])
        still = angles.new_zeros(length, angles.shape[1])
        turned = text_angles(config.rope, config.head_dim, length)
        txt_angles.append(still if turned is None else turned)
        vid_start += len(order)
        txt_start += length
    angles, device = torch.cat(vid_angles + txt_angles), latents[0].device
    return PlainLayout([x.to(device) for x in windows], samples, angles.cos().to(device), angles.sin().to(device))


def _block(block: Block, vid, txt, embedding, of_vid, of_txt, layout: PlainLayout):
    vid_ada, txt_ada = block.ada["vid"], block.ada["txt"]
    vid_in = _modulate(_rms(vid), embedding[ATTN], _offsets(vid_ada, ATTN), of_vid)
    txt_in = _rms(txt)
    if block.modulate_text:
        txt_in = _modulate(txt_in, embedding[ATTN], _offsets(txt_ada, ATTN), of_txt)
    vid_out, txt_out = _attention(block.attn, vid_in, txt_in, of_txt, layout)
    vid = vid + _gate(vid_out, embedding[ATTN], _offsets(vid_ada, ATTN), of_vid)
    vid = vid + _feed(block.mlp["vid"], vid, embedding[MLP], _offsets(vid_ada, MLP), of_vid)
    if block.last:
        return vid, txt
    txt = txt + _gate(txt_out, embedding[ATTN], _offsets(txt_ada, ATTN), of_txt)
    return vid, txt + _feed(block.mlp["txt"], txt, embedding[MLP], _offsets(txt_ada, MLP), of_txt)


def _attention(attn: WindowAttention, vid, txt, of_txt, layout: PlainLayout):
    q, k, v = (torch.cat(pair) for pair in zip(_qkv(attn, vid, "vid"), _qkv(attn, txt, "txt"), strict=True))
    q, k = _rotate(q, layout.cos, layout.sin), _rotate(k, layout.cos, layout.sin)
    out, n = torch.empty_like(q), len(vid)
    text, windows = torch.zeros_like(q[n:]), torch.zeros_like(of_txt)
    for index, sample in zip(layout.windows, layout.samples, strict=True):
        window = (rearrange(x[index], "l heads d -> 1 heads l d") for x in (q, k, v))
        out[index] = rearrange(F.scaled_dot_product_attention(*window), "1 heads l d -> l heads d")
        text[of_txt == sample] += out[n:][of_txt == sample]
        windows[of_txt == sample] += 1
    text = text / windows[:, None, None]
    return attn.proj_out["vid"](out[:n].flatten(1)), attn.proj_out["txt"](text.flatten(1))


def _qkv(attn: WindowAttention, x, stream):
    qkv = attn.proj_qkv[stream](x)
    q, k, v = rearrange(qkv, "n (three heads d) -> three n heads d", three=3, d=attn.head_dim)
    return attn.norm_q[stream](q), attn.norm_k[stream](k), v


def _rotate(x, cos, sin):
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    even, odd = turned.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def _feed(mlp: SwiGLU | GeluMlp, x, embedding, offsets, sample):
    x = _modulate(_rms(x), embedding, offsets, sample)
    if isinstance(mlp, SwiGLU):
        x = F.silu(mlp.proj_in_gate(x)) * mlp.proj_in(x)
    else:
        x = F.gelu(mlp.proj_in(x), approximate="tanh")
    return _gate(mlp.proj_out(x), embedding, offsets, sample)


def _offsets(ada: Modulation, sub: int):
    if sub == ATTN:
        return ada.attn_shift, ada.attn_scale, ada.attn_gate
    return ada.mlp_shift, ada.mlp_scale, ada.mlp_gate


def _modulate(x, embedding, offsets, sample):
    return x * _row(embedding, offsets, SCALE, sample, x.dtype) + _row(embedding, offsets, SHIFT, sample, x.dtype)


def _gate(x, embedding, offsets, sample):
    return x * _row(embedding, offsets, GATE, sample, x.dtype)


def _row(embedding, offsets, kind, sample, dtype):
    """What to multiply with or to add: n c, or 1 c if there is one sample."""
    row = (embedding[kind].float() + offsets[kind].float()).to(dtype)
    return row if len(row) == 1 else row[sample]


def _rms(x):
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)
