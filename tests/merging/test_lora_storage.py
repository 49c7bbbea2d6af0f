"""The same change stored with another alpha, rank, rsLoRA or factors gives the same merge."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from lora_folders import assert_changes, factors, read, write

import orthomerge
from orthomerge.merging.registry import all_methods
from orthomerge.merging.spaces import Space

#: They work on the stored factors, by definition: on all of what is stored, or on B.
STORED = {"peft-linear": ("alpha", "rslora", "rank", "gauge"), "pico": ("gauge",)}


def of_factors(method):
    additive = method.space is Space.DELTA and "additive" in method.laws and not method.nests
    return method.factors is not None or additive


def same_changes(form):
    """Return the factors of seed 1 in another form, and its config."""
    stored, config = factors(1), {}
    if form == "alpha":
        stored = {n: (B * 3, A, alpha / 3) for n, (B, A, alpha) in stored.items()}
    elif form == "rslora":
        config["use_rslora"] = True
        stored = {n: (B / math.sqrt(3), A, alpha) for n, (B, A, alpha) in stored.items()}
    elif form == "rank":
        pad = torch.nn.functional.pad
        stored = {
            n: (pad(B, (0, 2)), pad(A, (0, 0, 0, 2)), alpha * 5 / 3)
            for n, (B, A, alpha) in stored.items()
        }
    elif form == "gauge":
        M = torch.eye(3, dtype=torch.float64) + torch.tril(torch.ones(3, 3)).double()
        stored = {
            n: (B @ M, torch.linalg.solve(M, A), alpha) for n, (B, A, alpha) in stored.items()
        }
    return stored, config


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name, method in all_methods().items()
        for form in ("alpha", "rslora", "rank", "gauge")
        if of_factors(method) and form not in STORED.get(name, ())
    ],
)
def test_only_the_change_counts_not_how_it_is_stored(tmp_path, name, form) -> None:
    """The same change under other (alpha, r, rsLoRA) or other factors gives the same merge."""
    method = all_methods()[name]
    write(tmp_path / "second", factors(2, rank=2, alpha=1.0))
    folders = [tmp_path / "first", tmp_path / "second"][: method.max_models or 2]

    def merged(form):
        stored, config = same_changes(form)
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
        dense = write(tmp_path / "first", stored, **config)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        orthomerge.merge(folders, method=name, output=tmp_path / "out")
        return dense, read(tmp_path / "out")

    (dense, wanted), (again, found) = merged("plain"), merged(form)
    assert_changes(again, dense, 1e-13)
    assert max(float(change.abs().max()) for change in wanted.values()) > 0.1
    assert_changes(found, wanted, 1e-10)
