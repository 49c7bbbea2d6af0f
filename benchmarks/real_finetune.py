"""Is a real fine-tune a rotation? Decouple and merge one that a package ships.

CHGNet's wheel holds two independent trainings (0.2.0 and 0.3.0) and a transfer learning of the
second to another functional (r2scan): one real fine-tune, and one pair that is none as a control.
The weights are small (0.4 M parameters) and come without data, so this measures weights, not
accuracy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from circumstances import RESULTS, machine, run_command, versions, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor

import orthomerge
from orthomerge.linalg import procrustes_right, residual_noise_baseline
from orthomerge.merging.roles import tensor_role

__all__ = ["main"]

_WHEEL = "chgnet==0.4.2"
_FILES = {
    "0.3.0": "chgnet_0.3.0_e29f68s314m37.pth.tar",
    "r2scan": "chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar",
    "0.2.0": "chgnet_0.2.0_e30f77s348m32.pth.tar",
}
_PAIRS = {
    "fine-tune": ("0.3.0", "r2scan", "0.3.0 -> r2scan, a real transfer learning"),
    "control": ("0.3.0", "0.2.0", "0.3.0 -> 0.2.0, independent trainings"),
}
_ANCHORS = (1e-6, 1e-3)

Weights = dict[str, Tensor]


def load(cache: Path) -> dict[str, Weights]:
    """Return the three checkpoints' float tensors; fetches the wheel when it is not there."""
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob("chgnet-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache), _WHEEL]
        subprocess.run(pip, check=True)
    found: dict[str, Weights] = {}
    with zipfile.ZipFile(next(cache.glob("chgnet-*.whl"))) as wheel:
        members = {Path(name).name: name for name in wheel.namelist()}
        for label, file in _FILES.items():
            with wheel.open(members[file]) as stream:
                saved = torch.load(stream, map_location="cpu", weights_only=True)
            state = saved["model"]["state_dict"]
            found[label] = {k: v for k, v in state.items() if v.is_floating_point()}
    return found


def layer_table(base: Weights, tuned: Weights, anchor: float) -> list[dict[str, Any]]:
    """Return, per weight matrix, how much of the update a rotation of the inputs explains."""
    rows = []
    for name, W0 in base.items():
        if W0.ndim != 2 or min(W0.shape) < 2 or tensor_role(name, W0.shape) == "other":
            continue
        if name not in tuned or tuned[name].shape != W0.shape or torch.equal(tuned[name], W0):
            continue
        D = (tuned[name] - W0).double()
        fit = procrustes_right(W0.double(), tuned[name].double(), anchor=anchor)
        change = float(D.norm())
        share = fit.residual / change
        noise = residual_noise_baseline(*W0.shape)
        rows.append(
            {
                "layer": name,
                "shape": list(W0.shape),
                "size": change,
                "change": change / float(W0.double().norm()),
                "residual_fraction": share,
                "noise_level": noise,
                "residual_over_noise": share / noise,
            }
        )
    return rows


def merge_facts(base: Weights, models: list[Weights], **settings: Any) -> dict[str, Any]:
    """Merge the decoupled way; return what was rotated and how far the result is from others."""
    result = orthomerge.merge(models, base=base, method="orthomerge-decoupled", **settings)
    plain = orthomerge.merge(models, base=base, method="tsv-m")
    facts = [f["models"] for f in result.facts.values() if f.get("models")]
    equal = sum(torch.equal(result.tensors[n], plain.tensors[n]) for n in result.tensors)
    return {
        "settings": settings,
        "layers": len(facts),
        "rotated_layers": sum(any(m["rotated"] for m in models) for models in facts),
        "tensors_equal_to_tsv_m": equal,
        "tensors": len(result.tensors),
        "distance_from_tsv_m": distance(result.tensors, plain.tensors, base),
    }


def distance(first: Weights, second: Weights, base: Weights) -> float:
    """Return the distance of two merges relative to the second's distance from the base."""
    apart = sum(float((first[n] - second[n]).double().norm()) ** 2 for n in base)
    moved = sum(float((second[n] - base[n]).double().norm()) ** 2 for n in base)
    return (apart / moved) ** 0.5


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the whole model's figures: the shares are of the sum of all squared changes."""

    def share(left: str) -> float:
        total = sum(r["size"] ** 2 for r in rows)
        return 1 - sum((r[left] * r["size"]) ** 2 for r in rows) / total

    return {
        "layers": len(rows),
        "smallest_residual_over_noise": min(r["residual_over_noise"] for r in rows),
        "median_residual_over_noise": sorted(r["residual_over_noise"] for r in rows)[
            len(rows) // 2
        ],
        "layers_below_0.9_of_noise": sum(r["residual_over_noise"] < 0.9 for r in rows),
        "rotational_share": share("residual_fraction"),
        "noise_share": share("noise_level"),
    }


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache/chgnet"), help="for the wheel")
    parser.add_argument("--results", type=Path, default=RESULTS / "real_finetune.json")
    options = parser.parse_args()
    checkpoints = load(options.cache)
    pairs: dict[str, Any] = {}
    for label, (base, tuned, meaning) in _PAIRS.items():
        tables = {a: layer_table(checkpoints[base], checkpoints[tuned], a) for a in _ANCHORS}
        pairs[label] = {
            "meaning": meaning,
            "summary": {f"anchor {a:g}": summary(rows) for a, rows in tables.items()},
            "layers": tables[_ANCHORS[-1]],
        }
    half = merged_variant(checkpoints["0.3.0"], checkpoints["r2scan"])
    experts = [checkpoints["r2scan"], half]
    merges = [
        merge_facts(checkpoints["0.3.0"], experts),
        merge_facts(checkpoints["0.3.0"], experts, gate="off"),
        merge_facts(checkpoints["0.3.0"], experts, gate="off", mode="faithful"),
    ]
    write_result(
        options.results,
        {
            "benchmark": "real_finetune",
            "command": run_command(),
            "machine": machine(),
            "versions": versions(),
            "source": f"{_WHEEL} (modified BSD)",
            "pairs": pairs,
            "merges": merges,
        },
    )
    show(pairs, merges)


def merged_variant(base: Weights, tuned: Weights) -> Weights:
    """Return a second expert: the fine-tune of the interaction blocks alone."""
    return {n: tuned[n] if "atom_conv" in n else w for n, w in base.items()}


def show(pairs: dict[str, Any], merges: list[dict[str, Any]]) -> None:
    """Print the figures."""
    table = Table(title="what a rotation leaves of the update, relative to noise")
    for column in ("pair", "anchor", "layers", "< 0.9", "smallest", "median", "rotational share"):
        table.add_column(column)
    for pair in pairs.values():
        for anchor, found in pair["summary"].items():
            table.add_row(
                pair["meaning"],
                anchor,
                str(found["layers"]),
                str(found["layers_below_0.9_of_noise"]),
                f"{found['smallest_residual_over_noise']:.2f}",
                f"{found['median_residual_over_noise']:.2f}",
                f"{found['rotational_share']:.2f}",
            )
    console = Console()
    console.print(table)
    for merge in merges:
        console.print(merge)


if __name__ == "__main__":
    main()
