"""Bring examples into rectangular batches: plain dicts of tensors, padded on the right.

The callables hold numbers only, so that worker processes can be given them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orthomerge.errors import DataError, RecipeError
from orthomerge.unlearning.data.encoding import IGNORED

if TYPE_CHECKING:
    import torch

__all__ = ["PairCollator", "RowCollator", "collate", "collate_rows", "padding_id"]

_Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RowCollator:
    """Turn items of one set into one batch; made by ``collate_rows``."""

    pad_token_id: int

    def __call__(self, items: Sequence[_Item]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask``, ``labels`` [B, T] and ``row`` [B].

        Items that carry a weight give ``weight`` [B] too, in float32.
        """
        import torch

        length = max(len(item["input_ids"]) for item in items)

        def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])

        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded([item["labels"] for item in items], IGNORED),
            "row": torch.tensor([item["row"] for item in items]),
        }
        if any("weight" in item for item in items):
            weights = [item["weight"] for item in items]
            batch["weight"] = torch.tensor(weights, dtype=torch.float32)
        return batch


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Turn items of ``PairedRows`` into one unlearning batch; made by ``collate``."""

    rows: RowCollator

    def __call__(self, items: Sequence[_Item]) -> dict[str, dict[str, torch.Tensor]]:
        """Return batches by the name of their set.

        ``"forget"`` has B rows, ``"retain"`` B times the retain rows per forget row, in order, and
        ``"alternate"`` B; the last two only where the items have them.
        """
        batch = {"forget": self.rows([item["forget"] for item in items])}
        if "retain" in items[0]:
            batch["retain"] = self.rows([row for item in items for row in item["retain"]])
        if "alternate" in items[0]:
            batch["alternate"] = self.rows([item["alternate"] for item in items])
        return batch


def collate_rows(pad_token_id: int) -> RowCollator:
    """Return the collation of one set.

    Args:
        pad_token_id: What fills short rows; masked everywhere, so any valid id will do.

    Raises:
        RecipeError: It is no token id.

    >>> items = [{"input_ids": [5], "labels": [5], "row": 0}]
    >>> collate_rows(0)(items)["labels"]
    tensor([[5]])
    """
    if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int) or pad_token_id < 0:
        raise RecipeError(
            "the padding token is no token id",
            found=pad_token_id,
            remedy="Use padding_id(tokenizer): any id will do, since padding is masked.",
        )
    return RowCollator(pad_token_id)


def collate(pad_token_id: int) -> PairCollator:
    """Return the collation of ``PairedRows``.

    Args:
        pad_token_id: What fills short rows; masked everywhere, so any valid id will do.

    Raises:
        RecipeError: It is no token id.
    """
    return PairCollator(collate_rows(pad_token_id))


def padding_id(tokenizer: Any) -> int:
    """Return an id to pad with: the padding token, else EOS, else BOS or the unknown token.

    Raises:
        DataError: The tokenizer has none of them.
    """
    for name in ("pad", "eos", "bos", "unk"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None:
            return int(token)
    raise DataError("the tokenizer has no special token to pad with", remedy="Give it one.")
