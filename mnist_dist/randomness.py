"""Random numbers as pure functions of (seed, purpose, step): nothing to save, nothing to restore. And the generators of this process."""

import contextlib
import ctypes
import functools
import hashlib
import random
from collections.abc import Iterator

import numpy as np
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


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed the generators of torch (on the CPU, and on `device` if that is a GPU), numpy and random."""
    # `torch.manual_seed` would visit every kind of device, which takes a hundred times as long.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def keeping_generators() -> Iterator[None]:
    """Leave this process's generators on the CPU, those of torch, numpy and random, as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


@contextlib.contextmanager
def seeding_generators(seed: int) -> Iterator[None]:
    """Seed them within the block, and leave them as they were."""
    with keeping_generators():
        seed_generators(seed)
        yield


def read_generators() -> tuple[object, ...]:
    """The state of torch's, numpy's and Python's generators: another one when something was drawn."""
    _kind, keys, *places = np.random.get_state()  # of the normal distribution numpy draws two numbers and keeps one
    return torch.get_rng_state().numpy().tobytes(), np.asarray(keys).tobytes(), places, random.getstate()


# Where the generators of random and numpy, both Mersenne twisters, keep their place in a block of 624 numbers, and its first number.
_WORDS = 624
_RANDOM = id(random.random.__self__) + object.__basicsize__  # type: ignore[attr-defined]
_NUMPY = np.random.get_bit_generator().ctypes.state_address  # type: ignore[attr-defined]
_RANDOM_PLACE = (ctypes.c_uint32 * 2).from_address(_RANDOM)
_NUMPY_WORD = (ctypes.c_uint32 * 1).from_address(_NUMPY)
_NUMPY_PLACE = (ctypes.c_uint32 * 1).from_address(_NUMPY + 4 * _WORDS)


def read_places() -> tuple[int, int, int, int]:
    """What changes when numpy or random are drawn from: the place moves, or after a whole block comes back beside another first number."""
    return _RANDOM_PLACE[0], _RANDOM_PLACE[1], _NUMPY_WORD[0], _NUMPY_PLACE[0]


@functools.cache
def can_read_places() -> bool:
    """Whether the generators of this Python and this numpy are kept as `read_places` expects."""
    states = random.getstate(), np.random.get_state()
    try:
        random.seed(1)
        np.random.seed(1)
        (random_place, _, _, numpy_place), expected = read_places(), (_WORDS, _WORDS)
        random.random()  # noqa: S311
        after_random = read_places()
        np.random.random_sample()
        after_numpy = read_places()
        return (random_place, numpy_place) == expected and (after_random[0], after_random[3], after_numpy[3]) == (2, _WORDS, 2)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
