"""Train, compare, measure, verify and draw.

mep train --data digits --epochs 5
mep bench --quick
mep bench speed
mep profile
mep verify --model package.module:factory
mep study
mep report runs/bench/mnist5k.json
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperGroup
except ImportError as error:
    raise ImportError('The command `mep` needs: pip install "mep-torch[cli]"') from error

import mep
from mep.cli import lab, train
from mep.errors import MepError, NotConvergedWarning


class TidyErrors(TyperGroup):
    """Shows an expected error or warning as its message alone; any other exception is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; 2 is the exit code of a refusal, 130 that of Ctrl-C."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except MepError as error:
            _show("Error", "red", str(error))
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **others: Any) -> None:
    if issubclass(category, NotConvergedWarning):
        _show("Warning", "yellow", str(message))
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))


def _show(kind: str, colour: str, message: str) -> None:
    typer.secho(kind, fg=colour, bold=True, err=True, nl=False)
    typer.echo(f": {message}", err=True)


app = typer.Typer(
    cls=TidyErrors,
    help="Train PyTorch modules by equilibrium propagation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(help=lab.help_of(train))(train.train)
lab.register(app)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mep {mep.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Train PyTorch modules by equilibrium propagation."""
