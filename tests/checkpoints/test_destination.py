"""Where an output may go: never over an input, over anything else only when told to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from orthomerge import merge
from orthomerge.checkpoints.destination import check_destination, partial_folder
from orthomerge.errors import OutputError

INPUT = "would overwrite or lie inside the input"


def check(
    output: Path | str,
    inputs: Iterable[Path] = (),
    *,
    single_file: bool = False,
    overwrite: bool = True,
) -> None:
    check_destination(Path(output), inputs, single_file=single_file, overwrite=overwrite)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "base"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_new_output_is_allowed(model: Path, tmp_path: Path) -> None:
    check(tmp_path / "new", [model], overwrite=False)
    check(tmp_path / "models" / "new", [model], overwrite=False)
    check(tmp_path / "not" / "there" / "yet", [model], overwrite=False)


def test_existing_output_needs_overwrite(model: Path) -> None:
    with pytest.raises(OutputError, match="already exists") as caught:
        check(model, overwrite=False)
    assert "--overwrite" in str(caught.value)
    check(model)


def test_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="already exists"):
        check(tmp_path / "link", overwrite=False)
    check(tmp_path / "link")


@pytest.mark.parametrize(
    "output",
    [
        "base",
        "base/inside",
        "base/deep/inside",
        "../models",
        "../models/base",
        "base/../base",
        "link",
        "link/inside",
        "../models/link",
    ],
)
def test_input_folder_is_never_overwritten(
    output: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    (model.parent / "link").symlink_to("base")
    for spelled in (model, Path("base"), Path("link"), Path("../models/./base")):
        for path in (Path(output), Path(output).absolute()):
            with pytest.raises(OutputError, match=INPUT):
                check(path, [spelled])


def test_input_through_links_is_never_overwritten(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"  # a cache whose files are links to blobs elsewhere
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(model / "model.safetensors")
    source = snapshot / "model.safetensors"
    for output in (snapshot, model, model.parent):
        with pytest.raises(OutputError, match=INPUT):
            check(output, [source])
    for output in (source, model / "model.safetensors"):
        with pytest.raises(OutputError, match=INPUT):
            check(output, [source], single_file=True)


def test_link_inside_an_input_is_no_way_around(model: Path, tmp_path: Path) -> None:
    (model / "exit").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=INPUT):
        check(model / "exit", [model])


def test_input_inside_the_partial_output_is_never_cleared(tmp_path: Path) -> None:
    source = tmp_path / "out.partial" / "out"
    source.mkdir(parents=True)
    for inputs in ([source], [source.parent], [source / "model.safetensors"]):
        with pytest.raises(OutputError, match=INPUT):
            check(tmp_path / "out", inputs)


def test_single_file_may_lie_beside_an_input_but_not_replace_it(model: Path) -> None:
    source = model / "model.safetensors"
    check(model / "merged.safetensors", [source, model], single_file=True, overwrite=False)
    with pytest.raises(OutputError, match=INPUT):
        check(source, [source], single_file=True)


def test_folder_that_is_no_model_is_not_overwritten(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "documents").mkdir(parents=True)
    with pytest.raises(OutputError, match="does not look like a model"):
        check(home)
    (home / "stray.safetensors").write_text("")
    with pytest.raises(OutputError, match="or holds other folders"):
        check(home)
    (home / "documents").rmdir()
    check(home)
    (home / "stray.safetensors").unlink()
    check(home)  # empty
    (home / "letter.txt").write_text("")
    with pytest.raises(OutputError, match="does not look like a model"):
        check(home)


def test_file_and_folder_do_not_replace_each_other(model: Path) -> None:
    with pytest.raises(OutputError, match="is a folder, and a file is to be written there"):
        check(model, single_file=True)
    with pytest.raises(OutputError, match="is a file, and a folder is to be written there"):
        check(model / "model.safetensors")


@pytest.mark.parametrize("output", [".", "..", "/", "a/.."])
def test_output_needs_a_name(output: str) -> None:
    with pytest.raises(OutputError, match="is not a name for an output"):
        partial_folder(Path(output))
    with pytest.raises(OutputError):
        check(output)


def test_loop_of_links_is_replaceable(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OutputError, match="already exists"):
        check(tmp_path / "a", overwrite=False)
    check(tmp_path / "a")


def test_merge_over_its_input_is_refused_and_changes_nothing(
    model: Path, tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    tensors = {"w": torch.ones(3)}
    folder = write_folder("in", tensors)
    (tmp_path / "link").symlink_to(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for output in (folder, tmp_path / "link", folder / "sub", tmp_path):
        with pytest.raises(OutputError):
            merge([folder, tensors], output=output, overwrite=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(tmp_path.parent.glob("*.partial"))
