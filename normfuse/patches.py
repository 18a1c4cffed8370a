"""Methods of a module that were replaced from outside: on the instance, or in the class of a ``torch.nn`` layer.

Libraries that move weights between devices, or count, leave ``module.forward = ...`` behind. Such a module does not do
what its class says, and may do what no class says.
"""

from __future__ import annotations

from torch import nn

_OF_EVERY_MODULE = ("forward", "_call_impl", "_slow_forward", "_wrapped_call_impl")
_HARMLESS = ("train", "eval", "extra_repr", "reset_parameters")


def patched(module: nn.Module) -> str | None:
    """Return the name of a method that the instance has in place of its class's, None where it has none.

    A method of ``nn.Module`` itself counts only if a call runs it.
    """
    for name, value in vars(module).items():
        if callable(value) and (name in _OF_EVERY_MODULE or _is_method(name, type(module))):
            return name
    return None


def _is_method(name: str, kind: type) -> bool:
    classes = (cls for cls in kind.__mro__ if cls is not nn.Module)
    return name not in _HARMLESS and any(callable(vars(cls).get(name)) for cls in classes)


def is_torchs(layer: type[nn.Module]) -> bool:
    """Whether a ``torch.nn`` layer runs the ``forward`` that torch defines, and nobody put another in its class."""
    methods = (getattr(layer, name, None) for name in ("forward", "_conv_forward"))
    globals_of = [getattr(method, "__globals__", {}) for method in methods if method is not None]
    return all(str(held.get("__name__", "torch.")).startswith("torch.") for held in globals_of)
