"""From files to checked, tokenised sets: all that can be known before the model is loaded."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orthomerge.errors import MissingExtraError, OrthoMergeError, RecipeError, combined
from orthomerge.unlearning.data import (
    TokenisedSet,
    check_sets,
    fingerprint,
    load_rows,
    tokenise,
)
from orthomerge.unlearning.objectives import Need
from orthomerge.unlearning.training.loading import (
    check_model_folder,
    load_tokenizer,
    pad_token_of,
)
from orthomerge.unlearning.training.settings import UnlearnRequest

__all__ = ["PreparedSets", "prepare_sets", "require_libraries"]

_FEWEST_CHECKED = 4  # retain rows below which none is kept from training


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


def prepare_sets(request: UnlearnRequest) -> PreparedSets:
    """Read, check and tokenise the sets of a run.

    Raises:
        OrthoMergeError: With everything that is wrong, found together.
    """
    require_libraries()
    problems: list[OrthoMergeError] = []
    rows = _rows(request, problems)
    wrong = check_model_folder(request.model)
    problems += [wrong] if wrong else []
    if problems:
        raise combined(problems)
    report = check_sets(rows["forget"], rows.get("retain"), rows.get("holdout"))
    if report.problems:
        raise combined(report.problems)
    tokenizer = load_tokenizer(request.model)
    sets = _tokenised(request, rows, tokenizer, problems)
    if problems:
        raise combined(problems)
    return _arranged(request, sets, tokenizer, tuple(report.notes))


def _rows(request: UnlearnRequest, problems: list[OrthoMergeError]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("forget", "retain", "holdout"):
        path = getattr(request, name)
        if path is None:
            continue
        try:
            found[name] = load_rows(path, keys=request.data.keys or None)
        except OrthoMergeError as error:
            problems.append(error)
    if request.retain is None and request.objective.needs_retain:
        problems.append(
            RecipeError(
                "the objective weighs a retain loss, and there is no retain set",
                remedy="Give --retain, or set retain_weight=0 to go without one.",
            )
        )
    if request.retain is None and request.projection is not None:
        problems.append(
            RecipeError(
                "the projection protects a retain set, and there is none",
                remedy="Give --retain, or set projection=off.",
            )
        )
    return found


def _tokenised(
    request: UnlearnRequest,
    rows: Mapping[str, Any],
    tokenizer: Any,
    problems: list[OrthoMergeError],
) -> dict[str, TokenisedSet]:
    options: dict[str, Any] = {
        "max_length": request.data.max_length,
        "template": request.data.template,
    }
    todo = dict(rows)
    if Need.ALTERNATES in request.objective.needs:
        from orthomerge.unlearning.data import with_alternates

        todo["alternate"] = with_alternates(rows["forget"], seed=request.train.seed)
    sets = {}
    for name, found in todo.items():
        try:
            sets[name] = tokenise(found, tokenizer, name=name, **options)
        except OrthoMergeError as error:
            problems.append(error)
    return sets


def _arranged(
    request: UnlearnRequest,
    sets: Mapping[str, TokenisedSet],
    tokenizer: Any,
    notes: tuple[str, ...],
) -> PreparedSets:
    more = [
        f"{found.truncated} of {len(found)} rows of the {name} set are cut to "
        f"{request.data.max_length} tokens"
        for name, found in sets.items()
        if found.truncated
    ]
    retain, check = sets.get("retain"), None
    if retain is not None:
        retain, check = _split(retain, request)
        if check is retain:
            more.append("there are too few retain rows to keep some from training: drift is "
                        "measured on the rows that are trained on")  # fmt: skip
    return PreparedSets(
        tokenizer=tokenizer,
        pad_token_id=pad_token_of(tokenizer),
        forget=sets["forget"],
        retain=retain,
        check=check,
        holdout=sets.get("holdout"),
        alternate=sets.get("alternate"),
        notes=(*notes, *more),
    )


def _split(retain: TokenisedSet, request: UnlearnRequest) -> tuple[TokenisedSet, TokenisedSet]:
    """Keep a seeded share of the retain rows from training."""
    count = min(int(len(retain) * request.data.retain_check), request.stop.rows)
    if count < _FEWEST_CHECKED:
        return retain, retain
    order = random.Random(request.train.seed).sample(range(len(retain)), len(retain))
    return retain.subset(sorted(order[count:])), retain.subset(sorted(order[:count]))
