"""What each :class:`normfuse.Reason` means and what can be done: the text of ``docs/reference/reasons.md``."""

from __future__ import annotations

from normfuse.base import Reason

EXPLANATIONS: dict[Reason, tuple[str, str]] = {
    Reason.SHARED_MODULE: (
        "A layer that would absorb the norm is called more than once, and not every call is followed by the same norm.",
        "Pass `duplicate_shared=True` (`--duplicate-shared`): each call gets weights of its own.",
    ),
    Reason.SHARED_PARAMETER: (
        "A weight that would absorb the norm belongs to more than one module (tied weights), or other code reads it.",
        "Pass `duplicate_shared=True`, which unties a tied one.",
    ),
    Reason.EXTRA_CONSUMER: (
        "The value the norm reads is also read elsewhere, or is an output of the model, so it must not change.",
        "Nothing, unless the other reader can go: the norm is needed where it is.",
    ),
    Reason.BATCH_STATISTICS: (
        "The norm has no fixed map: it has no running statistics, is called with `training=True`, or was put in "
        "training mode inside a model in eval mode.",
        "Call `.eval()` on it, or estimate running statistics from data.",
    ),
    Reason.NONZERO_PADDING: (
        "A shift would meet zeros that a layer pads with: exact inside, wrong at the border.",
        "Nothing, for a padded convolution after the norm; a separate constant-pad layer lets the shift pass.",
    ),
    Reason.RANK_UNKNOWN: (
        "The capture without inputs has no shapes, and the route needs them.",
        "Pass `example_inputs` (`--input-shape`).",
    ),
    Reason.AXIS: (
        "The norm works along another axis than the layer that would absorb it, or an operation mixes values that "
        "would need different maps (`BatchNorm1d` on the `(N, C, L)` output of a `Linear`).",
        "Nothing: it is not the same function.",
    ),
    Reason.FORWARD_OVERRIDDEN: (
        "The layer's class overrides `forward`, and what it does cannot be read without running it; or a norm's "
        "`forward` was replaced on the instance, and would be lost with the norm.",
        "Pass `example_inputs`, so that its calls are recorded; undo the patch (`del norm.forward`).",
    ),
    Reason.PARAMETRIZED: (
        "The weight is computed from other tensors (weight norm, spectral norm, any parametrization).",
        "Run the pass `materialize` first; `normfuse.fold` does.",
    ),
    Reason.HAS_HOOKS: (
        "A hook on a layer of the route, on the norm or around every module would see other values than before, or "
        "would be lost with the norm.",
        "Remove the hook first.",
    ),
    Reason.HELD_ELSEWHERE: (
        "The model also holds the layer, or a weight that would change, where nothing else can be put: in a closure, a "
        "bound method, a `functools.partial`, a set or a weak reference, which would go on with the old one. Lists, "
        "dictionaries, tuples and attributes are followed.",
        "Hold it in a list, a dictionary or an attribute, or look it up in the model at each call.",
    ),
    Reason.QUANTIZED: ("The weight is quantized.", "Fold before quantizing."),
    Reason.DTYPE: ("The weight is not a real floating-point tensor, or the route converts to integers.", "Nothing."),
    Reason.RANGE: (
        "A folded value is finite but does not fit the dtype of the weight (float16 ends at 65504).",
        "Fold in float32, convert afterwards and look at the range report.",
    ),
    Reason.ASKED: (
        "The code of the model reads an attribute of the norm, or asks for its class, and nothing that could stand in "
        "its place would answer the same. Numbers, and types, devices and shapes of its tensors, are answered.",
        "Let the code ask another layer, or read it once in `__init__`.",
    ),
    Reason.NOT_REACHED: (
        "No example reached the layer, and where it stands it could be given a value that a fold changed. The folded "
        "model raises `DeployedModelError` if it runs.",
        "Pass several examples that run every part you use; `del layer.forward` lifts the guard at your own risk.",
    ),
    Reason.PARTIAL_CAPTURE: (
        "Only parts of the model could be traced, so a caller outside of them may be unseen.",
        "Pass `example_inputs`: recording a run reads any model that runs.",
    ),
    Reason.UNSUPPORTED_LAYER: (
        "The norm computes its statistics from its own input, so no fixed map exists, or its class is not known.",
        "Its gain and shift may still move: pass `fold-affine`, which `normfuse.fold` runs.",
    ),
    Reason.OPAQUE_OPERATION: (
        "An operation on the route, named in the detail, lets no such map pass.",
        "Nothing, unless the operation can go.",
    ),
    Reason.SIGN: (
        "A scale that is negative cannot pass a ReLU or a maximum, which it would turn around.",
        "Nothing: the gain was learned that way.",
    ),
    Reason.NO_BIAS: (
        "The layer that would absorb the shift has its own `forward`, which adds no bias.",
        "Give the layer a bias of zeros.",
    ),
    Reason.NOT_CHEAPER: (
        "The rewrite is legal, but the result would do more work or hold more values than before.",
        "Nothing.",
    ),
    Reason.EXCLUDED: ("The user left the layer out with `include` or `exclude`.", "Change the globs."),
    Reason.UNINITIALIZED: ("A lazy layer has not seen an input yet.", "Run the model once, or pass `example_inputs`."),
    Reason.NONFINITE: ("A folded value would be NaN or infinite.", "Look for damaged statistics or weights."),
    Reason.NO_PRODUCER: ("The norm reads the input of the model: there is nothing before it.", "Nothing."),
    Reason.POST_NORM: (
        "A norm writes to the residual stream (post-norm, or a norm behind the embedding): its gain and shift "
        "leave a mean over the channels that no weights before it can take out.",
        "Nothing: where norms stand is part of the architecture. A BatchNorm there may fold with `fold-bn` first.",
    ),
}


def page() -> str:
    """Return ``docs/reference/reasons.md``."""
    head = "# Reasons\n\nWhy a rewrite was refused: the members of `normfuse.Reason`, in reports as `reason`.\n"
    parts = [f"## `{r.name}`\n\n*{r.value}.* {what}\n\n{remedy}\n" for r, (what, remedy) in EXPLANATIONS.items()]
    return "\n".join([head, *parts])
