"""What every command does around its own work: streams, logging, and errors with their exit codes.

While a command works, standard output is standard error, so that nothing a model or a library prints can land among
the results; results are written by :class:`normfuse.cli.output.Output`, which holds the real standard output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from normfuse import errors
from normfuse.cli.arguments import Check, Request
from normfuse.cli.output import Output, require_free

EXIT_CODES: dict[type[errors.NormfuseError], int] = {
    errors.VerificationError: 1,
    errors.LoweringError: 1,
    errors.RequirementError: 3,
    errors.LoadError: 4,
    errors.CalibrationError: 4,
    errors.CaptureError: 4,
    errors.DeployedModelError: 4,
    errors.OrderError: 4,
    errors.TuneModeError: 4,
    errors.MissingDependencyError: 5,
}


class Command(click.Command):
    """A command that reports a :class:`normfuse.NormfuseError` as one line and the exit code of its kind.

    The function gets, beside its own parameters, ``out``, where it writes its results, and in place of the shared
    options a ``request`` (:class:`Request`) and, if it compares, a ``check`` (:class:`Check`).
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command between opening and closing its streams."""
        verbose, quiet = ctx.params.pop("verbose", 0), ctx.params.pop("quiet", False)
        destination, no_color = ctx.params.pop("json_file", None), ctx.params.pop("no_color", False)
        out = Output(sys.stdout, command=ctx.info_name or "", json_file=destination, quiet=quiet, no_color=no_color)
        out.verbose, out.force = verbose > 0, ctx.params.pop("force", False)
        if destination not in (None, "-"):
            require_free(Path(destination), force=out.force)
            _require_apart(out, ctx.params)
        ctx.params["out"] = out
        _pack(ctx.params, "request", Request)
        _pack(ctx.params, "check", Check)
        with _logging(verbose, quiet), _warnings(verbose), contextlib.redirect_stdout(sys.stderr):
            try:
                return super().invoke(ctx)
            except errors.NormfuseError as error:
                if verbose:
                    traceback.print_exc()
                raise failure(error) from error
            except OSError as error:  # a full disk, a folder that is not the user's: not a bug of ours
                if verbose or error.strerror is None:
                    raise
                raise Failure(f"{error.filename or 'writing'}: {error.strerror}", 1) from error


def _require_apart(out: Output, params: dict[str, Any]) -> None:
    """Refuse to write the report over a file that another argument names."""
    for value in params.values():
        for given in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(given, (str, Path)):
                out.require_apart(Path(given))


def _pack(params: dict[str, Any], name: str, kind: type[Any]) -> None:
    """Replace the parameters that are fields of a dataclass by one of it; not where there are none."""
    found = {field.name: params.pop(field.name) for field in dataclasses.fields(kind) if field.name in params}
    if found:
        params[name] = kind(**found)


def failure(error: errors.NormfuseError) -> click.ClickException:
    """Return the error as click prints it, with its exit code."""
    return Failure(str(error), next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1))


class Failure(click.ClickException):
    """An error with an exit code of its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(errors.shown(message))
        vars(self)["exit_code"] = exit_code  # click has one code for each class


class _Formatter(logging.Formatter):
    """Writes each line so that a terminal obeys nothing in it: names may come from a file."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; the trace of an exception is kept as it is, line by line."""
        return "\n".join(map(errors.shown, super().format(record).splitlines()))


@contextlib.contextmanager
def _logging(verbose: int, quiet: bool) -> Iterator[None]:
    """Send the library's log to standard error for the time of a command."""
    logger = logging.getLogger("normfuse")
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    handler.setFormatter(_Formatter("%(message)s"))
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else levels[min(verbose, 2)])
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def _warnings(verbose: int) -> Iterator[None]:
    """Keep the warnings of libraries to those who ask for them: they are rarely the user's to act on."""
    with warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
        yield
