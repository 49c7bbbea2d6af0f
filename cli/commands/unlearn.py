"""``orthomerge unlearn``: make a model forget a set of rows and keep the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from orthomerge_cli.options import Json, Set, with_options
from orthomerge_cli.session import print_json, resumable

if TYPE_CHECKING:
    from orthomerge.recipe.unlearning_schema import UnlearnRecipe
    from orthomerge.unlearning.training import UnlearnRequest, UnlearnResult


def unlearn(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML recipe, e.g. one of recipes/unlearning.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model folder or org/name.")] = None,
    forget: Annotated[
        str | None, typer.Option("--forget", help="What shall be forgotten: a file of rows.")
    ] = None,
    retain: Annotated[str | None, typer.Option("--retain", help="What shall be kept.")] = None,
    holdout: Annotated[
        str | None, typer.Option("--holdout", help="Rows like the forget set's, never seen.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to make.")] = None,
    objective: Annotated[
        str | None, typer.Option("--objective", help="Objective id; default npo.")
    ] = None,
    projection: Annotated[
        str | None, typer.Option("--projection", help="off, gu (default), gu-cheap, …")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="lora (default), oft or full.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Most optimizer steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda[:N].")] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    settings: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, show rows and what it will need.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only try the projection on the model's first batches.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
    json: Json = False,
) -> None:
    """Make a model forget a set of rows and keep the rest.

    Stops when the forget set is predicted no better than rows that were never seen (--holdout),
    and keeps the retain set still: every step is corrected so that it does not raise the retain
    loss, to first order. Writes an adapter, or a model with --adapter full.
    """
    gathered = _gather(
        recipe, settings or [],
        model=model, forget=forget, retain=retain, holdout=holdout, output=output,
        objective=objective, projection=projection, adapter__kind=adapter,
        train__max_steps=steps, train__learning_rate=learning_rate,
        train__batch_size=batch_size, train__device=device, seed=seed,
    )  # fmt: skip
    if gathered.negation is not None:
        from orthomerge_cli.commands.merge import carry_out

        from orthomerge.recipe.negation import negation_merge

        return carry_out(
            negation_merge(gathered), resume=resume, overwrite=overwrite, dry_run=dry_run,
            quiet=quiet, json=json,
        )  # fmt: skip
    from orthomerge.recipe.unlearning import unlearning_request

    request = unlearning_request(gathered)
    if check:
        return _check(request, as_json=json)
    if dry_run:
        return _dry_run(request, overwrite=overwrite, as_json=json)
    result = _run(request, resume=resume, overwrite=overwrite, show=not (quiet or json))
    if json:
        print_json({"output": str(result.output), **result.report})
    elif not quiet:
        from orthomerge_cli.unlearning_text import print_result

        print_result(result)


def _gather(recipe: Path | None, settings: list[str], **options: Any) -> UnlearnRecipe:
    """Combine a recipe file and options; options win, and ``--set`` wins over both."""
    from orthomerge.recipe.unlearning import unlearning_from_data
    from orthomerge.recipe.yaml_positions import Document, load_recipe_file

    if recipe is None and options["model"] is None:
        raise typer.BadParameter("Give a recipe, or --model, --forget, --retain and --output.")
    document = Document({}, "command line")
    if recipe:
        document = load_recipe_file(recipe, keys="key model")
    document.data = with_options(document.data, options)
    return unlearning_from_data(document, settings)


def _dry_run(request: UnlearnRequest, *, overwrite: bool, as_json: bool) -> None:
    from orthomerge_cli.unlearning_text import dry_run_facts, print_dry_run

    from orthomerge.unlearning.training import check_request_output, estimate, prepare_sets

    check_request_output(request, overwrite=overwrite)
    sets = prepare_sets(request)
    found = estimate(request, sets)
    if as_json:
        return print_json(dry_run_facts(request, sets, found))
    print_dry_run(request, sets, found)


def _check(request: UnlearnRequest, *, as_json: bool) -> None:
    from orthomerge_cli.unlearning_text import print_checkup

    from orthomerge.unlearning.training import check_run, prepare_sets

    found = check_run(request, prepare_sets(request))
    if as_json:
        return print_json(found.as_dict())
    print_checkup(found)


def _run(request: UnlearnRequest, *, resume: bool, overwrite: bool, show: bool) -> UnlearnResult:
    from orthomerge_cli.unlearning_text import announce, step_progress

    from orthomerge.unlearning.training import (
        check_request_output,
        prepare_sets,
        run_unlearning,
    )

    check_request_output(request, overwrite=overwrite)
    sets = prepare_sets(request)
    if show:
        announce(request, sets)

    with resumable(), step_progress(request.train.max_steps, show=show) as report:
        return run_unlearning(
            request, resume=resume, overwrite=overwrite, prepared=sets, report=report
        )
