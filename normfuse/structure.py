"""What a model is made of, remembered, so that it can be put back: all or nothing for whoever edits a model in place.

Remembered is every module with its class and attributes, and the content of every dictionary, list, set and deque that
it holds, nested ones as well: children, parameters, buffers, hooks, modes, and what a model keeps outside of
``torch.nn``'s own tables; of other objects, where they hold a layer or a weight (:mod:`normfuse.holders`). Tensors are
held by reference and cost nothing, as an edit assigns new tensors and leaves the old ones as they are
(:func:`normfuse.surgery.assign`); those that are written in place are named, and copied.
"""

from __future__ import annotations

import collections
import contextlib
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normfuse.holders import Holders

_WALKED = (nn.Module, dict, list, set, collections.deque, tuple)


class Structure:
    """The structure of a model at one moment.

    Args:
        model: Any module.
        written: Tensors whose values are remembered too, for edits that write into them.
        holders: Whether other objects are looked through as well, for edits that replace layers there.
    """

    def __init__(self, model: nn.Module, written: Iterable[Tensor] = (), *, holders: bool = True) -> None:
        self._classes: list[tuple[nn.Module, type]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._remember(model)
        self._places = [(holder, holder.value) for holder in Holders(model).places()] if holders else []
        self._trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._values = [(tensor, tensor.detach().clone()) for tensor in written if not is_lazy(tensor)]

    def _remember(self, model: nn.Module) -> None:
        """Walk over the modules and containers that the model holds, each once, however deeply they are nested."""
        found, seen = collections.deque[Any]([model]), set[int]()
        while found:
            value = found.popleft()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, nn.Module):
                self._classes.append((value, type(value)))
                found.append(vars(value))
                continue
            if not isinstance(value, tuple):
                self._contents.append((value, _content(value)))
            items = value.values() if isinstance(value, dict) else value
            found.extend(item for item in items if isinstance(item, _WALKED))

    @contextlib.contextmanager
    def for_a_moment(self, model: nn.Module) -> Iterator[None]:
        """Run a block with the model as it was, and give it afterwards the structure back that it has now."""
        now = Structure(model)
        self.put_back()
        try:
            yield
        finally:
            now.put_back()

    def put_back(self) -> None:
        """Make the model what it was: the same objects, in the same places and of the same classes."""
        for module, cls in self._classes:
            if type(module) is not cls:
                module.__class__ = cls
        for container, content in self._contents:
            _refill(container, content)
        for holder, value in self._places:
            if holder.value is not value:
                holder.give(value)
        for parameter, trained in self._trained:
            if parameter.requires_grad is not trained:
                parameter.requires_grad_(trained)
        for tensor, value in self._values:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(value)


def _content(container: Any) -> tuple[list[Any], list[Any]]:
    """Return the items of a container in order, of a dictionary its keys and its values."""
    return list(container), list(container.values()) if isinstance(container, dict) else []


def _refill(container: Any, content: tuple[list[Any], list[Any]]) -> None:
    """Give a container the items back that it held; one that holds them still is not touched."""
    if not container and not content[0]:
        return
    if all(_identical(now, before) for now, before in zip(_content(container), content, strict=True)):
        return
    container.clear()
    if isinstance(container, dict):
        container.update(zip(*content, strict=True))
    else:
        (container.update if isinstance(container, set) else container.extend)(content[0])


def _identical(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


@contextlib.contextmanager
def restored_on_error(model: nn.Module, written: Iterable[Tensor] = ()) -> Iterator[Structure]:
    """Run a block that edits a model in place; whatever leaves it by an error leaves the model as it was before.

    Args:
        model: The model.
        written: The tensors that the block writes into, where it does not assign new ones.
    """
    before = Structure(model, written)
    try:
        yield before
    except BaseException:
        before.put_back()
        raise
