"""How the results of folding, checking and writing are shown, alike in every command."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli.arguments import Check
from normfuse.cli.output import Output, require_free, size
from normfuse.cli.source import file_entry
from normfuse.errors import RequirementError, VerificationError

if TYPE_CHECKING:
    from normfuse.comparison import Comparison
    from normfuse.report import Outcome, Report
    from normfuse.verify import Tolerance


def destination(output: Path | None, default: Path, out: Output, *, extensions: tuple[str, ...]) -> Path:
    """Return where to write, checked before any work is done.

    Raises:
        click.UsageError: The extension is not one of these, the file exists without ``--force``, its folder does not,
            or ``--json`` names it or a file that goes with it.
    """
    path = output or default
    if path.suffix.lower() not in extensions:
        raise click.UsageError(f"{path}: the name should end in {' or '.join(extensions)}")
    require_free(path, force=out.force)
    for beside in (path, path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.data")):
        out.require_apart(beside)
    return path


def show_report(report: Report, out: Output, *, every: bool = False) -> None:
    """Print what became of the norms: counts, and the ones that are left with the reason; every one if asked for."""
    out.document["pairs"] = [outcome.to_dict() for outcome in report.outcomes]
    out.document["summary"] = report.summary()
    out.document["verification"] = report.verification.to_dict() if report.verification else None
    norms = report.norms
    applied = [o for o in norms if o.status.name == "APPLIED"]
    out.field("norms", _kinds(norms))
    out.field("folded", f"{len(applied)} of {len(norms)}")
    out.field("left", str(len(norms) - len(applied)))
    shown = report.outcomes if every or out.verbose else [o for o in norms if o.status.name in ("REFUSED", "UNMATCHED")]
    if shown:
        out.rows([_row(outcome) for outcome in shown])
    if report.verification:
        out.field("proof", str(report.verification))
    for text in report.notes:
        if text not in out.document["notes"]:
            out.note(text)


def _kinds(norms: tuple[Outcome, ...]) -> str:
    kinds = dict.fromkeys(o.layer for o in norms)
    return "  ".join(f"{kind} {sum(o.layer == kind for o in norms)}" for kind in kinds) or "none"


def _row(outcome: Outcome) -> tuple[str, ...]:
    status, what, why = outcome.line()
    return f"    {status}", f"{what} ({outcome.layer})", why


def require_all_folded(report: Report, out: Output) -> None:
    """Raise if a norm that runs is left.

    Raises:
        RequirementError: Some are; the text names the first ones.
    """
    left = [o for o in report.norms if o.status.name in ("REFUSED", "UNMATCHED")]
    if left:
        out.finish()
        names = ", ".join(o.subject for o in left[:3]) + (", ..." if len(left) > 3 else "")
        raise RequirementError(f"--require-fold: {len(left)} of {len(report.norms)} norms are left ({names})")


def tolerance_of(check: Check) -> Tolerance | None:
    """Return the tolerance that was given, None if none was."""
    if check.rtol is None and check.atol is None:
        return None
    from normfuse.verify import Tolerance

    if not all(math.isfinite(value or 0.0) for value in (check.rtol, check.atol)):
        raise click.UsageError("--rtol and --atol: a tolerance without end accepts anything")
    return Tolerance(rtol=check.rtol or 0.0, atol=check.atol or 0.0)


def show_comparison(comparison: Comparison, out: Output) -> None:
    """Print a comparison, and put it into the document."""
    out.document["verify"] = comparison.to_dict()
    plural = "s" if comparison.inputs != 1 else ""
    out.field("verify", f"{comparison.inputs} input{plural}  {comparison}")
    for text in comparison.notes:
        out.note(text)


def show_change(comparison: Comparison, check: Check, what: str, out: Output) -> None:
    """Print how far an approximate result is from its source, which fails only where a tolerance was given.

    Raises:
        VerificationError: The result leaves the tolerance; nothing has been written.
    """
    out.document["verify"] = comparison.to_dict()
    top1 = f"  top-1 {comparison.top1[0]}/{comparison.top1[1]}" if comparison.top1 else ""
    figures = f"max rel {comparison.max_rel:.2g}  cosine {comparison.cosine:.4f}{top1}"
    out.field("agreement", f"{figures}  (not the same function; on calibration data)")
    if tolerance_of(check) is not None:
        require_passed(comparison, f"{what} leaves the tolerance", out)


def require_passed(comparison: Comparison, what: str, out: Output) -> None:
    """Raise if a comparison failed.

    Raises:
        VerificationError: It did; nothing has been written.
    """
    if not comparison:
        out.finish()
        raise VerificationError(f"{what}: {_why(comparison)}; nothing was written", comparison)


@contextlib.contextmanager
def reporting(out: Output) -> Iterator[None]:
    """Show and write the figures of a verification that fails inside."""
    try:
        yield
    except VerificationError as error:
        if error.comparison is not None:
            show_comparison(error.comparison, out)
        out.finish()
        raise


def _why(comparison: Comparison) -> str:
    place = f", first at {comparison.diverges_at}" if comparison.diverges_at else ""
    return f"verification failed, {comparison.failure}{place}"


def show_file(path: Path, out: Output, details: str = "", **entries: Any) -> None:
    """Print what was written, and put it into the document."""
    out.document["outputs"].append({**file_entry(path), **entries})
    out.field("wrote", f"{path}  ({size(path)}{', ' if details else ''}{details})")


def show_next(text: str, out: Output) -> None:
    """Print the command that a user is likely to want after this one."""
    out.document["next"] = text
    out.field("next", text)
