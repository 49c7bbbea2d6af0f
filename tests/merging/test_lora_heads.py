"""Trained heads under weights that have no mean, and merged into the base model."""

from __future__ import annotations

import pytest
import torch
from lora_folders import SHAPES, factors, read, write
from safetensors.torch import load_file, save_file

import orthomerge
from orthomerge.errors import AdapterError, RecipeError

HEAD = "head.weight"


@pytest.fixture
def folders(tmp_path):
    """Two adapters with a head each, and their base, which has a head of zeros."""
    for seed in (1, 2):
        whole = {HEAD: torch.full((2, 2), float(seed))}
        write(tmp_path / f"with-{seed}", factors(seed), whole=whole, modules_to_save=["head"])
    write(tmp_path / "without", factors(3))
    base = {f"{name}.weight": torch.zeros(shape).double() for name, shape in SHAPES.items()}
    save_file({**base, HEAD: torch.zeros(2, 2)}, tmp_path / "base.safetensors")
    return tmp_path


def merged(folder, names, *, base=False, **settings):
    """Return the head of the merge of some adapters, alone or into their base."""
    output = folder / ("out.safetensors" if base else "out")
    given = {"base": folder / "base.safetensors"} if base else {}
    orthomerge.merge([folder / name for name in names], output=output, **given, **settings)
    return load_file(output)[HEAD] if base else read(output)[HEAD]


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0]])
def test_heads_have_no_mean_under_weights_that_sum_to_zero(folders, weights, base) -> None:
    """Refused before anything is written; with one of the heads the merge is done."""
    pair = ["with-1", "with-2"]
    with pytest.raises(RecipeError, match=r"sum to zero.*--heads keep:N"):
        merged(folders, pair, base=base, weights=weights)
    assert not list(folders.glob("out*"))
    kept = {"adapter_settings": {"heads": "keep:1"}}
    found = merged(folders, pair, base=base, weights=weights, **kept)
    torch.testing.assert_close(found, torch.full((2, 2), 1.0))


@pytest.mark.parametrize("base", [False, True])
def test_a_head_of_one_adapter_is_taken_over_whatever_its_weight(folders, base) -> None:
    found = merged(folders, ["with-2", "without"], base=base, weights=[0.0, 1.0])
    torch.testing.assert_close(found, torch.full((2, 2), 2.0))


@pytest.mark.parametrize("method", ["do-merging", "ties"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_one_head_can_be_kept_in_a_full_checkpoint(folders, method, dtype) -> None:
    kept = {"adapter_settings": {"heads": "keep:2"}, "output_settings": {"dtype": dtype}}
    found = merged(folders, ["with-1", "with-2"], base=True, method=method, **kept)
    torch.testing.assert_close(found.float(), torch.full((2, 2), 2.0))


def test_several_heads_can_be_refused_in_a_full_checkpoint(folders) -> None:
    with pytest.raises(AdapterError, match=r"head\.weight.*--heads keep:N"):
        merged(folders, ["with-1", "with-2"], base=True, adapter_settings={"heads": "error"})


@pytest.mark.parametrize("method", ["do-merging", "ties"])
@pytest.mark.parametrize("kept", [1, 2])
def test_only_the_kept_head_must_fit_the_base(folders, method, kept) -> None:
    """A head for another number of classes is in the way only where it would be used."""
    whole = {HEAD: torch.ones(5, 2)}
    write(folders / "wide", factors(4), whole=whole, modules_to_save=["head"])
    pair = ["with-2", "wide"]
    settings = {"method": method, "adapter_settings": {"heads": f"keep:{kept}"}}
    if kept == 1:
        found = merged(folders, pair, base=True, **settings)
        torch.testing.assert_close(found, torch.full((2, 2), 2.0))
        return
    for refused in (settings, {"method": method}):
        with pytest.raises(AdapterError, match=r"wide.*head\.weight.*another shape"):
            merged(folders, pair, base=True, **refused)


@pytest.mark.parametrize("kept", [1, 2])
def test_a_dropped_head_need_not_fit_a_base_that_only_gives_norms(folders, kept) -> None:
    write(folders / "wide", factors(4), whole={HEAD: torch.ones(5, 2)}, modules_to_save=["head"])
    paths = [folders / name for name in ("wide", "with-2")]
    settings = {
        "base": folders / "base.safetensors",
        "adapter_settings": {"heads": f"keep:{kept}"},
        "output_settings": {"form": "dora"},
    }
    if kept == 1:
        with pytest.raises(AdapterError, match="another shape"):
            orthomerge.merge(paths, output=folders / "out", **settings)
        return
    found = orthomerge.merge(paths, **settings).tensors["base_model.model.head.weight"]
    torch.testing.assert_close(found, torch.full((2, 2), 2.0))
