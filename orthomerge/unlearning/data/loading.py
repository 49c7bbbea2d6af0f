"""From a file to rows, with everything that is wrong with it in one error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orthomerge.errors import DataError, OrthoMergeError, combined
from orthomerge.unlearning.data.cells import read_row
from orthomerge.unlearning.data.columns import choose_columns
from orthomerge.unlearning.data.files import read_records
from orthomerge.unlearning.data.rows import Row

__all__ = ["load_rows"]


def load_rows(path: str | Path, *, keys: Mapping[str, str] | None = None) -> list[Row]:
    """Read a set of rows from a file or a saved dataset.

    Formats: JSON (one object per line, a list, or an object whose ``"data"`` or whose splits are
    lists), CSV and TSV with a header, Parquet, plain text (one row per paragraph, parted by blank
    lines), and folders written by ``save_to_disk`` of ``datasets``.

    Rows are recognised by their columns, in this order: ``messages`` or ``conversations`` (chat);
    ``question`` and ``answer``; ``instruction``, ``output`` and perhaps ``input`` (a question, the
    input below it); ``prompt`` and ``completion``, ``response`` or ``gt``; ``text``. All rows of a
    file are of one shape. Also read, where present: ``id``, ``weight``, ``paraphrases`` or
    ``paraphrased_question``, ``paraphrased_answers`` or ``paraphrased_answer``, ``perturbed`` or
    ``perturbed_answer``, ``alternate``. Other columns are listed in ``Row.unused``.

    Args:
        path: File or folder; ``path#split`` names one of several splits.
        keys: What a column is -> its name in the file, e.g. ``{"question": "q"}``; these come
            before the names above.

    Returns:
        The rows in the file's order, each knowing its ``where``.

    Raises:
        DataError: The file cannot be read, is empty, or its columns are not known.
        ProblemsError: Several rows are wrong; every one is listed.
        RecipeError: ``keys`` does not fit the file.
        MissingExtraError: The format needs a package that is not installed.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "forget.csv")
    ...     _ = path.write_text("q,answer\\nWho?,Ada.\\n")
    ...     load_rows(path, keys={"question": "q"})[0].prompt
    'Who?'
    """
    found = read_records(path)
    problems: list[OrthoMergeError] = list(found.problems)
    rows: list[Row] = []
    if found.records:
        try:
            columns = choose_columns(found.records, keys, file=str(path))
        except OrthoMergeError as error:
            raise combined([error, *problems]) from error
        for record in found.records:
            row, wrong = read_row(record, columns)
            problems += wrong
            if row is not None:
                rows.append(row)
    elif not problems:
        problems.append(DataError("holds no rows", file=path))
    if problems:
        raise combined(problems)
    return rows
