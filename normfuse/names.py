r"""Names of modules, parameters and tensors: which are plain, and how any text from a file is shown.

A name that comes from a file ends up where it can do harm: ``torch.fx`` and the exporters paste it into generated
Python between double quotes, terminals obey control characters in it. So the parts of a name, between its dots, are
*words*: letters and digits of any script, and a few signs that mean nothing in Python, in a shell or on a terminal.
No quotes, no backslashes, no brackets, no line separators of Unicode, no control or formatting characters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from normfuse.errors import NormfuseError, shown

if TYPE_CHECKING:
    from torch import nn

SIGNS = frozenset("_-+@:=~#/, ")
"""What may stand in a word beside letters and digits: some keys of a ``ModuleDict`` are ``layer-1`` or ``up/0``."""

LONGEST = 1000
"""Characters in a qualified name; Python itself nests no deeper than that."""


def is_word(part: str) -> bool:
    """Whether one part of a qualified name is a plain word, and not one that Python keeps for itself."""
    dunder = part.startswith("__") and part.endswith("__")
    return bool(part) and not dunder and all(sign.isalnum() or sign in SIGNS for sign in part)


def is_plain(name: str) -> bool:
    """Whether every part of a qualified name, ``"layer1.0.conv"``, is a plain word; the root's, ``""``, is."""
    return not name or (len(name) <= LONGEST and all(map(is_word, name.split("."))))


def require_plain(name: object, what: str, error: type[NormfuseError] = NormfuseError) -> None:
    """Refuse a name that could be taken for anything but a name.

    Args:
        name: The name; anything but a text is refused too.
        what: What bears it, for the error: ``"a module in x.pt"``.
        error: The kind of error to raise.

    Raises:
        NormfuseError: It is not plain; of the kind that was asked for.
    """
    if not isinstance(name, str) or not is_plain(name):
        text = shown(str(name))[:80]
        raise error(f"{what} is called {text!r}: a name has letters, digits and {' '.join(sorted(SIGNS)).strip()} only")


def require_plain_names(model: nn.Module, what: str, error: type[NormfuseError] = NormfuseError) -> None:
    """Refuse a model that holds a module, parameter or buffer whose name is not plain.

    Raises:
        NormfuseError: There is one; of the kind that was asked for.
    """
    for module in model.modules():
        for table in (module._modules, module._parameters, module._buffers):
            for name in table.keys():  # noqa: SIM118 - those of TorchScript are no dictionaries
                if not (isinstance(name, str) and "." not in name and is_word(name)):
                    require_plain("" if name == "" else name, f"a part of {what}", error)
                    raise error(f"a part of {what} is called {shown(str(name))!r}, which is no name of a part")
