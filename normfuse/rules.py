"""How a per-channel map passes each operation: one table for both directions.

Backwards, a rule turns the map ``wanted`` on the output of an operation into maps on its inputs; there may be several
ways, tried in order. Forwards, it turns a map on one input into the map on the output. A rule raises :class:`Refused`
where no exact way exists; any other error, on arguments that nobody foresaw, becomes a refusal too. The rules are in
:mod:`normfuse.passing` (one value) and :mod:`normfuse.joining` (several); what absorbs a map (convolutions and the
like) is in :mod:`normfuse.absorbers`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import fx

from normfuse.affine import AffineMap
from normfuse.base import Reason, Refused
from normfuse.graph import ModelGraph
from normfuse.joining import JOINING, Way
from normfuse.operations import Operation
from normfuse.passing import PASSING, opaque


def backward(node: fx.Node, operation: Operation, wanted: AffineMap, graph: ModelGraph) -> list[Way]:
    """Return the ways to make an operation's output carry ``wanted``: lists of ``(input, map)``.

    Raises:
        Refused: There is none; the detail names the operation.
    """
    with _named(operation):
        if operation.name in JOINING:
            return JOINING[operation.name][0](node, operation, wanted, graph)
        if operation.name not in PASSING:
            raise opaque(operation)
        return [[(operation.inputs[0], PASSING[operation.name](node, operation, wanted, graph, False))]]


def forward(node: fx.Node, operation: Operation, origin: fx.Node, given: AffineMap, graph: ModelGraph) -> AffineMap:
    """Return the map on an operation's output when its input ``origin`` carries ``given``.

    Raises:
        Refused: There is none; the detail names the operation.
    """
    with _named(operation):
        if operation.name in JOINING:
            return JOINING[operation.name][1](node, operation, origin, given, graph)
        if operation.name not in PASSING or origin is not operation.inputs[0]:
            raise opaque(operation)
        return PASSING[operation.name](node, operation, given, graph, True)


@contextlib.contextmanager
def _named(operation: Operation) -> Iterator[None]:
    """Turn any error of a rule into a refusal that names the operation: a fold never fails for one that it can leave.

    Raises:
        Refused: The rule's own, or that the operation cannot be followed.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        text = f"{operation.label or operation.name} cannot be followed ({type(error).__name__})"
        raise Refused(Reason.OPAQUE_OPERATION, text) from error
