"""A critic of pixels: convolutions that judge every patch of a picture or clip on its own, a 3-D PatchGAN.

Time is padded with copies of the first and the last frame, so that a picture is a clip in which nothing moves.

    b clips   c channels   T H W pixel frames, height, width   t h w patches in time, height, width

Source: pix2pix, arXiv 1611.07004; in three dimensions as open video autoencoders have it. Neither SeedVR nor SeedVR2
describes its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from seedvr2_core.errors import SettingError

from .config import setting

# Channels stop doubling at this multiple of the first level's.
WIDEST = 8
# The last levels of the strided ones halve time too, as many as in the autoencoder.
TEMPORAL_LEVELS = 2
SLOPE = 0.2


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Sizes of one discriminator. It sees patches of 38, 78 or 158 pixels at 3, 4 or 5 levels."""

    width: int = setting(64, "channels of the first level; they double up to eightfold", least=1)
    levels: int = setting(5, "that halve height and width; sides are at least 2 to this power", least=1)
    groups: int = setting(8, "of every GroupNorm; divides the width", least=1)

    def __post_init__(self) -> None:
        if self.width % self.groups:
            raise SettingError(f"A width of {self.width} cannot be split into {self.groups} groups; choose a multiple.")


class StillConv3d(nn.Conv3d):
    """Convolution over three frames; what lies before the first and after the last frame is a copy of those."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__(c_in, c_out, (3, kernel, kernel), stride, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] == 1:
            # A lone frame meets itself under every tap, so the taps may be added up first: a third of the work.
            frame = F.conv2d(x.squeeze(2), self.weight.sum(2), self.bias, self.stride[1:], self.padding[1:])
            return frame.unsqueeze(2)
        return super().forward(F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate"))


class PatchDiscriminator(nn.Module):
    """Pictures and clips b 3 T H W, about -1..1, to logits b t h w in fp32, one a patch; above 0: looks real.

    Levels halve height and width, the last two of them time as well (2m+1 frames become m+1). The last layer starts at
    zero: a new discriminator is indifferent.
    """

    in_fp32 = ("to_logit",)

    def __init__(self, config: PatchConfig):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        c_in = 3
        for level in range(config.levels):
            c_out = config.width * min(2**level, WIDEST)
            time = 2 if level >= config.levels - TEMPORAL_LEVELS else 1
            layers.append(StillConv3d(c_in, c_out, 4, stride=(time, 2, 2)))
            if level:
                layers.append(nn.GroupNorm(config.groups, c_out))
            layers.append(nn.LeakyReLU(SLOPE))
            c_in = c_out
        self.levels = nn.Sequential(*layers)
        self.to_logit = StillConv3d(c_in, 1, 3)
        nn.init.zeros_(self.to_logit.weight)
        nn.init.zeros_(self.to_logit.bias)

    def forward(self, clip: Tensor) -> Tensor:
        features = self.levels(clip.to(self.levels[0].weight.dtype))
        return self.to_logit(features.to(self.to_logit.weight.dtype)).squeeze(1).float()
