"""From files to checked, tokenised sets: all that can be known before the model is loaded."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orthomerge.errors import DataError, MissingExtraError, OrthoMergeError, RecipeError, combined
from orthomerge.unlearning.data import (
    Row,
    TokenisedSet,
    alternate_rows,
    check_sets,
    fingerprint,
    load_rows,
    padding_id,
    set_notes,
    tokenise,
)
from orthomerge.unlearning.objectives import Need
from orthomerge.unlearning.training.loading import check_model_folder, load_tokenizer
from orthomerge.unlearning.training.settings import UnlearnRequest

__all__ = ["PreparedSets", "prepare_sets", "require_libraries", "require_one_process"]

_FEWEST_CHECKED = 4  # retain rows below which none is kept from training
_TOO_FEW = (
    "no retain rows are kept from training (too few, or retain_check is 0): drift is measured on "
    "the rows that are trained on"
)


@dataclass(frozen=True)
class PreparedSets:
    """Everything a run reads, tokenised.

    Attributes:
        tokenizer: The model's.
        pad_token_id: What shorter rows are filled up with.
        forget: The forget set.
        retain: Retain rows that are trained on, or None.
        check: Retain rows that are only measured; the trained ones where there are too few.
        holdout: The holdout, or None.
        alternate: A refusal for every forget row, where the objective needs them.
        notes: What the user should know, in sentences.
    """

    tokenizer: Any
    pad_token_id: int
    forget: TokenisedSet
    retain: TokenisedSet | None
    check: TokenisedSet | None
    holdout: TokenisedSet | None
    alternate: TokenisedSet | None
    notes: tuple[str, ...]

    def fingerprints(self) -> dict[str, str]:
        """Return the digest of every set's content."""
        sets = {"forget": self.forget, "retain": self.retain, "check": self.check}
        sets |= {"holdout": self.holdout, "alternate": self.alternate}
        return {name: fingerprint(found) for name, found in sets.items() if found is not None}


def require_libraries() -> None:
    """Refuse to go on where transformers, peft or accelerate are not installed."""
    from importlib.util import find_spec

    for package in ("transformers", "peft", "accelerate"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "unlearn", "unlearning")


def require_one_process() -> None:
    """Refuse to run under a launcher of several processes, which would all write one output.

    Raises:
        RecipeError: There are several.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count not in ("", "0", "1"):
        raise RecipeError(
            "a run of unlearning runs in one process",
            found=f"WORLD_SIZE={count}",
            remedy="Start it without a launcher; with UnlearnTrainer, a script of your own may "
            "run in several.",
        )


def prepare_sets(request: UnlearnRequest) -> PreparedSets:
    """Read, check and tokenise the sets of a run.

    Raises:
        OrthoMergeError: With everything that is wrong, found together.
    """
    require_libraries()
    require_one_process()
    problems = _missing_sets(request)
    rows: dict[str, list[Row]] = {}
    for name in ("forget", "retain", "holdout"):
        path = getattr(request, name)
        try:
            if path is not None:
                rows[name] = load_rows(path, keys=request.data.keys or None)
        except OrthoMergeError as error:
            problems.append(error)
    wrong = check_model_folder(request.model)
    problems += [wrong] if wrong else []
    if not problems:
        problems = check_sets(rows["forget"], rows.get("retain"), rows.get("holdout"))
        problems += [_weighted(name, found) for name, found in rows.items() if _weighs(found)]
    if problems:
        raise combined(problems)
    notes = set_notes(rows["forget"], rows.get("retain"), rows.get("holdout"))
    return _tokenised(request, rows, [note.text for note in notes])


def _weighs(rows: list[Row]) -> bool:
    return any(row.weight != 1 for row in rows)


def _weighted(name: str, rows: list[Row]) -> OrthoMergeError:
    first = next(row for row in rows if row.weight != 1)
    return DataError(
        f"rows of the {name} set have weights, which no objective takes into account yet",
        file=first.where,
        found=f"weight {first.weight:g}",
        remedy="Leave the column out, or repeat the rows that shall count more.",
    )


def _missing_sets(request: UnlearnRequest) -> list[OrthoMergeError]:
    if request.retain is not None:
        return []
    problems: list[OrthoMergeError] = []
    if request.objective.needs_retain:
        problems.append(
            RecipeError(
                "the objective weighs a retain loss, and there is no retain set",
                remedy="Give --retain, or --set retain_weight=0 to go without one.",
            )
        )
    if request.projection is not None:
        problems.append(
            RecipeError(
                "the projection protects a retain set, and there is none",
                remedy="Give --retain, or --projection off.",
            )
        )
    return problems


def _tokenised(
    request: UnlearnRequest, rows: dict[str, list[Row]], notes: list[str]
) -> PreparedSets:
    tokenizer = load_tokenizer(request.model)
    todo: dict[str, Sequence[Row]] = dict(rows)
    if "retain" in todo:
        todo["retain"], todo["check"] = _split(rows["retain"], request)
    if Need.ALTERNATES in request.objective.needs:
        todo["alternate"] = alternate_rows(rows["forget"], seed=request.train.seed)
    sets: dict[str, TokenisedSet] = {}
    problems: list[OrthoMergeError] = []
    for name, found in todo.items():
        if not found:
            continue
        # An alternate stands for its whole row, which therefore must stay one example.
        long_text: Any = "cut" if "alternate" in todo else "split"
        try:
            sets[name] = tokenise(
                found, tokenizer, max_length=request.data.max_length,
                template=request.data.template, name=name, long_text=long_text,
            )  # fmt: skip
        except OrthoMergeError as error:
            problems.append(error)
    if problems:
        raise combined(problems)
    notes += [_cut(found, request) for found in sets.values() if found.truncated]
    if "retain" in sets and "check" not in sets:
        notes.append(_TOO_FEW)
    return PreparedSets(
        tokenizer=tokenizer,
        pad_token_id=padding_id(tokenizer),
        forget=sets["forget"],
        retain=sets.get("retain"),
        check=sets.get("check", sets.get("retain")),
        holdout=sets.get("holdout"),
        alternate=sets.get("alternate"),
        notes=tuple(notes),
    )


def _cut(found: TokenisedSet, request: UnlearnRequest) -> str:
    count = len(found.truncated)
    return (
        f"{count} row{'s' if count > 1 else ''} of the {found.name} set "
        f"{'are' if count > 1 else 'is'} cut to {request.data.max_length} tokens"
    )


def _split(retain: list[Row], request: UnlearnRequest) -> tuple[list[Row], list[Row]]:
    """Keep a seeded share of the retain rows from training; none where there are too few."""
    count = min(int(len(retain) * request.data.retain_check), request.stop.rows)
    if count < _FEWEST_CHECKED:
        return retain, []
    order = random.Random(f"check:{request.train.seed}").sample(range(len(retain)), len(retain))
    checked = set(order[:count])
    kept = [row for place, row in enumerate(retain) if place not in checked]
    return kept, [retain[place] for place in sorted(checked)]
