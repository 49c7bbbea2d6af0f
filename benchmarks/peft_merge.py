"""Merge LoRA adapters with PEFT's ``add_weighted_adapter``, from files to a file.

PEFT needs a model to put adapters into. The one built here has layers of the right shapes whose
weights are a single number seen as a matrix, so that it costs neither memory nor time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llama_lora import SHAPES, LoraShape

__all__ = ["main", "merge"]

_DENSITY = 0.2
_MERGED = "merged"


def merge(inputs: list[Path], output: Path, shape: LoraShape, kind: str, rank: int | None) -> None:
    """Load adapters with weights 1/N each, combine them, save the result durably.

    Args:
        inputs: Adapter folders.
        output: Folder to write.
        shape: Of the model they belong to.
        kind: PEFT's ``combination_type``.
        rank: PEFT's ``svd_rank``.
    """
    from floors import publish
    from peft import PeftModel

    names = [f"adapter_{number}" for number in range(len(inputs))]
    model: Any = PeftModel.from_pretrained(_hollow_model(shape), inputs[0], adapter_name=names[0])
    for name, folder in zip(names[1:], inputs[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    options = {"svd_rank": rank} if kind.endswith("svd") else {}
    if kind not in ("linear", "cat", "svd"):
        options["density"] = _DENSITY
    if kind.endswith("svd"):
        options["svd_full_matrices"] = False  # True would make U of 14336 x 14336
    weights = [1 / len(inputs)] * len(inputs)
    model.add_weighted_adapter(names, weights, _MERGED, combination_type=kind, **options)
    partial = output.with_name(output.name + ".partial")
    model.save_pretrained(partial, selected_adapters=[_MERGED])
    for path in (partial / _MERGED).iterdir():
        path.rename(partial / path.name)
    (partial / _MERGED).rmdir()
    publish(partial, output)


def _hollow_model(shape: LoraShape) -> Any:
    import torch
    from torch import nn

    class Causal(nn.Module):
        """What PEFT looks for in a causal language model."""

        def prepare_inputs_for_generation(self) -> None:
            """Never called."""

    root, number = Causal(), torch.zeros(())
    for name, (rows, columns) in shape.modules().items():
        *path, last = name.split(".")
        parent: nn.Module = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        layer = nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(number.expand(rows, columns), requires_grad=False)
        parent.add_module(last, layer)
    return root


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", help="PEFT's combination_type")
    parser.add_argument("inputs", type=Path, nargs="+", help="adapter folders")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scale", choices=SHAPES, default="full")
    parser.add_argument("--rank", type=int, help="svd_rank")
    options = parser.parse_args()
    merge(options.inputs, options.output, SHAPES[options.scale], options.kind, options.rank)


if __name__ == "__main__":
    main()
