"""Show what a model is trained on: the tokens of a row and which of them are scored.

Data only; how it looks on a terminal is the command line's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from orthomerge.unlearning.data.encoding import IGNORED, Encoded
from orthomerge.unlearning.data.tokenised import TokenisedSet

__all__ = ["PreviewRow", "preview"]


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One example as the model sees it.

    Args:
        where: ``"file:line"`` of its row.
        kind: What the row is.
        tokens: Every token and whether it is scored.
        runs: Neighbouring tokens of one kind as readable text, and whether they are scored.
        is_truncated: Whether its end was cut off.
    """

    where: str
    kind: str
    tokens: tuple[tuple[str, bool], ...]
    runs: tuple[tuple[str, bool], ...]
    is_truncated: bool

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return sum(scored for _, scored in self.tokens)


def preview(set_: TokenisedSet, tokenizer: Any, count: int = 3) -> list[PreviewRow]:
    """Return the first examples of a set, token by token.

    Args:
        set_: A tokenised set.
        tokenizer: The tokenizer it was made with.
        count: How many; fewer if the set is smaller.
    """
    cut = {truncation.index for truncation in set_.truncated}
    return [
        PreviewRow(
            row.where,
            row.kind,
            tokens=tuple(
                (str(token), label != IGNORED)
                for token, label in zip(
                    tokenizer.convert_ids_to_tokens(example.ids), example.labels, strict=True
                )
            ),
            runs=_runs(example, tokenizer),
            is_truncated=index in cut,
        )
        for index, (row, example) in enumerate(
            zip(set_.rows[:count], set_.examples[:count], strict=True)
        )
    ]


def _runs(example: Encoded, tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    # Several tokens at once: one alone may be half a character.
    pairs = zip(example.ids, example.labels, strict=True)
    return tuple(
        (tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False), scored)
        for scored, run in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    )
