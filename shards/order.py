"""Random order and random numbers that depend on a seed and names alone: the same on every machine and
version."""

import hashlib
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def hash_number(seed: int, *parts: str | int) -> int:
    """Integer in [0, 2**64) that looks random and depends on the arguments alone."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *parts):
        data = str(part).encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "big") + data)
    return int.from_bytes(digest.digest(), "big")


def hash_fraction(seed: int, *parts: str | int) -> float:
    """Number in [0, 1), see `hash_number`."""
    return (hash_number(seed, *parts) >> 11) / 2**53


def shuffled(
    items: Iterable[Item], seed: int, *parts: str | int, name: Callable[[Item], str | int] = str
) -> list[Item]:
    """`items` in random order. An item's place depends on its `name`, not on where it was in `items`.

    Names must differ; `parts` set one use of the seed apart from another.
    """
    return sorted(
        items, key=lambda item: (hash_number(seed, *parts, name(item)), os.fsencode(str(name(item))))
    )
