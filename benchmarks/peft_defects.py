"""Record what PEFT's ``add_weighted_adapter`` and orthomerge answer where PEFT is or was wrong.

Every answer is an error against a dense fp64 truth, or an exception. Other versions of PEFT that
the result file already speaks of are kept; tests/parity/test_peft_defects.py reads it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from circumstances import RESULTS, check_sources, machine, run_command, versions, write_result
from peft_cases import CASES, answers

__all__ = ["main"]

#: What is known and too large to be run here.
NOT_RUN = [
    "Not run: svd_clamp takes torch.quantile of U and V^T together, which refuses more than 2^24 "
    "values: a layer of 131,072 inputs and outputs at rank 64, after its dense SVD.",
]


def measure(quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return our answers and PEFT's, by case."""
    ours, theirs = {}, {}
    for case in CASES[:2] if quick else CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = answers(case, Path(folder))
        ours[case.name], theirs[case.name] = found["ours"], found["peft"]
        print(f"{case.name}: ours {found['ours']}, PEFT {found['peft']}", flush=True)
    return ours, theirs


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two cases only")
    parser.add_argument("--data", type=Path, help="not needed here: nothing is kept")
    parser.add_argument("--results", type=Path, default=RESULTS / "peft_defects.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = versions()
    ours, theirs = measure(options.quick)
    check_sources(measured)
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    record = {
        "transformers": version("transformers"),
        "torch": version("torch"),
        "answers": theirs,
    }
    result = {
        "benchmark": "peft_defects",
        "command": run_command(),
        "machine": machine(),
        "versions": measured,
        "rounds": 1,
        "cases": [
            {"name": case.name, "defect": case.group, "asked": case.about}
            for case in CASES
            if case.name in ours
        ],
        "ours": ours,
        "peft": {**known.get("peft", {}), version("peft"): record},
        "notes": NOT_RUN,
    }
    write_result(options.results, result)
    print(f"written to {options.results}")


if __name__ == "__main__":
    main()
