"""The Typer application: one module per command in ``commands``, imported lazily by Typer's help.

Nothing here imports torch; a command imports the library when it runs.
"""

from __future__ import annotations

import gc
import sys
from typing import Annotated

import typer
from orthomerge_cli.commands import (
    demo,
    diagnose,
    diff,
    extract,
    init,
    inspect,
    merge,
    methods,
    negate,
    plan,
    unlearn,
    validate,
)
from orthomerge_cli.session import SESSION, run_guarded

app = typer.Typer(
    name="orthomerge",
    help="Merge models and adapters on disk, exactly and in bounded memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("merge")(merge.merge)
app.command("plan")(plan.plan)
app.command("validate")(validate.validate)
app.command("inspect")(inspect.inspect)
app.command("diff")(diff.diff)
app.command("extract")(extract.extract)
app.command("negate")(negate.negate)
app.command("unlearn")(unlearn.unlearn)
app.command("diagnose")(diagnose.diagnose)
app.add_typer(methods.app, name="methods")
app.command("init")(init.init)
app.command("demo")(demo.demo)


def _version(value: bool) -> None:
    if value:
        from orthomerge.version import __version__

        typer.echo(f"orthomerge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Merge models and adapters on disk, exactly and in bounded memory."""
    SESSION.debug = debug


def main() -> None:
    """Run the command line; exit with the documented code."""
    gc.disable()  # collecting while thousands of modules are imported only costs time
    sys.exit(run_guarded(app, sys.argv[1:]))
