"""Pairs of latents that are made when a stage asks for them: for small sets, and to look for mistakes.

    python -m training.precompute --config nano --data DATA --out runs/pixels mode=pixels
    python -m training.pretrain   --config nano --data runs/pixels

Every stage that learns from latents takes such a folder in their place. A sample is what `training.precompute` would
have written for its number, of which it is a pure function, and costs as much each time: degrading, encoding. The last
ones are kept in memory.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seedvr2_core.device import pick_device, pick_dtype
from seedvr2_core.video.geometry import latent_grid

from .config import from_plain
from .precompute import Precompute, Sources, Work, finish, make_sample
from .shards import HELD_OUT, PIXELS, Pair
from .weights import latent_scale, open_vae

# Samples whose latents are kept: 75 MB of nano's, and 1.5 GB of pictures of 960 x 960.
KEPT = 1024


class Pixels:
    """A `shards.Store` of samples that nobody has written.

    A new autoencoder, which has no scale yet, gets the one of the held-out samples; in shards it is that of all.
    """

    def __init__(self, directory: Path, device: str):
        """
        Args:
            directory: where `precompute.note` left word; decoded sources are kept there.
            device: where the autoencoder works, as for `pick_device`.

        Raises:
            CheckpointError: there is no such autoencoder.
            MediaError: there are no media, or more than a few samples cannot be made.
            SettingError: a caption cannot be used, or there is no such device.
        """
        about = json.loads((directory / PIXELS).read_text("utf-8"))
        root = None if about["media"] is None else Path(about["media"])
        self.config = config = from_plain(Precompute, about["config"])
        place = pick_device(device)
        self.vae = open_vae(config.vae, pick_dtype("auto", place), place)
        self.work = Work(config, root)
        self.dataset = Sources(root, directory / "sources", config).dataset()
        self.variants, self.autoencoder, self.unreadable = config.variants, str(config.vae), self.work.replaced
        self.samples = [(crops, index) for crops in config.crops for index in range(crops.count)]
        sizes = (crops.shape(config.data.seed, index, self.dataset) for crops, index in self.samples)
        shapes = [latent_grid(crops.frames, *size) for (crops, _), size in zip(self.samples, sizes, strict=True)]
        self.buckets = sorted(set(shapes))
        self.bucket_of = np.array([self.buckets.index(shape) for shape in shapes])
        self.kind_of = np.repeat(np.arange(len(config.crops)), [crops.count for crops in config.crops])
        self.pair = lru_cache(KEPT)(self._make)
        held_out = [number for kind in range(len(config.crops))
                    for number in np.flatnonzero(self.kind_of == kind)[:HELD_OUT].tolist()]  # fmt: skip
        values = torch.cat([self.pair(number).hq.flatten() for number in held_out]).float()
        self.scale = latent_scale(config.vae, self.vae) or 1 / values.std().item()
        # Of the captions that were met so far.
        self.text_width = self.work.captions.width

    def read(self, number: int, variant: int = 0) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """See `shards.Store.read`."""
        pair = self.pair(number)
        return pair.hq, pair.lq[variant], self.work.text if pair.text is None else pair.text, number

    def _make(self, number: int) -> Pair:
        crops, index = self.samples[number]
        sample = make_sample(self.dataset, self.config, crops, index)
        ((_, pair),) = finish(self.work, self.vae, crops, [(index, sample)])
        return pair
