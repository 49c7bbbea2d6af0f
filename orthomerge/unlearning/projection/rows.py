"""Storage of protected gradients: one row per gradient, with their Gram matrices kept up to date.

What the rows mean (the window's, the bank's, the history's) is decided by who takes the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from orthomerge.linalg.precision import full_precision
from orthomerge.unlearning.projection.products import combine, products, squared_norm, summed
from orthomerge.unlearning.projection.scopes import local

__all__ = ["Rows"]

Vector = Callable[[int], torch.Tensor]
Scales = Sequence[torch.Tensor] | None


class Rows:
    """Rows over a list of parameters, as one block [slots, n_t] per parameter.

    The rows of all parameters of a device share one buffer [slots, N], so that a row is added,
    cleared and averaged at once. Products between rows that did not change are remembered.

    Args:
        parameters: The parameters; their local parts define the lengths.
        dtype: Stored dtype of the rows.
        device: ``"param"`` to keep rows beside the parameters, or a device such as ``"cpu"``, from
            where a block is brought to its parameter's device when it is used.
        group: Processes that hold the other shards of the same parameters, or None.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        dtype: torch.dtype = torch.float32,
        device: str = "param",
        group: Any | None = None,
    ) -> None:
        own = [local(parameter) for parameter in parameters]
        self._homes = [tensor.device for tensor in own]
        self._sizes = [tensor.numel() for tensor in own]
        self._places = [h if device == "param" else torch.device(device) for h in self._homes]
        self._dtype, self._group = dtype, group
        self.capacity = 0
        self._free: list[int] = []
        self._flats: dict[torch.device, torch.Tensor] = {}
        self._blocks: list[torch.Tensor] = []
        self._gram = torch.zeros(len(own), 0, 0, dtype=torch.float64)
        self._stale: set[int] = set()
        self.reserve(1)

    @property
    def bytes(self) -> int:
        """Memory of all slots on this process."""
        return sum(flat.numel() * flat.element_size() for flat in self._flats.values())

    def reserve(self, slots: int) -> None:
        """Make room for so many slots in all; more slots than before are empty."""
        if slots <= self.capacity:
            return
        totals: dict[torch.device, int] = {}
        for place, size in zip(self._places, self._sizes, strict=True):
            totals[place] = totals.get(place, 0) + size
        for place, total in totals.items():
            pinned = place.type == "cpu" and any(home.type == "cuda" for home in self._homes)
            flat = torch.zeros(slots, total, dtype=self._dtype, device=place, pin_memory=pinned)
            if place in self._flats:
                flat[: self.capacity] = self._flats[place]
            self._flats[place] = flat
        gram = self._gram.new_zeros(len(self._sizes), slots, slots)
        gram[:, : self.capacity, : self.capacity] = self._gram
        self._gram = gram
        self._free += range(self.capacity, slots)
        self.capacity = slots
        self._blocks = self._cut()

    def _cut(self) -> list[torch.Tensor]:
        """Return every parameter's block as a view of its device's buffer."""
        starts: dict[torch.device, int] = {}
        blocks = []
        for place, size in zip(self._places, self._sizes, strict=True):
            start = starts.get(place, 0)
            blocks.append(self._flats[place][:, start : start + size])
            starts[place] = start + size
        return blocks

    def take(self) -> int:
        """Return an empty slot, making one if there is none."""
        if not self._free:
            self.reserve(self.capacity + 1)
        return self._free.pop(0)

    def give_back(self, slot: int) -> None:
        """Clear a slot and let it be taken again."""
        self.clear(slot)
        self._free = sorted({*self._free, slot})

    def clear(self, slot: int) -> None:
        """Set a row to zero."""
        for flat in self._flats.values():
            flat[slot].zero_()
        self._gram[:, slot] = self._gram[:, :, slot] = 0.0
        self._stale.discard(slot)

    def views(self, slot: int) -> list[torch.Tensor]:
        """Return one row as flat views, one per parameter, for reading."""
        return [block[slot] for block in self._blocks]

    def flats(self, slot: int) -> list[torch.Tensor]:
        """Return one row as one flat view per device, for reading."""
        return [flat[slot] for flat in self._flats.values()]

    def touched(self, slot: int) -> None:
        """Say that a row was written through its views."""
        self._stale.add(slot)

    def add(self, slot: int, gradients: Sequence[torch.Tensor | None], weight: float = 1.0) -> None:
        """Add ``weight`` times a gradient to a row; None counts as zero."""
        pairs: dict[Any, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for view, gradient in zip(self.views(slot), gradients, strict=True):
            if gradient is None or view.numel() == 0:
                continue
            flat = local(gradient).reshape(-1).to(view.device, view.dtype)
            targets, sources = pairs.setdefault(view.device, ([], []))
            targets.append(view)
            sources.append(flat)
        for targets, sources in pairs.values():
            torch._foreach_add_(targets, sources, alpha=weight)
        self._stale.add(slot)

    def scale(self, slot: int, factor: float) -> None:
        """Multiply a row by a number."""
        for flat in self.flats(slot):
            flat.mul_(factor)
        self._stale.add(slot)

    def block(self, index: int) -> torch.Tensor:
        """Return a parameter's rows [slots, n] on the parameter's device."""
        return self._blocks[index].to(self._homes[index], non_blocking=True)

    def combination(self, index: int, coefficients: torch.Tensor, P: Scales = None) -> torch.Tensor:
        """Return ``P G lam`` for one parameter, flat; coefficients [slots]."""
        return combine(self.block(index), coefficients, None if P is None else P[index])

    def gram(self, P: Scales = None) -> torch.Tensor:
        """Return every parameter's Gram matrix, [tensors, slots, slots], in float64 on the CPU.

        Without P, only rows that changed since the last time are multiplied again.
        """
        if P is not None:
            return self._products(None, P, range(self.capacity))[0]
        if self._stale:
            self._remember(self._products(None, None, sorted(self._stale))[0])
        return self._gram.clone()

    def measure(
        self, vector: Vector, P: Scales = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return products of every parameter's rows with each other and with a vector.

        Args:
            vector: Gives the flat vector [n] of a parameter, by its place.
            P: Flat positive scales [n] per parameter.

        Returns:
            K [tensors, slots, slots], b [tensors, slots] and squared norms of the vector
            [tensors], over all shards, in float64 on the CPU.
        """
        if P is not None:
            return self._products(vector, P, range(self.capacity))
        fresh, b, norms = self._products(vector, None, sorted(self._stale))
        self._remember(fresh)
        return self._gram.clone(), b, norms

    def against(
        self, vector: Vector, P: Scales = None, only: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return products of the rows with a vector, and its squared norms, as in ``measure``.

        Args:
            vector: See ``measure``; it is asked for once per parameter, in order.
            P: See ``measure``.
            only: Places of the parameters to look at; the others get zeros.
        """
        _, b, norms = self._products(vector, P, (), only)
        return b, norms

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """Add float64 numbers of every shard; returns them on the CPU."""
        return summed([numbers.to(self._homes[0])], self._group)[0].cpu()

    def _remember(self, fresh: torch.Tensor) -> None:
        for position, slot in enumerate(sorted(self._stale)):
            self._gram[:, slot] = self._gram[:, :, slot] = fresh[:, :, position]
        self._stale.clear()

    @full_precision()
    def _products(
        self,
        vector: Vector | None,
        P: Scales,
        slots: Sequence[int],
        only: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return products of all rows with some of them and with a vector, added over shards."""
        home = self._homes[0]
        table = torch.zeros(
            len(self._sizes), self.capacity, len(slots) + 1, dtype=torch.float64, device=home
        )
        squares = torch.zeros(len(self._sizes), dtype=torch.float64, device=home)
        for index in range(len(self._sizes)) if only is None else only:
            X, scale = self.block(index), None if P is None else P[index]
            parts = [X] if len(slots) == self.capacity else [X[slot : slot + 1] for slot in slots]
            if vector is not None:
                v = vector(index)[None]
                parts.append(v)
                squares[index] = squared_norm(v[0], scale)
            if parts:
                found = products(X, parts, scale)
                table[index, :, : found.shape[1]] = found
        table, squares = (part.cpu() for part in summed([table, squares], self._group))
        return table[..., :-1], table[..., -1], squares

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the rows and of what is known of their products."""
        return {
            "rows": [flat.detach().cpu().clone() for flat in self._flats.values()],
            "gram": self._gram.clone(),
            "stale": sorted(self._stale),
            "free": list(self._free),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over rows saved by ``state_dict`` for the same parameters."""
        self.reserve(state["gram"].shape[-1])
        for flat, saved in zip(self._flats.values(), state["rows"], strict=True):
            flat[: len(saved)] = saved.to(flat.device)
            flat[len(saved) :].zero_()
        slots = state["gram"].shape[-1]
        self._gram.zero_()
        self._gram[:, :slots, :slots] = state["gram"]
        self._stale = set(state["stale"])
        self._free = [*state["free"], *range(slots, self.capacity)]
