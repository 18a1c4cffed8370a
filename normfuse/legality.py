"""Whether a plan may be carried out: nothing outside it reads or watches what it changes, and every value fits.

:func:`finish` asks every question and returns the new tensors, so that carrying a plan out is assignment alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from normfuse import absorption
from normfuse.absorbers import Absorber
from normfuse.affine import AffineMap
from normfuse.base import Reason, Refused
from normfuse.graph import ModelGraph, global_hook, has_hooks, is_uninitialized
from normfuse.holders import Holder
from normfuse.operations import describe
from normfuse.patches import patched

if TYPE_CHECKING:
    from normfuse.routes import Plan


def finish(plan: Plan, graph: ModelGraph) -> dict[str, Tensor]:
    """Return the new tensors, by name and in float64, that carry out a plan.

    Raises:
        Refused: An absorber is shared, tied, parametrized, hooked or of another dtype, its calls disagree, or a new
            value leaves the range of its dtype.
    """
    if graph.partial:
        hint = "pass example_inputs"
        raise Refused(Reason.PARTIAL_CAPTURE, "only parts of the model could be traced, callers may be unseen", hint)
    require_unwatched(plan, graph)
    for node in plan.pads:
        require_replaceable(str(node.target), graph)
    tensors: dict[str, Tensor] = {}
    for (absorber, side), calls in plan.maps.items():
        _require_own(absorber, calls, graph)
        maps = list(calls.values())
        absorb = absorption.absorb_output if side == "output" else absorption.absorb_input
        new = absorb(absorber, maps[0], graph)
        if not all(m.equals(maps[0]) for m in maps[1:]):
            hint = _DUPLICATE if len({node.meta.get("run") for node in calls}) < len(calls) else ""
            text = f"{absorber.name} is called {len(calls)} times, and its calls would need different weights"
            raise Refused(Reason.SHARED_MODULE, text, hint)
        if tensors.keys() & new.keys():
            raise Refused(Reason.SHARED_MODULE, f"{absorber.name} would take a map on both sides")
        tensors |= new
    for name, value in tensors.items():
        require_in_range(name, value, graph)
    return tensors


def require_unwatched(plan: Plan, graph: ModelGraph) -> None:
    """Refuse where a hook, of a layer on the route or of a block around it, would see a value that changes.

    Raises:
        Refused: There is one.
    """
    for node in plan.passed:
        require_no_hooks(str(node.target) if node.op == "call_module" else None, graph)
    for call in graph.hooked_calls:
        if not plan.changed.isdisjoint((*call.inputs, *call.outputs)):
            require_no_hooks(call.name, graph)


_DUPLICATE = "pass duplicate_shared=True"
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
_HOLD = "hold it in a list, a dictionary or an attribute"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _require_own(absorber: Absorber, calls: dict[fx.Node, AffineMap], graph: ModelGraph) -> None:
    """Refuse an absorber that anything outside the plan reads or changes."""
    require_plain(absorber, graph)
    for name in filter(None, (absorber.weight, absorber.bias)):
        require_not_frozen(name, graph)
        if len(graph.owners(name)) > 1:
            others = ", ".join(other for other in graph.owners(name) if other != name)
            raise Refused(Reason.SHARED_PARAMETER, f"{name} is also {others}", _DUPLICATE)
        uses = graph.uses(name)
        constant = absorber.kind in ("addend", "factor")
        readers = [node for node in uses if node not in calls] if not constant else uses[len(calls) :]
        if readers:
            raise _shared(name, absorber, readers, graph)


def _shared(name: str, absorber: Absorber, readers: list[fx.Node], graph: ModelGraph) -> Refused:
    """Return the refusal of a tensor that code outside of the plan reads."""
    runs = {node.meta.get("run") for node in graph.uses(name)}
    if len(runs) == len(graph.uses(name)) > 1:
        return Refused(Reason.SHARED_MODULE, f"{absorber.name} is used in another way by another example")
    sites = set(graph.call_sites(absorber.owner))
    if sites.issuperset(graph.uses(name)):
        return Refused(Reason.SHARED_MODULE, f"{absorber.name} is called {len(sites)} times", _DUPLICATE)
    return Refused(Reason.SHARED_PARAMETER, f"{name} is also read by {describe(readers[0], graph).label}")


def require_plain(absorber: Absorber, graph: ModelGraph) -> None:
    """Refuse an absorber whose weight is computed, watched by a hook, without values, or of another dtype."""
    owner, _, attribute = absorber.weight.rpartition(".")
    module = graph.module(owner)
    if nn.utils.parametrize.is_parametrized(module) or attribute not in module._parameters:
        if attribute not in module._buffers and attribute not in vars(module):
            hint = "the materialize pass makes it plain"
            raise Refused(Reason.PARAMETRIZED, f"{absorber.weight} is computed from other tensors", hint)
        require_saved(absorber.weight, graph)
    if is_uninitialized(module):
        raise Refused(Reason.UNINITIALIZED, f"{owner or 'the model'} has no values yet", "run the model once")
    require_no_hooks(owner, graph)
    tensor = graph.tensor(absorber.weight)
    if tensor.is_quantized or _computes_differently(tensor):
        detail = f"{absorber.weight} is stored as {type(tensor).__name__}, not as plain numbers"
        raise Refused(Reason.QUANTIZED, detail, "fold before quantizing")
    if tensor.dtype not in _FLOATS:
        raise Refused(Reason.DTYPE, f"{absorber.weight} is {tensor.dtype}")


def _computes_differently(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that stores its values in a way of its own, as quantized weights are."""
    return getattr(type(tensor), "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None)


def require_saved(name: str, graph: ModelGraph) -> None:
    """Refuse a tensor that is no part of the model's ``state_dict``: a new value would be lost with the file.

    Raises:
        Refused: It is a buffer that is not persistent, or a plain attribute.
    """
    owner, _, attribute = name.rpartition(".")
    module = graph.module(owner)
    held = attribute in module._parameters or attribute in module._buffers
    if not held or attribute in module._non_persistent_buffers_set:
        raise Refused(Reason.PARAMETRIZED, f"{name} is not saved with the model, but made anew")


def require_no_hooks(name: str | None, graph: ModelGraph) -> None:
    """Refuse a module, if one is named, whose hooks would see other values after a rewrite.

    Raises:
        Refused: It has one.
    """
    if name is None:
        return
    if (hook := global_hook()) is not None:
        text = (
            f"{getattr(hook, '__qualname__', type(hook).__name__)}, a hook around every module, would see other values"
        )
        raise Refused(Reason.HAS_HOOKS, text, "remove it first")
    if has_hooks(graph.module(name)) and not is_uninitialized(graph.module(name)):  # a lazy layer has hooks of its own
        raise Refused(Reason.HAS_HOOKS, f"a hook on {name or 'the model'} would see other values", "remove it first")


def require_replaceable(name: str | None, graph: ModelGraph) -> None:
    """Refuse to replace a module, if one is named, that has hooks or other methods, or is held where no other fits.

    Raises:
        Refused: It has one, or is.
    """
    require_no_hooks(name, graph)
    module = graph.module(name) if name is not None else None
    if name is None or module is None:
        return
    if (method := patched(module)) is not None:
        text = f"{name}.{method} was replaced on the instance, which would be lost with the layer"
        raise Refused(Reason.FORWARD_OVERRIDDEN, text, f"del {name}.{method}, or what its library undoes it with")
    if any(vars(module).get(table) for table in _STATE_HOOKS) and not is_uninitialized(module):
        raise Refused(Reason.HAS_HOOKS, f"a hook on the state dict of {name} would be lost with it", "remove it first")
    if (holder := graph.holders.frozen(module)) is not None:
        raise _held_elsewhere(name, holder)


def require_not_frozen(name: str, graph: ModelGraph) -> None:
    """Refuse to give a parameter or buffer another value where the old tensor is held and would stay.

    Raises:
        Refused: It is.
    """
    owner, _, attribute = name.rpartition(".")
    tensor = getattr(graph.module(owner), attribute, None)
    if isinstance(tensor, Tensor) and (holder := graph.holders.frozen(tensor)) is not None:
        raise _held_elsewhere(name, holder)


def _held_elsewhere(name: str, holder: Holder) -> Refused:
    return Refused(Reason.HELD_ELSEWHERE, f"{name} is also held by {holder.name}, which keeps it", _HOLD)


def require_in_range(name: str, value: Tensor, graph: ModelGraph) -> None:
    """Refuse a new value that is not finite, or not in the dtype the tensor has.

    Raises:
        Refused: It is one of them.
    """
    owner, _, attribute = name.rpartition(".")
    old = getattr(graph.module(owner), attribute, None)
    like = old if isinstance(old, Tensor) else next(iter(graph.module(owner).parameters(recurse=False)))
    ends = torch.stack(value.aminmax()) if value.numel() else value
    if not bool(torch.isfinite(ends).all()):
        raise Refused(Reason.NONFINITE, f"{name} would hold NaN or infinity")
    if not bool(torch.isfinite(ends.to(like.dtype)).all()):
        largest = float(ends.abs().max())
        raise Refused(Reason.RANGE, f"{name} would reach {largest:.3g}, beyond {like.dtype}", "fold in float32")
