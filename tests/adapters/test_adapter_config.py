"""Reading adapter_config.json: what is accepted, and how each refusal reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orthomerge.adapters import CONFIG_NAME, AdapterConfig, read_adapter_config
from orthomerge.errors import AdapterError


def write(folder: Path, text: str) -> Path:
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    return folder


def test_reads_type_values_and_path(tmp_path: Path) -> None:
    config = read_adapter_config(write(tmp_path, json.dumps({"peft_type": "oft", "r": 4})))
    assert config.peft_type == "OFT"
    assert config.values["r"] == 4
    assert config.path == tmp_path / CONFIG_NAME


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "not the config of a PEFT adapter .*found list"),
        ('{"r": 4}', "not the config of a PEFT adapter .*found peft_type None"),
        ('{"peft_type": 3}', "found peft_type 3"),
        ('{"peft_type": ""}', "found peft_type ''"),
    ],
    ids=["cut", "nested", "list", "no type", "number", "empty"],
)
def test_invalid_files_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(AdapterError, match=problem) as caught:
        read_adapter_config(write(tmp_path, text))
    assert caught.value.file == str(tmp_path / CONFIG_NAME)
    assert caught.value.remedy


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"No such file.*save_pretrained") as caught:
        read_adapter_config(tmp_path)
    assert caught.value.file == str(tmp_path / CONFIG_NAME)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(b"\xff\xfe{}")
    with pytest.raises(AdapterError, match="not valid JSON"):
        read_adapter_config(tmp_path)


def config(**values: Any) -> AdapterConfig:
    return AdapterConfig("OFT", values, Path("config.json"))


@pytest.mark.parametrize(
    ("value", "names"),
    [(None, ()), ("q", ("q",)), (["v", "q", "v"], ("q", "v")), ([], ())],
)
def test_names(value: object, names: tuple[str, ...]) -> None:
    assert config(target_modules=value).names("target_modules") == names


@pytest.mark.parametrize("value", [{"q": 1}, [1], 3])
def test_names_of_another_type_are_refused(value: object) -> None:
    with pytest.raises(AdapterError, match="target_modules must be a list"):
        config(target_modules=value).names("target_modules")


def test_value_checks_the_type() -> None:
    assert config(eps=None).value("eps", float, 6e-5) == 6e-5
    assert config(eps=1).value("eps", float, 6e-5) == 1.0
    assert config(r=2).value("r", int, 8) == 2
    for key, kind, wrong in (("r", int, True), ("r", int, 2.0), ("coft", bool, 1), ("v", str, 3)):
        with pytest.raises(AdapterError, match=f"{key} has the wrong type"):
            config(**{key: wrong}).value(key, kind, kind())
