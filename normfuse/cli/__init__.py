"""The command line: ``normfuse COMMAND``.

Commands are loaded when they are named and import torch only when they run, so that ``--help`` is immediate.

Exit codes: 0 done and verified; 1 verification failed or output unusable; 2 usage; 3 a requirement unmet
(``--require-fold``); 4 input refused; 5 a backend is missing; 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click

import normfuse

COMMANDS = {  # written here, so that a list of the commands loads none of them
    "inspect": "Every norm of a model, what folding would do with it, and why not.",
    "fold": "Every exact pass; a folded model file that loads again.",
    "export": "Fold, write ONNX or a TensorRT engine, verify the written file.",
    "swap": "Norms into norms that fold, or run in integers, fitted to data.",
    "recalibrate": "Statistics of norms from data; a model file that folds afterwards.",
    "quantize": "Conv and Linear layers into integers, calibrated on data or to be trained.",
    "verify": "Does B compute what A computes?",
    "bench": "Latency of a model, unfolded and folded, on the backends of this machine.",
    "doctor": "Versions, devices, and what works here.",
}


class LazyGroup(click.Group):
    """A group whose commands live in modules of their own, and whose errors are one line each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of a user's work, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return it, None for any other word."""
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"normfuse.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run, print an error as one line on standard error, and exit with its code."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            with _terminating():
                code = super().main(*args, standalone_mode=False, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.ClickException as error:
            click.echo(one_line(error), err=True)
            code = error.exit_code
        except click.Abort:
            click.echo("Interrupted", err=True)
            code = 130
        except Terminated:
            click.echo("Terminated", err=True)
            code = 143
        sys.exit(code if isinstance(code, int) else 0)


class Terminated(BaseException):
    """The process was asked to end: what is half-written is cleaned up on the way out, as for an interrupt."""


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Turn SIGTERM into an exception for the time of a command, where nobody else handles it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def one_line(error: click.ClickException) -> str:
    """Return the text of an error in one line, with the command that explains the usage where that was wrong."""
    text = " ".join(line.strip() for line in error.format_message().splitlines() if line.strip())
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"Error: {text}" + (f" (see {context.command_path} --help)" if context else "")


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit: 0 done, 1 verification failed, 2 usage, 3 requirement unmet, 4 input refused, 5 backend missing.",
)
@click.version_option(normfuse.__version__, prog_name="normfuse")
def main() -> None:
    """Fold normalization layers into their neighbours, exactly, and export verified networks."""
