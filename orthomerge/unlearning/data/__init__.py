"""Forget, retain and holdout sets: from files to checked, masked, paired and padded batches.

Names are loaded on first use. Reading rows imports neither torch nor transformers nor pyarrow nor
datasets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orthomerge.unlearning.data.checking import SetNote, check_sets, normalised, set_notes
    from orthomerge.unlearning.data.collation import collate, collate_rows, padding_id
    from orthomerge.unlearning.data.digests import fingerprint
    from orthomerge.unlearning.data.encoding import IGNORED
    from orthomerge.unlearning.data.loading import load_rows
    from orthomerge.unlearning.data.pairing import PairedRows
    from orthomerge.unlearning.data.previewing import PreviewRow, preview
    from orthomerge.unlearning.data.refusals import REFUSALS, alternate_rows
    from orthomerge.unlearning.data.rows import Message, Row
    from orthomerge.unlearning.data.tokenised import TokenisedSet, Truncation, tokenise

__all__ = [
    "IGNORED",
    "REFUSALS",
    "Message",
    "PairedRows",
    "PreviewRow",
    "Row",
    "SetNote",
    "TokenisedSet",
    "Truncation",
    "alternate_rows",
    "check_sets",
    "collate",
    "collate_rows",
    "fingerprint",
    "load_rows",
    "normalised",
    "padding_id",
    "preview",
    "set_notes",
    "tokenise",
]

_HOMES = {
    "checking": ("SetNote", "check_sets", "normalised", "set_notes"),
    "collation": ("collate", "collate_rows", "padding_id"),
    "digests": ("fingerprint",),
    "encoding": ("IGNORED",),
    "loading": ("load_rows",),
    "pairing": ("PairedRows",),
    "previewing": ("PreviewRow", "preview"),
    "refusals": ("REFUSALS", "alternate_rows"),
    "rows": ("Message", "Row"),
    "tokenised": ("TokenisedSet", "Truncation", "tokenise"),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
