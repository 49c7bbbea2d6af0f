"""Files to rows: every format, every shape of a row, and what is refused, with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orthomerge.errors import (
    DataError,
    MissingExtraError,
    OrthoMergeError,
    ProblemsError,
    RecipeError,
    UnknownNameError,
)
from orthomerge.unlearning.data import Message, Row, load_rows

QA = [{"question": "Who?", "answer": "Ada."}, {"question": "Where?", "answer": "In Lisbon."}]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def lines(*rows: object) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def problems_of(path: Path, **options: object) -> list[OrthoMergeError]:
    with pytest.raises(OrthoMergeError) as caught:
        load_rows(path, **options)
    error = caught.value
    return list(error.problems) if isinstance(error, ProblemsError) else [error]


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", lines(*QA), [1, 2]),
        ("a.json", lines(*QA), [1, 2]),  # JSON Lines under the wrong suffix
        ("a.jsonl", "\n" + lines(QA[0]) + "\n  \n" + lines(QA[1]), [2, 5]),
        ("a.json", json.dumps(QA), [1, 1]),
        ("a.jsonl", json.dumps(QA, indent=1), [2, 6]),
        ("a.json", json.dumps({"version": 1, "data": QA}, indent=1), [4, 8]),
        ("a.json", json.dumps({"train": QA}, indent=1), [3, 7]),
        ("a.csv", "question,answer\nWho?,Ada.\nWhere?,In Lisbon.\n", [2, 3]),
        ("a.csv", "question;answer\r\nWho?;Ada.\r\nWhere?;In Lisbon.\r\n", [2, 3]),
        ("a.tsv", "question\tanswer\nWho?\tAda.\n\nWhere?\tIn Lisbon.", [2, 4]),
        ("a.csv", "Answer , QUESTION,id\nAda.,Who?,\nIn Lisbon.,Where?,\n", [2, 3]),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_every_format_gives_the_same_rows(write, name, content, places, mark) -> None:
    path = write(name, mark + content.encode())
    rows = load_rows(path)
    assert [(row.kind, row.prompt, row.answer) for row in rows] == [
        ("qa", "Who?", "Ada."),
        ("qa", "Where?", "In Lisbon."),
    ]
    assert [row.where for row in rows] == [f"{path}:{place}" for place in places]


def test_paragraphs_are_rows_of_text(write) -> None:
    path = write("book.txt", "\n\nOne,\r\nstill one.\r\n \t\nTwo.\u2028Still two.\n\n\n")
    rows = load_rows(path)
    assert [(row.kind, row.text) for row in rows] == [
        ("text", "One,\nstill one."),
        ("text", "Two.\u2028Still two."),
    ]
    assert [row.where for row in rows] == [f"{path}:3", f"{path}:6"]


def test_json_lines_may_hold_line_separators_inside_strings(write) -> None:
    path = write("a.jsonl", '{"text": "a\u2028b\u0085c"}\n{"text": "d"}\n')
    assert load_rows(path)[0].text == "a\u2028b\u0085c"


def test_cells_may_be_long_and_hold_line_breaks(write) -> None:
    import csv

    limit = csv.field_size_limit()
    long = "word " * 40_000
    path = write("a.csv", f'text\n"a, ""b""\nc"\n{long}\n')
    rows = load_rows(path)
    assert rows[0].text == 'a, "b"\nc'
    assert rows[1].text == long
    assert rows[1].where == f"{path}:4"
    assert csv.field_size_limit() == limit


def test_a_split_is_chosen_by_name(write) -> None:
    path = write("a.json", json.dumps({"forget": QA[:1], "retain": QA[1:]}, indent=2))
    assert load_rows(f"{path}#retain")[0].answer == "In Lisbon."
    assert load_rows(f"{path}#retain")[0].where == f"{path}:9"
    assert "forget, retain" in str(problems_of(path)[0])
    with pytest.raises(UnknownNameError, match="'retain'"):
        load_rows(f"{path}#retan")


def test_a_hash_in_a_file_name_is_no_split(write) -> None:
    assert load_rows(write("a#1.jsonl", lines(*QA)))[0].prompt == "Who?"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_files_without_splits_refuse_one(write, name) -> None:
    path = write(name, "question,answer\nWho?,Ada.\n" if name == "a.csv" else lines(*QA))
    with pytest.raises(DataError, match="no splits"):
        load_rows(f"{path}#train")


# ------------------------------------------------------------------ shapes of rows


def test_tofu_rows(write) -> None:
    row = {
        "question": "Who?",
        "answer": "Ada.",
        "paraphrased_question": "Which person?",
        "paraphrased_answer": "It was Ada.",
        "perturbed_answer": ["Eve.", "Bob."],
    }
    assert load_rows(write("a.jsonl", lines(row)))[0] == Row(
        "qa",
        prompt="Who?",
        answer="Ada.",
        where=load_rows(write("a.jsonl", lines(row)))[0].where,
        paraphrases=("Which person?",),
        paraphrased_answers=("It was Ada.",),
        perturbed=("Eve.", "Bob."),
    )


@pytest.mark.parametrize(
    ("values", "kind", "prompt", "answer"),
    [
        ({"prompt": "Once ", "gt": "upon"}, "completion", "Once ", "upon"),
        ({"prompt": "", "completion": "upon"}, "completion", "", "upon"),
        ({"prompt": "Once ", "response": "upon"}, "completion", "Once ", "upon"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "qa", "Add.\n\n1 2", "3"),
        ({"instruction": "Sing.", "input": "", "output": "La."}, "qa", "Sing.", "La."),
        ({"instruction": "Sing.", "output": "La.", "text": "whole"}, "qa", "Sing.", "La."),
        ({"question": "How many?", "answer": 42}, "qa", "How many?", "42"),
    ],
)
def test_shapes_are_recognised(write, values, kind, prompt, answer) -> None:
    row = load_rows(write("a.jsonl", lines(values)))[0]
    assert (row.kind, row.prompt, row.answer) == (kind, prompt, answer)


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Yo"]}},
        {"messages": json.dumps([{"from": "user", "value": "Hi"}, {"from": "bot", "value": "Yo"}])},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": part} for part in "Hi"]},
                {"role": "assistant", "content": "Yo", "tool_calls": None},
            ]
        },
    ],
    ids=["openai", "sharegpt", "columns", "json text", "parts"],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_chats_are_recognised(write, values, suffix) -> None:
    row = load_rows(write(f"a.{suffix}", json.dumps(values, indent=1)))[0]
    assert row.kind == "chat"
    assert row.messages == (Message("user", "Hi"), Message("assistant", "Yo"))


def test_a_weight_of_zero_takes_a_turn_out(write) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo", "weight": 0, "name": "x"},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "Yes", "weight": 1},
    ]
    row = load_rows(write("a.jsonl", lines({"messages": turns})))[0]
    assert [turn.scored for turn in row.messages or ()] == [True, False, True, True]
    assert row.unused == ("messages.name",)


def test_optional_columns_and_what_is_not_read(write) -> None:
    content = (
        "question,answer,id,weight,perturbed,paraphrases,alternate,topic\n"
        'Who?,Ada.,7,0.5,"[""Eve."", ""Bob.""]",Which?,No idea.,people\n'
        "Where?,Here.,,,,,,\n"
    )
    first, second = load_rows(write("a.csv", content))
    assert (first.id, first.weight, first.alternate) == ("7", 0.5, "No idea.")
    assert (first.perturbed, first.paraphrases) == (("Eve.", "Bob."), ("Which?",))
    assert (second.id, second.weight, second.alternate, second.perturbed) == (None, 1, None, ())
    assert first.unused == ("topic",)


def test_keys_map_columns(write) -> None:
    path = write("a.jsonl", lines({"q": "Who?", "answer": "no", "a": "Ada.", "text": "x"}))
    row = load_rows(path, keys={"question": "q", "answer": "a"})[0]
    assert (row.kind, row.prompt, row.answer) == ("qa", "Who?", "Ada.")
    assert row.unused == ("answer", "text")
    assert load_rows(path, keys={"text": "q"})[0].text == "Who?"
    path = write("b.jsonl", lines({"ANSWER": "Who?", "Answer": "Ada."}))
    row = load_rows(path, keys={"question": "ANSWER"})[0]
    assert (row.prompt, row.answer) == ("Who?", "Ada.")


@pytest.mark.parametrize(
    ("keys", "error", "says"),
    [
        ({"quastion": "q"}, UnknownNameError, "'question'"),
        ({"question": "qq", "answer": "a"}, UnknownNameError, "'q'"),
        ({"question": "q", "text": "a"}, RecipeError, "different kinds"),
        ({"question": "q", "answer": "q"}, RecipeError, "two things"),
    ],
)
def test_keys_that_do_not_fit_are_refused(write, keys, error, says) -> None:
    with pytest.raises(error, match=says):
        load_rows(write("a.jsonl", lines({"q": "Who?", "a": "Ada."})), keys=keys)


def test_unknown_columns_say_how_to_map_them(write) -> None:
    path = write("a.csv", "quest,resp\nWho?,Ada.\n")
    (problem,) = problems_of(path)
    assert problem.found == "quest, resp"
    assert "keys: {question: quest, answer: " in str(problem.remedy)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "content", "where", "says"),
    [
        ("a.jsonl", lines(QA[0]) + '{"question": "x",\n', ":2", "malformed JSON"),
        ("a.json", '[\n{"question": "x", "answer": "y"}\n{}]', ":3", "',' delimiter"),
        ("a.json", '[{"question": "x", "answer": "y"}]\n]', ":2", "Extra data"),
        ("a.json", '{\n "data": [\n  {"question": }]}', ":3", "Expecting value"),
        ("a.jsonl", '{"text": "a", "text": "b"}', ":1", "'text' occurs twice"),
        ("a.jsonl", lines(QA[0], [1]), ":2", "not an object"),
        ("a.jsonl", "[" * 100_000, ":1", "nested too deeply"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ":2", "not UTF-8"),
        ("a.txt", "abc".encode("utf-16"), "", "UTF-16"),
        ("a.txt", "a\nb".encode("utf-16-le"), ":1", "NUL"),
        ("a.csv", "question,answer\nWho?\n", ":2", "as many cells"),
        ("a.csv", "question,answer\nWho?,b,c\n", ":2", "as many cells"),
        ("a.csv", 'question,answer\na,b\n"Who?,Ada.\n', ":3", "malformed table"),
        ("a.csv", "question,answer,answer\na,b,c\n", ":1", "each once"),
        ("a.csv", "question,,answer\na,b,c\n", ":1", "each once"),
        ("a.jsonl", "", "", "no rows"),
        ("a.json", "[]", "", "no rows"),
        ("a.json", '{"data": []}', "", "no rows"),
        ("a.csv", "question,answer\n", "", "no rows"),
        ("a.csv", "", "", "no rows"),
        ("a.txt", " \n\n", "", "no rows"),
        ("a.xlsx", "x", "", "suffix"),
        ("a.jsonl", lines(QA[0], {"text": "x"}), ":2", "unlike other rows"),
        ("a.jsonl", lines(QA[0], {"question": "x", "answer": None}), ":2", "'answer' is not text"),
        ("a.jsonl", lines({"question": "x", "answer": 1.50}), ":1", "float 1.5"),
        ("a.jsonl", lines({"question": "x", "answer": True}), ":1", "bool True"),
        ("a.jsonl", lines({"question": "x", "answer": ["y"]}), ":1", "list"),
        ("a.jsonl", lines({"question": "x", "answer": " \n"}), ":1", "answer is empty"),
        ("a.jsonl", lines({"question": " ", "answer": "y"}), ":1", "question is empty"),
        ("a.jsonl", lines({"text": "\t"}), ":1", "text is empty"),
        ("a.jsonl", lines({"text": "a", "weight": "heavy"}), ":1", "'weight' is not a number"),
        ("a.jsonl", lines({"text": "a", "weight": -1}), ":1", "above zero"),
        ("a.jsonl", '{"text": "a", "weight": NaN}', ":1", "above zero"),
        ("a.jsonl", lines({"question": "x", "answer": "y", "perturbed": [1.5]}), ":1", "perturbed"),
        ("a.jsonl", lines({"messages": "no JSON"}), ":1", "not a list of objects"),
        ("a.jsonl", lines({"messages": [{"role": "user", "content": "x"}]}), ":1", "no assistant"),
        ("a.jsonl", lines({"messages": [{"role": "tool", "content": "x"}]}), ":1", "role 'tool'"),
        ("a.jsonl", lines({"messages": [{"role": "user"}]}), ":1", "keys: role"),
        (
            "a.jsonl",
            lines({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}),
            ":1",
            "calls tools",
        ),
        (
            "a.jsonl",
            lines({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}),
            ":1",
            "no text",
        ),
        (
            "a.jsonl",
            lines({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}),
            ":1",
            "neither 0 nor 1",
        ),
        (
            "a.jsonl",
            lines({"messages": [{"from": "user", "value": ""}, {"from": "gpt", "value": "x"}]}),
            ":1",
            r"turn 1 \(user\) is empty",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_where_it_is(write, name, content, where, says) -> None:
    path = write(name, content)
    (problem,) = problems_of(path)
    assert isinstance(problem, DataError)
    assert problem.file == f"{path}{where}"
    with pytest.raises(DataError, match=says):
        raise problem


def test_all_problems_are_reported_at_once(write) -> None:
    bad = [f'{{"question": "{i}", "answer": null}}\n' for i in range(30)]
    path = write("a.jsonl", "{oops\n" + "".join(bad) + lines(QA[0]) + "3\n")
    problems = problems_of(path)
    assert [problem.file for problem in problems] == [
        f"{path}:1",
        f"{path}:33",
        *(f"{path}:{line}" for line in range(2, 32)),
    ]
    with pytest.raises(ProblemsError, match="32 problems found"):
        load_rows(path)


def test_unknown_columns_do_not_hide_malformed_lines(write) -> None:
    path = write("a.jsonl", lines({"q": "Who?"}) + "oops\n")
    assert [problem.file for problem in problems_of(path)] == [str(path), f"{path}:2"]


def test_several_faults_of_one_row_are_all_told(write) -> None:
    path = write("a.jsonl", lines({"question": None, "answer": 0.5, "weight": "x"}))
    assert len(problems_of(path)) == 3


def test_missing_files_and_folders(tmp_path: Path, write) -> None:
    write("forget.jsonl", lines(*QA))
    assert "Did you mean" in str(problems_of(tmp_path / "forgte.jsonl")[0])
    assert "downloaded" in str(problems_of(tmp_path / "locuslab/TOFU".replace("/", "-"))[0])
    assert "no folder" in str(problems_of(tmp_path / "nowhere" / "a.jsonl")[0])
    (problem,) = problems_of(tmp_path)
    assert problem.found == "forget.jsonl"
    assert "forget.jsonl'" in str(problem.remedy)
    (tmp_path / "empty").mkdir()
    assert problems_of(tmp_path / "empty")[0].found == "nothing"


@pytest.mark.parametrize(("module", "name"), [("pyarrow", "a.parquet"), ("datasets", "folder")])
def test_optional_packages_are_named(tmp_path: Path, monkeypatch, module, name) -> None:
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "state.json").write_text("{}")
    else:
        path.write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match=r"orthomerge\[unlearn\]"):
        load_rows(path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [{**QA[0], "perturbed_answer": ["Eve."]}, {**QA[1], "perturbed_answer": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    loaded = load_rows(path)
    assert [row.answer for row in loaded] == ["Ada.", "In Lisbon."]
    assert [row.perturbed for row in loaded] == [("Eve.",), ()]
    assert [row.where for row in loaded] == [f"{path}:1", f"{path}:2"]
    parquet.write_table(pyarrow.Table.from_pylist([QA[0], {"question": "x"}]), path)
    assert problems_of(path)[0].file == f"{path}:2"
    path.write_bytes(b"PAR1 not")
    assert "Parquet" in str(problems_of(path)[0])


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(QA)
    one.save_to_disk(str(tmp_path / "one"))
    assert [row.answer for row in load_rows(tmp_path / "one")] == ["Ada.", "In Lisbon."]
    splits = datasets.DatasetDict({"forget": one, "retain": one.select([1])})
    splits.save_to_disk(str(tmp_path / "two"))
    path = tmp_path / "two"
    assert [row.answer for row in load_rows(f"{path}#retain")] == ["In Lisbon."]
    assert "forget, retain" in str(problems_of(path)[0])
    with pytest.raises(UnknownNameError, match="'retain'"):
        load_rows(f"{path}#retian")
    with pytest.raises(DataError, match="no splits"):
        load_rows(f"{tmp_path / 'one'}#train")
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    assert "dataset folder" in str(problems_of(tmp_path / "one")[0])


def test_reading_rows_imports_nothing_heavy(write) -> None:
    import subprocess
    import sys

    path = write("a.jsonl", lines(*QA))
    heavy = ["torch", "transformers", "pyarrow", "datasets", "pandas", "numpy"]
    script = (
        "import sys; from orthomerge.unlearning.data import load_rows, check_sets\n"
        f"check_sets(load_rows({str(path)!r})); print([m for m in {heavy} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
