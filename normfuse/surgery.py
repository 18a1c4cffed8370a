"""The only code that edits a module: assign tensors, replace a child, change a class; and do it all again from a log.

Each structural edit is a plain dictionary (an *edit*), so that the structure of a folded model can be rebuilt on a
fresh one of the same architecture without unpickling code. A replacement module is described by a *spec*:

    {"class": "torch.nn.modules.conv.Conv2d", "kwargs": {...}}   a new module of one of the classes below
    {"ref": "layer1.0.act"}                                      a module the model has, under its present name
    {"sequential": [spec, ...]}                                  an nn.Sequential of those

What is replaced is replaced wherever the model holds it, also outside of the module tree (:mod:`normfuse.holders`).
"""

from __future__ import annotations

import collections
import copy as copying
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normfuse import computed
from normfuse.holders import Holders
from normfuse.layers.padding import note_padding
from normfuse.names import require_plain

Spec = Mapping[str, Any]
Edit = dict[str, Any]

IDENTITY: Spec = {"class": "torch.nn.modules.linear.Identity", "kwargs": {}}
_CONVS = tuple(f"torch.nn.modules.conv.Conv{t}{n}d" for t in ("", "Transpose") for n in (1, 2, 3))
_PRODUCTS = ("Linear", "Conv1d", "Conv2d")
BUILDABLE = frozenset((*_CONVS, "torch.nn.modules.linear.Identity", "torch.nn.modules.linear.Linear",
                       "torch.nn.modules.sparse.Embedding", "torch.nn.modules.normalization.RMSNorm",
                       "normfuse.layers.rms_norm.RMSNorm", "normfuse.layers.unified_norm.UnifiedNorm",
                       *(f"normfuse.layers.l1_batch_norm.L1BatchNorm{n}d" for n in (1, 2, 3)),
                       "normfuse.layers.l1_layer_norm.L1LayerNorm", "normfuse.layers.l1_layer_norm.L1RMSNorm",
                       "normfuse.layers.deployed.Zero", "normfuse.layers.deployed.FirstArgument",
                       "normfuse.layers.deployed.ChannelPad", "normfuse.layers.deployed.CallSites",
                       "normfuse.layers.deployed.ChannelClamp", "normfuse.layers.deployed.Placeholder",
                       "normfuse.layers.deployed.OneRank",
                       *(f"normfuse.quantization.modules.ShiftQuant{kind}" for kind in _PRODUCTS),
                       *(f"normfuse.quantization.calibrated.Calibrated{kind}" for kind in _PRODUCTS),
                       "normfuse.quantization.quantizing_layer.Precision",
                       "timm.layers.conv2d_same.Conv2dSame"))  # fmt: skip


def copy(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model, also of one that holds what ``copy.deepcopy`` refuses.

    That is computed tensors, and the buffers of a lazy norm before its first call.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, nn.parameter.UninitializedBuffer):
                memo[id(value)] = type(value)(device=value.device, dtype=value.dtype)  # type: ignore[call-arg]
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copying.deepcopy(model, memo)


# tensors


def assign(
    module_of: Callable[[str], nn.Module], tensors: Mapping[str, Tensor], holders: Holders | None = None
) -> None:
    """Give parameters and buffers new values by qualified name, cast once to the dtype they have.

    A parameter stays a parameter with its ``requires_grad``, device and memory format; one that is None is created.
    The old tensor object is replaced, there and by its ``holders``, and not written, so nothing that shares it changes.
    """
    for name, value in tensors.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = module_of(owner_name)
        old = _held(owner, attribute)
        like = old if isinstance(old, Tensor) else next(iter(owner.parameters(recurse=False)))
        new = torch.empty_like(like.detach()) if like.shape == value.shape else like.new_empty(value.shape)
        new.copy_(value.detach())
        if isinstance(old, Tensor) and attribute in owner._buffers:
            owner._buffers[attribute] = new
        else:
            new = nn.Parameter(new, requires_grad=like.requires_grad)
            setattr(owner, attribute, new)
        if isinstance(old, Tensor) and holders is not None:
            holders.replace(old, new)


def _held(owner: nn.Module, attribute: str) -> object:
    """Return what a module holds under a name; an attribute of the class may answer for a buffer with another value."""
    return owner._buffers[attribute] if attribute in owner._buffers else getattr(owner, attribute, None)


# structure


def module_names(root: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return every qualified name of each module, by ``id``; the first is the one nodes use."""
    names: dict[int, list[str]] = collections.defaultdict(list)
    for name, module in root.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    return {key: tuple(value) for key, value in names.items()}


def perform(root: nn.Module, edit: Edit, holders: Holders | None = None) -> None:
    """Carry out one structural edit on a model.

    Args:
        root: The model.
        edit: What to do.
        holders: Who holds its modules outside of the module tree; looked for if None.

    Raises:
        ValueError: The edit is of a kind, or builds a class, that is not known.
        NormfuseError: A name in it is not plain.
    """
    if edit.get("op") not in _EDITS:
        raise ValueError(f"unknown edit {edit.get('op')!r}")
    for name in _names_in(edit):
        require_plain(name, "a part that an edit is about")
    if "path" not in edit:
        _EDITS[edit["op"]](root, edit)
        return
    holders = Holders(root) if holders is None else holders
    old = root.get_submodule(edit["path"])
    _EDITS[edit["op"]](root, edit)
    new = root.get_submodule(edit["path"])
    if new is not old:
        holders.replace(old, new)


def _names_in(edit: Any) -> Iterator[Any]:
    """Yield what an edit, which may come from a file, calls parts of the model, old and new."""
    if isinstance(edit, (list, tuple)):
        for item in edit:
            yield from _names_in(item)
    elif isinstance(edit, Mapping):
        for key, value in edit.items():
            if key in ("path", "tensor", "to", "ref"):
                yield value
            elif key in ("tensors", "attributes") and isinstance(value, Mapping):
                yield from value
            yield from _names_in(value)


def replay(root: nn.Module, edits: Iterable[Edit]) -> None:
    """Carry out the structural edits of a folded model's manifest on a fresh model of the same architecture."""
    holders = Holders(root)
    for edit in edits:
        perform(root, edit, holders)


def chain(names: Iterable[str]) -> Spec:
    """Return the spec of modules that the model has, one after the other."""
    refs: list[Edit] = [{"ref": name} for name in names]
    return IDENTITY if not refs else refs[0] if len(refs) == 1 else {"sequential": refs}


def build(root: nn.Module, spec: Spec) -> Any:
    """Return the module that a spec describes, or the record of a module's settings.

    Raises:
        ValueError: The spec names a class that edits do not build.
    """
    if "ref" in spec:
        return root.get_submodule(spec["ref"])
    if "sequential" in spec:
        return nn.Sequential(*(build(root, part) for part in spec["sequential"]))
    if spec["class"] not in BUILDABLE:
        raise ValueError(f"an edit cannot build {spec['class']!r}")
    kwargs = {k: build(root, v) if isinstance(v, dict) else _lists_to_tuples(v) for k, v in spec["kwargs"].items()}
    built = _class(spec["class"])(**kwargs)
    if isinstance(built, nn.Module):
        built.training = False
    return built


def _lists_to_tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _replace(root: nn.Module, edit: Edit) -> None:
    old = root.get_submodule(edit["path"])
    new = build(root, edit["module"])
    tensors = itertools.chain(old.parameters(), old.buffers(), root.parameters())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if like is not None:
        _like(new, edit["module"], like)
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _like(module: nn.Module, spec: Spec, tensor: Tensor) -> None:
    if "class" in spec:
        module.to(device=tensor.device, dtype=tensor.dtype)
    for part, child in zip(spec.get("sequential", ()), module.children(), strict=False):
        _like(child, part, tensor)


def _retype(root: nn.Module, edit: Edit) -> None:
    if edit["class"] not in BUILDABLE:
        raise ValueError(f"an edit cannot build {edit['class']!r}")
    module = root.get_submodule(edit["path"])
    module.__class__ = _class(edit["class"])
    for name, spec in edit.get("attributes", {}).items():
        setattr(module, name, build(root, spec))


def _materialize(root: nn.Module, edit: Edit) -> None:
    computed.make_plain(root.get_submodule(edit["path"]), edit["tensor"])


def _untie(root: nn.Module, edit: Edit) -> None:
    owner_name, _, attribute = edit["tensor"].rpartition(".")
    owner = root.get_submodule(owner_name)
    old = getattr(owner, attribute)
    owner._parameters[attribute] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)


def _tie(root: nn.Module, edit: Edit) -> None:
    """Let one module hold the parameter of another."""
    owner_name, _, attribute = edit["tensor"].rpartition(".")
    root.get_submodule(owner_name)._parameters[attribute] = root.get_parameter(edit["to"])


def _drop(root: nn.Module, edit: Edit) -> None:
    """Set a parameter to None: the gain or shift of a norm that moved into its neighbour."""
    owner_name, _, attribute = edit["tensor"].rpartition(".")
    root.get_submodule(owner_name).register_parameter(attribute, None)


def _resize(root: nn.Module, edit: Edit) -> None:
    """Give a layer other numbers of channels: attributes that say them, and tensors of other shapes, without values."""
    module = root.get_submodule(edit["path"])
    if not _SIZES.issuperset(edit["attributes"]):
        raise ValueError(f"an edit cannot set {sorted(set(edit['attributes']) - _SIZES)}")
    for name, size in edit["attributes"].items():
        setattr(module, name, int(size))
    for name, shape in edit["tensors"].items():
        old = _held(module, name)
        like = old if isinstance(old, Tensor) else next(module.parameters(recurse=False))
        new = like.detach().new_empty(shape)
        if name in module._buffers:
            module._buffers[name] = new
        else:
            module._parameters[name] = nn.Parameter(new, requires_grad=like.requires_grad)


_SIZES = frozenset({"in_channels", "out_channels", "in_features", "out_features", "num_features"})


def _count_calls(root: nn.Module, edit: Edit) -> None:
    from normfuse.layers.deployed import reset_calls

    if reset_calls not in root._forward_pre_hooks.values():
        root.register_forward_pre_hook(reset_calls)


def _separate(root: nn.Module, edit: Edit) -> None:
    """Make a ``nn.TransformerEncoderLayer`` call its norms: in eval mode it computes LayerNorm on their parameters."""
    layer: Any = root.get_submodule(edit["path"])
    layer.activation_relu_or_gelu = 0
    for parent in root.modules():
        if isinstance(parent, nn.TransformerEncoder) and any(child is layer for child in parent.layers):
            parent.use_nested_tensor = False


def _guard(root: nn.Module, edit: Edit) -> None:
    """Let a layer that no example reached raise instead of running; its class and tensors stay."""
    from normfuse.layers.deployed import NotReached

    vars(root.get_submodule(edit["path"]))["forward"] = NotReached(edit["path"])


def _tie_calls(root: nn.Module, edit: Edit) -> None:
    from normfuse.layers.tied_calls import tie_calls

    of_norm, of_layer = map(int, edit["calls"])
    tie_calls(root, edit["path"], edit["to"], (of_norm, of_layer), led=bool(edit.get("led")))


_EDITS: dict[str, Callable[[nn.Module, Edit], None]] = {
    "replace": _replace,
    "retype": _retype,
    "materialize": _materialize,
    "untie": _untie,
    "tie": _tie,
    "drop": _drop,
    "count_calls": _count_calls,
    "note_padding": lambda root, edit: note_padding(root),
    "resize": _resize,
    "separate": _separate,
    "guard": _guard,
    "tie_calls": _tie_calls,
}
