"""What the tests of all commands share."""

from __future__ import annotations

import pytest
from orthomerge_cli.main import app
from orthomerge_cli.session import run_guarded


@pytest.fixture
def run(capfd):
    """Run the command line in this process; return (exit code, stdout, stderr)."""

    def run(*arguments):
        code = run_guarded(app, [str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run
