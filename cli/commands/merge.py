"""``orthomerge merge``: the main job."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from orthomerge_cli import options as opt
from orthomerge_cli.session import print_json, resumable

if TYPE_CHECKING:
    from orthomerge.merging.plan import Plan
    from orthomerge.merging.run import MergeResult
    from orthomerge.recipe.schema import MergeRecipe


def merge(
    models: opt.Models = None,
    recipe: opt.Recipe = None,
    base: opt.Base = None,
    method: opt.Method = None,
    weights: opt.Weights = None,
    settings: opt.Set = None,
    output: opt.Output = None,
    dtype: opt.Dtype = None,
    compute_dtype: opt.ComputeDtype = None,
    max_shard_size: opt.ShardSize = None,
    missing: opt.Missing = None,
    form: opt.Form = None,
    rank: opt.Rank = None,
    style: opt.Style = None,
    absent: opt.Absent = None,
    heads: opt.Heads = None,
    assume_same_base: opt.SameBase = None,
    norm_matched: opt.NormMatched = None,
    back_map: opt.BackMap = None,
    memory_budget: opt.Budget = None,
    workers: opt.Workers = None,
    device: opt.Device = None,
    no_provenance: opt.NoProvenance = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, as `plan` does.")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Merge nothing: measure what merging LoRA adapters meets."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
    json: opt.Json = False,
) -> None:
    """Merge models into a folder or file.

    What the inputs are is recognised by their content; without --method the inputs decide: OFT
    adapters are merged in the Lie algebra, LoRA adapters by do-merging into one LoRA adapter,
    anything else with --base by orthogonal-residual decoupling, full checkpoints without one along
    the geodesic between them.
    """
    merged = opt.gather_recipe(
        models, recipe, weights, settings,
        base=base, method=method, missing=missing, norm_matched=norm_matched,
        adapters__absent=absent, adapters__heads=heads, adapters__assume_same_base=assume_same_base,
        output__path=output, output__dtype=dtype, output__max_shard_size=max_shard_size,
        output__back_map=back_map, output__form=form, output__rank=rank,
        output__style=style,
        run__compute_dtype=compute_dtype, run__memory_budget=memory_budget,
        run__workers=workers, run__device=device, no_provenance=no_provenance,
    )  # fmt: skip
    if explain:
        if dry_run or resume or overwrite:
            raise typer.BadParameter("--explain merges nothing: leave out what runs or plans.")
        from orthomerge_cli.explaining import explain as explain_merge

        return explain_merge(_with_output(merged), as_json=json)
    carry_out(
        _with_output(merged), resume=resume, overwrite=overwrite, dry_run=dry_run, quiet=quiet,
        json=json,
    )  # fmt: skip


def carry_out(
    recipe: MergeRecipe,
    *,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    quiet: bool,
    json: bool,
) -> None:
    """Plan a merge, run it unless that was all, and print what became of it."""
    from orthomerge.recipe.run import plan_recipe

    plan = plan_recipe(recipe)
    if dry_run:
        from orthomerge_cli.summaries import print_plan

        return print_plan(plan, as_json=json)
    if not (quiet or json):
        from orthomerge_cli.summaries import announce

        announce(plan)
    result = _run(plan, resume=resume, overwrite=overwrite, show=not (quiet or json))
    if json:
        from orthomerge_cli.summaries import result_facts

        print_json(result_facts(result))
    elif not quiet:
        from orthomerge_cli.summaries import print_result

        print_result(result)


def _with_output(recipe: MergeRecipe) -> MergeRecipe:
    """Choose the output when none is named: ``merged`` beside where the command runs."""
    if recipe.output.path is not None:
        return recipe
    files = all(str(entry.path).endswith(".safetensors") for entry in recipe.models)
    adapters = files and all("adapter_model" in str(entry.path) for entry in recipe.models)
    name = "merged.safetensors" if files and not adapters else "merged"
    return recipe.model_copy(update={"output": recipe.output.model_copy(update={"path": name})})


def _run(plan: Plan, *, resume: bool, overwrite: bool, show: bool) -> MergeResult:
    from orthomerge.merging.planning.planner import check_output

    check_output(plan, overwrite=overwrite)  # before torch is imported: refusals come at once
    from orthomerge.merging.executors.context import Interrupted
    from orthomerge.merging.run import run_plan

    gc.freeze()  # what the imports left is here to stay
    gc.enable()

    with resumable(Interrupted):
        if not show or not sys.stderr.isatty():
            return run_plan(plan, resume=resume, overwrite=overwrite)
        from orthomerge_cli.progress import byte_progress

        with byte_progress(plan.read_bytes, "merging") as advance:
            return run_plan(plan, resume=resume, overwrite=overwrite, advance=advance)
