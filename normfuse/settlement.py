"""What happens where the result of exact passes is not within rounding of its source (:mod:`normfuse.proof`).

Rounding may be all that the outputs show (a network that amplifies it beyond its outputs, bfloat16), or decide between
answers (sorted detections), or be small by chance where it was measured. So the same passes run once more on a float64
copy of the source, where rounding is nine digits below float32: if the outputs agree *there*, the rewrite is right.
A model that does not agree with itself from run to run can be judged by nothing.

What remains is a fault, and raises. It names the pass, found by running ever more of the passes on fresh copies, and
the first layer whose output differs (:mod:`normfuse.divergence`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normfuse import rerun
from normfuse.comparison import Comparison, OutputError
from normfuse.divergence import first_divergence
from normfuse.errors import DeployedModelError, NormfuseError, VerificationError
from normfuse.examples import Examples, Inputs
from normfuse.proof import Proof
from normfuse.report import Report, Verification
from normfuse.rounding import run

LARGEST = 2**30  # bytes of a model in float64, up to which it is folded again there
_LUCK = 10.0  # how much smaller than usual the measured rounding may be where few numbers are returned


@dataclass(frozen=True)
class Passes:
    """The passes of a run, to be run again.

    Attributes:
        names: Of the passes, in order.
        inputs: The example inputs of the run, if it had any.
        source: Returns a fresh copy of the model that they ran on.
        apply: Runs the first so many of them on a model, in place, with example inputs; verified or not.
    """

    names: Sequence[str]
    inputs: Inputs | Examples | None
    source: Callable[[], nn.Module]
    apply: Callable[[nn.Module, int, Inputs | Examples | None, bool], Report]


def verified(proof: Proof, result: nn.Module, passes: Passes) -> Verification:
    """Judge a result against its source.

    Raises:
        VerificationError: It does not compute what the source computes.
    """
    if proof.reason:
        return proof.unverified(proof.reason)
    try:
        errors = proof.errors(result)
    except DeployedModelError as error:
        return proof.unverified(f"the made-up input leads to a part that no run has reached: {error}")
    comparison = proof.comparison(errors)
    if comparison.passed:
        return proof.verification(comparison)
    return _settled(proof, result, passes, errors, comparison)


def _settled(
    proof: Proof, result: nn.Module, passes: Passes, errors: Sequence[OutputError], comparison: Comparison
) -> Verification:
    if not _agrees_with_itself(proof, passes.source()):
        return proof.unverified("the outputs of the model differ from run to run")
    exact = _in_double(proof, passes)
    if exact is not None and exact.verified and (_decides(proof) or all(proof.explains(e, _LUCK) for e in errors)):
        return dataclasses.replace(exact, inputs=proof.shown, origin=proof.origin)
    if all(proof.explains(error) for error in errors):
        share = f"{min(comparison.reference_error, 1.0):.1%}".replace("%", " %")
        return proof.unverified(f"rounding in {comparison.dtype} alone moves the outputs by {share}")
    raise _failure(proof, result, passes, comparison)


def _agrees_with_itself(proof: Proof, source: nn.Module) -> bool:
    """Whether another run of the source returns what the first one did, up to rounding."""
    again = proof.errors(source)
    return not any(error.fault or error.error > proof.ceiling * error.scale for error in again)


def _decides(proof: Proof) -> bool:
    """Whether the model returns integers or truth values: rounding may then change any output by any amount."""
    found = [leaf for one in proof.returned for leaf in one.values() if isinstance(leaf, Tensor)]
    return any(not (leaf.is_floating_point() or leaf.is_complex()) for leaf in found)


def _in_double(proof: Proof, passes: Passes) -> Verification | None:
    """Return what comes of the same passes in float64; None where the model does not run there, or is too large.

    Raises:
        VerificationError: The result is wrong there too.
    """
    twin = passes.source()
    size = 8 * sum(tensor.numel() for tensor in (*twin.parameters(), *twin.buffers()))
    if proof.dtype is torch.float64 or size > LARGEST:
        return None
    samples = [rerun.cast_inputs(sample, torch.float64) for sample in proof.samples]
    try:
        twin = rerun.convert(twin, torch.float64)
        for sample in samples:
            run(twin, sample)
    except Exception:  # a type that forward names, a device or a packed parameter without float64
        return None
    inputs = None if passes.inputs is None else Examples(*samples)
    return passes.apply(twin, len(passes.names), inputs, True).verification


def _failure(proof: Proof, result: nn.Module, passes: Passes, comparison: Comparison) -> VerificationError:
    """Return the error that names the pass and the layer."""
    places = (first_divergence(passes.source(), result, sample) for sample in proof.samples)
    place = next(filter(None, places), None)
    comparison = dataclasses.replace(comparison, diverges_at=place)
    first = f", first at {place}" if place else ""
    text = (
        f"{_culprit(proof, passes)} changed what the model computes{first}: {comparison.failure} (on {proof.shown}). "
        "This is a fault of normfuse: the model is as it was; verify=False returns the wrong result all the same"
    )
    return VerificationError(text, comparison)


def _culprit(proof: Proof, passes: Passes) -> str:
    """Return the name of the pass after which the outputs differ, the passes before it having run."""
    for count, name in enumerate(passes.names, 1):
        trial = passes.source()
        try:
            passes.apply(trial, count, passes.inputs, False)
            if not proof.comparison(proof.errors(trial)).passed:
                return name
        except NormfuseError:
            return name
    return passes.names[-1]
