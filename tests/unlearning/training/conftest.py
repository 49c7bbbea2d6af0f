"""What the tests of runs share: one model that knows facts, made once per worker."""

from __future__ import annotations

from pathlib import Path

import pytest
from orthomerge_cli.main import app
from orthomerge_cli.session import run_guarded
from tiny_llama import make_folder, make_tokenizer


@pytest.fixture(scope="session")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and the rows ``forget.jsonl``, ``retain.jsonl``, ``holdout.jsonl``.

    Nobody writes into it.
    """
    return make_folder(tmp_path_factory.mktemp("facts"))


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def run(capfd):
    """Run the command line in this process; return (exit code, stdout, stderr)."""

    def run(*arguments):
        code = run_guarded(app, [str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run
