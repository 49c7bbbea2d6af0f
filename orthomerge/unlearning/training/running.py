"""One run of unlearning, from a request to a published folder: whole, or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from orthomerge.checkpoints.destination import check_destination
from orthomerge.checkpoints.json_text import json_text
from orthomerge.checkpoints.reader import file_stats
from orthomerge.checkpoints.staging import Staging
from orthomerge.errors import (
    BudgetError,
    OrthoMergeError,
    OutputError,
    RecipeError,
    ResumeError,
)
from orthomerge.quiet import quiet_libraries
from orthomerge.unlearning.training.callbacks import StepReport
from orthomerge.unlearning.training.checkpointing import latest_point, step_of
from orthomerge.unlearning.training.failing import resources_told
from orthomerge.unlearning.training.keeping import require_changed
from orthomerge.unlearning.training.preparing import (
    PreparedSets,
    prepare_sets,
    require_one_process,
)
from orthomerge.unlearning.training.saving import LOG_NAME, StepLog, write_model
from orthomerge.unlearning.training.sessions import Session
from orthomerge.unlearning.training.settings import UnlearnRequest
from orthomerge.unlearning.training.tables import SetTable, table_of
from orthomerge.version import __version__

__all__ = ["UnlearnResult", "run_unlearning"]


@dataclass(frozen=True)
class UnlearnResult:
    """What a run did.

    Attributes:
        output: The folder that was made.
        table: Losses and probabilities of every set, before and after.
        steps: Optimizer steps taken.
        kept: The step whose model was kept.
        reason: Why it ended.
        warnings: What went otherwise than hoped, in sentences.
        report: Everything that is in the output's ``unlearning.json``.
    """

    output: Path
    table: tuple[SetTable, ...]
    steps: int
    kept: int
    reason: str
    warnings: tuple[str, ...]
    report: Mapping[str, Any]


def run_unlearning(
    request: UnlearnRequest,
    *,
    resume: bool = False,
    overwrite: bool = False,
    prepared: PreparedSets | None = None,
    report: Callable[[StepReport], None] | None = None,
) -> UnlearnResult:
    """Make a model forget, and write what that made of it.

    Args:
        request: What to do.
        resume: Continue an interrupted run from its last saved step.
        overwrite: Replace an existing output.
        prepared: The sets, if they are read already.
        report: Is told of every step.

    Raises:
        OrthoMergeError: Something is wrong with the request, the sets or the model; a loss is not
            finite; nothing changed; the disk is full. Nothing of the output stays then, except
            what ``resume`` continues from.
    """
    require_one_process()
    check_request_output(request, overwrite=overwrite)
    sets = prepared or prepare_sets(request)
    identity = blake3(json_text(dict(request.record), indent=None).encode()).hexdigest()
    inputs = {"sets": sets.fingerprints(), "models": _models(request)}
    staging = Staging(request.output, identity, inputs, resume=resume, overwrite=overwrite)
    try:
        with resources_told(request.output), quiet_libraries():
            return _run(request, sets, staging, report or (lambda _: None))
    except (BudgetError, OutputError, ResumeError):
        raise  # what is there can be continued, or is not ours to remove
    except OrthoMergeError:
        staging.discard()  # the request has to change, so there is nothing to resume
        raise
    finally:
        staging.close()


def check_request_output(request: UnlearnRequest, *, overwrite: bool) -> None:
    """Refuse an output that exists or would touch an input."""
    given = (request.model, request.forget, request.retain, request.holdout, request.stop.gold)
    inputs = [Path(path.partition("#")[0]) for path in given if path]
    check_destination(
        request.output,
        [path for path in inputs if path.exists()],
        single_file=False,
        overwrite=overwrite,
    )


def _models(request: UnlearnRequest) -> list[list[list[object]]]:
    """Return name, size and time of every file of the models, as far as they are folders here."""
    folders = [Path(model) for model in (request.model, request.stop.gold) if model]
    kinds = (".json", ".safetensors", ".bin")
    return [
        file_stats(sorted(path for path in folder.iterdir() if path.suffix in kinds))
        for folder in folders
        if folder.is_dir()
    ]


def _run(
    request: UnlearnRequest,
    sets: PreparedSets,
    staging: Staging,
    report: Callable[[StepReport], None],
) -> UnlearnResult:
    staging.work.mkdir(exist_ok=True)
    point = latest_point(staging.work)
    session = Session(request, sets)
    before = session.measure_all()
    level = session.level(before)
    _require_memorised(before, level, request)
    log = StepLog(staging.work / LOG_NAME, after=0 if point is None else step_of(point))
    callback = session.callback(before, level, functools.partial(_told, log, report))
    trainer = session.trainer(staging.work, callback)
    if point is not None:
        trainer.resume_own_state(point)
    trainer.train(resume_from_checkpoint=None if point is None else str(point))
    session.require_projected(trainer)
    if callback.best is None:
        raise RecipeError(
            "no step could be kept: "
            + (callback.rule.warnings[-1] if callback.rule.warnings else "none was measured"),
            remedy="Lower train.learning_rate, or raise stop.max_retain_rise or stop.tolerance.",
        )
    callback.best.restore(session.model)
    require_changed(session.model, session.start)
    after = session.measure_all()
    table = table_of(before, after)
    reason = callback.reason or f"all {trainer.state.global_step} steps were taken"
    warnings = (*session.notes, *callback.rule.warnings)
    content = {
        "steps": trainer.state.global_step,
        "kept_step": callback.best.step,
        "reason": reason,
        "level": None if level is None else {"loss": level.loss, "deviation": level.deviation,
                                             "source": level.source},
        "table": [row.as_dict() for row in table],
        "notes": list(sets.notes),
        "warnings": list(warnings),
    }  # fmt: skip
    names = write_model(
        staging.files,
        session.finished_model(),
        sets.tokenizer,
        provenance=_provenance(request, sets),
        report=content,
        log=log.text(),
        name_or_path=request.model,
    )
    staging.publish(names)
    steps, kept = trainer.state.global_step, callback.best.step
    return UnlearnResult(request.output, table, steps, kept, reason, warnings, content)


def _told(log: StepLog, report: Callable[[StepReport], None], step: StepReport) -> None:
    log.append(step.as_dict())
    report(step)


def _require_memorised(before: Mapping[str, Any], level: Any, request: UnlearnRequest) -> None:
    forget = before["forget"].loss
    if level is None or forget < level.loss:
        return
    raise RecipeError(
        f"there is nothing to forget: the model's loss on the forget set is already at the "
        f"{level.source} level",
        file=request.forget,
        expected=f"below {level.loss:.3f}",
        found=f"{forget:.3f}",
        remedy="Check the forget set and the holdout, or set stop.level=none to go on anyway.",
    )


def _provenance(request: UnlearnRequest, sets: PreparedSets) -> dict[str, Any]:
    return {
        "orthomerge": __version__,
        "command": "unlearn",
        "recipe": dict(request.record),
        "sets": sets.fingerprints(),
    }
