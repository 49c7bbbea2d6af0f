"""Run the command line in forks of one process that has imported everything, to save start-ups.

Reads one JSON object per line: ``arguments`` for the command line, ``pause`` in seconds after every
piece that is read, ``sync_bytes`` between journal entries, and where standard output and error go.
Answers with the fork's process id and, after an empty line, with its exit code (negative: the
signal that killed it).
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from orthomerge_cli.main import main

from orthomerge.checkpoints import writer
from orthomerge.merging import run


def serve() -> None:
    """Answer requests until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _merge(request)
        print(child, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _merge(request: dict[str, Any]) -> None:
    for name, number in (("stdout", 1), ("stderr", 2)):
        handle = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    execute = run.execute
    run.execute = lambda plan, sink, advance=None: execute(
        plan, sink, advance=lambda _: time.sleep(request["pause"])
    )
    writer._SYNC_BYTES = request["sync_bytes"]
    sys.argv = ["orthomerge", *request["arguments"]]
    code: Any = 1
    try:
        main()
    except SystemExit as exit_request:
        code = exit_request.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    serve()
