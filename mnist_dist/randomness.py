"""Random numbers as pure functions of (seed, purpose, step): nothing to save, nothing to restore."""

import hashlib

import torch


def derive_seed(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed for one purpose at one step.

    Hashing keeps the streams apart: with `seed + step`, as is often written, step 1 of seed 0 would be step 0 of seed 1.
    """
    digest = hashlib.blake2b(f"{purpose}/{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A CPU generator (CPU everywhere, so that every device sees the same numbers)."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, step))
