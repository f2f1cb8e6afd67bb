"""The transformer as a critic: the trunk of a restorer, and heads that read three of its depths into one logit a clip.

It sees what the generator sees, the sample itself where the generator has its noise. Nothing is added to the sample;
the timestep it is told is only a way to ask, and varies.

    b clips   c channels   t h w latent frames, height, width   n video tokens of all clips   l text tokens
    heads, d attention heads and their width

Source: Diffusion Adversarial Post-Training, arXiv 2501.08316, figure 1; SeedVR2, arXiv 2506.05301, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seedvr2_core.diffusion.conditioning import with_mask
from seedvr2_core.models.dit import NORM_EPS, Conditioning, DiT, DiTConfig, Layout, make_layout, patchify, token_grid

from .parallel import Arranged

# Blocks after which the published discriminator is read, of so many.
TAPS, TAPS_OF = (16, 26, 36), 36
# Hidden width of a head's feed-forward, in widths of the model.
HEAD_MLP = 4


def tap_blocks(depth: int) -> tuple[int, ...]:
    """After which blocks, counted from 1, features are read: at the published depths, as a share of all blocks.

    Where a shallow model would be read twice at one depth, it is read there once.
    """
    return tuple(dict.fromkeys(max(1, round(depth * tap / TAPS_OF)) for tap in TAPS))


class Critique(NamedTuple):
    """What the discriminator says of b samples."""

    logits: Tensor  # b, fp32; above 0: looks real
    features: list[Tensor]  # of every tap: n c, the hidden tokens before the heads


class Head(nn.Module):
    """One learnable token looks at all video tokens of a clip and is refined: n c of b clips -> b c."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.token = nn.Parameter(0.02 * torch.randn(dim))
        self.norm_in = nn.RMSNorm(dim, eps=NORM_EPS)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // heads, eps=NORM_EPS)
        self.norm_k = nn.RMSNorm(dim // heads, eps=NORM_EPS)
        self.to_out = nn.Linear(dim, dim)
        self.norm_mlp = nn.RMSNorm(dim, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, HEAD_MLP * dim), nn.GELU(), nn.Linear(HEAD_MLP * dim, dim))

    def forward(self, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        # From here to the logit in the heads' own type: the penalty multiplies what is rounded away by 1000.
        tokens = self.norm_in(tokens.to(self.token.dtype))
        q = self.norm_q(rearrange(self.to_q(self.token), "(heads d) -> heads 1 d", heads=self.heads))
        k, v = rearrange(self.to_kv(tokens), "n (two heads d) -> two heads n d", two=2, heads=self.heads)
        clips = zip(self.norm_k(k).split(counts, dim=1), v.split(counts, dim=1), strict=True)
        seen = torch.stack([F.scaled_dot_product_attention(q, k, v) for k, v in clips])
        token = self.token + self.to_out(rearrange(seen, "b heads 1 d -> b (heads d)"))
        return token + self.mlp(self.norm_mlp(token))


class Readout(nn.Module):
    """The features of all taps -> one logit a clip: a head each, then a norm and a projection of all they saw.

    The projection starts at zero: a new discriminator is indifferent, and its loss ln 2.
    """

    def __init__(self, dim: int, heads: int, taps: int):
        super().__init__()
        self.heads = nn.ModuleList(Head(dim, heads) for _ in range(taps))
        self.norm = nn.LayerNorm(taps * dim)
        self.to_logit = nn.Linear(taps * dim, 1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights N(0, 0.02), norms at one, the projection at zero."""
        for module in self.modules():
            if isinstance(module, Head):
                nn.init.normal_(module.token, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.0 if module is self.to_logit else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                module.reset_parameters()

    def forward(self, features: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        seen = [head(tokens, counts) for head, tokens in zip(self.heads, features, strict=True)]
        return self.to_logit(self.norm(torch.cat(seen, dim=-1))).squeeze(-1)


class Discriminator(Arranged):
    """A transformer of the generator's kind at full depth, without its last projection, and a readout."""

    # Patches in, and from the taps to the logit; the trunk between them may compute in bf16.
    in_fp32 = ("vid_in", "readout")

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.taps = tap_blocks(config.depth)
        # Under the names of the transformer, so that its tensors load. What comes after the blocks is dropped.
        trunk = DiT(config)
        self.vid_in, self.txt_in, self.emb_in, self.blocks = trunk.vid_in, trunk.txt_in, trunk.emb_in, trunk.blocks
        self.readout = Readout(config.dim, config.heads, len(self.taps))

    @classmethod
    def of(cls, dit: DiT) -> Discriminator:
        """A discriminator that starts from the weights of a transformer, which stays as it is. In fp32, or fp64.

        Source: APT found the many-step model a better start than the distilled one.
        """
        weight = next(dit.parameters())
        with torch.device("meta"):
            discriminator = cls(dit.config).to(torch.promote_types(weight.dtype, torch.float32))
        discriminator.to_empty(device=weight.device)
        discriminator.readout.reset_parameters()
        weights = {name: tensor for name, tensor in dit.state_dict().items() if not name.startswith("vid_out")}
        missing, unexpected = discriminator.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.startswith("readout.") for name in missing)
        return discriminator

    def forward(
        self,
        samples: Tensor,
        condition: Tensor,
        texts: Sequence[Tensor] | Tensor,
        u: Tensor,
        *,
        layout: Layout | None = None,
        attention: str = "auto",
    ) -> Critique:
        """Judge samples.

        Args:
            samples: clean or restored latents b 16 t h w, without noise.
            condition: degraded latents b 16 t h w, the generator's.
            texts: of every sample l text_dim.
            u: b, 0..1, the timestep the trunk is told. At 0 training collapses (APT); draw it.
            layout: from `layout_of` for these shapes, where several calls share one.
            attention: a name of `seedvr2_core.attention`, or "auto".
        """
        layout = layout or self.layout_of(samples, texts)
        counts = [math.prod(grid) for grid in layout.grids]
        latents = torch.cat([samples, with_mask(condition)], dim=1)
        patches = torch.cat([patchify(latent) for latent in latents])
        # Embedded in fp32, whatever the trunk: in bf16 a perturbation of 0.01 leaves every sixth entry as it was.
        trunk = self.txt_in.weight.dtype
        vid = self.vid_in(patches.to(self.vid_in.proj.weight.dtype)).to(trunk)
        txt = self.txt_in(torch.cat(list(texts)).to(trunk))
        embedding = self.emb_in(u)
        vid_cond, txt_cond = Conditioning(embedding, counts), Conditioning(embedding, layout.text_lengths)
        features = []
        for index, block in enumerate(self.layers.of(self)):
            vid, txt = block(vid, txt, vid_cond, txt_cond, layout.of_layer(index), attention)
            if index + 1 in self.taps:
                features.append(self.layers.whole(vid, sum(counts)))
        return Critique(self.readout(features, counts), features)

    def layout_of(self, samples: Sequence[Tensor] | Tensor, texts: Sequence[Tensor] | Tensor) -> Layout:
        """The window layout of samples of these shapes."""
        grids = [token_grid(sample) for sample in samples]
        return make_layout(grids, [len(text) for text in texts], self.config, samples[0].device)
