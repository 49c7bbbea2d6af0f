"""Random numbers for merge methods: a function of what they are for, never of how a run went.

Every number is addressed by (seed, method, tensor, model, flat index), so pieces, threads, shards
and devices cannot change it. Which numbers become a mask is the method's business.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Draws", "model_keys"]

_PER_COUNT = 8  # 32-bit words that Philox makes of one value of its counter
_BITS = 24  # of each word; as many as a float32 holds


def model_keys(origins: Iterable[str]) -> tuple[str, ...]:
    """Return what tells each model's random numbers apart: its folder's or file's name.

    Models of one name are numbered in their order, and so are state dicts, which have no names of
    their own. Where the names differ, a model keeps its numbers in whatever place it is given, and
    wherever its parent folder lies.

    >>> model_keys(["a/code", "b/maths/", "b/code"])
    ('code#0', 'maths#0', 'code#1')
    """
    seen: Counter[str] = Counter()
    keys = []
    for origin in origins:
        name = PurePath(origin).name
        keys.append(f"{name}#{seen[name]}")
        seen[name] += 1
    return tuple(keys)


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers for one tensor.

    Args:
        seed: The merge's seed.
        method: Id of the method that draws.
        tensor: Name of the tensor, or of the module.
        models: What tells the models apart, in the order in which the method sees them.
        start: Flat index of the first entry the method sees; not 0 for a piece of a tensor.
    """

    seed: int
    method: str
    tensor: str
    models: Sequence[str]
    start: int = 0

    def at(self, start: int) -> Draws:
        """Return the same draws for the piece that begins at a flat index."""
        return replace(self, start=start)

    def of(self, positions: Sequence[int]) -> Draws:
        """Return the draws of some of the models, for a method that sees no others."""
        return replace(self, models=[self.models[at] for at in positions])

    def by(self, method: str) -> Draws:
        """Return the draws of another method: one that runs inside this one."""
        return replace(self, method=method)

    def uniform(self, model: int, like: Tensor, offset: int = 0) -> Tensor:
        """Return one number per entry of ``like``, uniform in [0, 1).

        They are multiples of 2^-24 from the counter-based generator Philox4x64, whose key is a hash
        of seed, method, tensor and model: the number of an entry is found without making those
        before it.

        Args:
            model: Position of the model among those that the method sees.
            like: Gives shape and device.
            offset: Flat index of its first entry within what the method sees.

        Returns:
            A float32 tensor, whatever the dtype of ``like``, so that masks do not depend on it.

        >>> import torch
        >>> draws = Draws(0, "dare", "w", ["a"])
        >>> whole = draws.uniform(0, torch.empty(5))
        >>> torch.equal(draws.at(3).uniform(0, torch.empty(2)), whole[3:])
        True
        """
        import torch

        words = self._words(model, self.start + offset, like.numel())
        numbers = torch.from_numpy((words >> (32 - _BITS)).astype(np.float32))
        return numbers.mul_(2.0**-_BITS).reshape(like.shape).to(like.device)

    def _words(
        self, model: int, start: int, count: int
    ) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        address = json.dumps([self.seed, self.method, self.tensor, self.models[model]])
        digest = hashlib.blake2b(address.encode(), digest_size=16).digest()
        first = start // _PER_COUNT
        skipped = start - first * _PER_COUNT
        philox = np.random.Philox(key=int.from_bytes(digest, "little"), counter=first)
        raw = philox.random_raw(-(-(skipped + count) // 2))
        words = (raw if sys.byteorder == "little" else raw.byteswap()).view(np.uint32)
        return words[skipped : skipped + count]
