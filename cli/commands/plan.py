"""``orthomerge plan``: what a merge would do, from headers only."""

from __future__ import annotations

from orthomerge_cli import options as opt


def plan(
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
    json: opt.Json = False,
) -> None:
    """Check a merge and say what it would read, write and need, without reading a tensor.

    All problems are reported at once.
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
    from orthomerge_cli.summaries import print_plan

    from orthomerge.recipe.run import plan_recipe

    print_plan(plan_recipe(merged), as_json=json)
