"""The errors of normfuse.

A :class:`NormfuseError` is the user's to act on: its text is one line that names what is wrong and what to do.
:class:`PassContractError` is deliberately not one of them: it means a bug in a pass, and deserves a stack trace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normfuse.verify import Comparison


def shown(text: str) -> str:
    r"""Return a text with everything that a terminal could obey written out: ``\x1b`` in place of an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class NormfuseError(Exception):
    """Base of every error that the user can act on; its text is one line, whatever names it quotes."""

    def __str__(self) -> str:
        """Return the text, safe to print: names in it may come from a file."""
        return shown(super().__str__())


class CaptureError(NormfuseError):
    """The model could not be read: no reader could follow its forward pass."""


class LoadError(NormfuseError):
    """A model file was refused: unknown format, damaged, unsafe, or not what was asked for."""


class CalibrationError(NormfuseError):
    """Calibration data that no statistic can be taken of: it holds values that are not finite."""


class LoweringError(NormfuseError):
    """The model could not be written as ONNX or as an engine."""


class RequirementError(NormfuseError):
    """A requirement that the user stated (such as ``--require-fold``) is not met."""


class VerificationError(NormfuseError):
    """The result does not reproduce the source within the tolerance.

    Attributes:
        comparison: The :class:`normfuse.Comparison` that failed.
    """

    def __init__(self, message: str, comparison: Comparison | None = None) -> None:
        super().__init__(message)
        self.comparison = comparison


class MissingDependencyError(NormfuseError, ImportError):
    """An optional package is not installed; the text is the command that installs it."""


class DeployedModelError(NormfuseError):
    """A folded model was asked to do what only the unfolded model can: to train, or to run a part no example ran."""


class TuneModeError(NormfuseError, RuntimeError):
    """A layer in Tune mode was used in a way that would give a wrong value, or lose statistics, without a word."""


class OrderError(NormfuseError):
    """A step was asked for out of order: the text says which one must come first (:mod:`normfuse.order`)."""


class PassContractError(Exception):
    """A pass broke its contract: a bug in the pass, not in the user's model."""
