"""Stateless randomness: every draw is a function of where it is used, so an exact resume needs the step alone."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(seed: int, purpose: str, step: int = 0, slot: int = 0) -> int:
    """A 64-bit key for one place in a run; equal arguments give equal keys on every machine and in every process.

    Args:
        seed: of the run.
        purpose: what the draw is for ("crop", "noise", "timestep", ...), with the stage in front where stages differ.
        step: optimiser step, or the index of a precomputed sample.
        slot: position in the global batch, never a rank or a worker.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}/{slot}".encode(), digest_size=8).digest()
    # 63 bits, because torch.Generator takes a signed seed.
    return int.from_bytes(digest, "little") >> 1


def rng(seed: int, purpose: str, step: int = 0, slot: int = 0) -> np.random.Generator:
    """A NumPy generator for one place in a run; see `key`."""
    return np.random.Generator(np.random.Philox(key(seed, purpose, step, slot)))


def torch_rng(seed: int, purpose: str, step: int = 0, slot: int = 0, device: str = "cpu") -> torch.Generator:
    """A torch generator for one place in a run; see `key`."""
    return torch.Generator(device).manual_seed(key(seed, purpose, step, slot))
