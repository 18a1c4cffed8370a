"""What to run a model on, where the user does not say.

In order: ``--input``, ``--input-shape``, the inputs stored in the file, ``default_cfg`` (timm) or
``example_input_array`` (Lightning), and at last a guess from the first layer, which is tried and printed as an
assumption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli.arguments import NamedShape
from normfuse.cli.arrays import read_arrays
from normfuse.errors import CaptureError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from normfuse.outputs import Inputs


@dataclass(frozen=True)
class Example:
    """An input that the model was run on.

    Attributes:
        inputs: The input itself.
        origin: Where it comes from, for people.
        assumed: Whether it is a guess.
    """

    inputs: Inputs
    origin: str
    assumed: bool = False


def resolve(
    model: nn.Module,
    *,
    input_file: Path | None,
    input_shapes: Sequence[NamedShape],
    stored: Inputs | None,
    device: str,
    seed: int,
) -> Example:
    """Return an example input, moved to the device and in the precision of the model, on which the model runs.

    Raises:
        CaptureError: The model does not run on what was given, or on anything that could be guessed.
        LoadError: The input file cannot be read.
    """
    import torch

    from normfuse.outputs import describe

    torch.manual_seed(seed)
    tried: list[str] = []
    for example in _candidates(model, input_file, input_shapes, stored):
        inputs = placed(example.inputs, model, device)
        problem = failure(model, inputs)
        if not problem:
            return Example(inputs, example.origin, example.assumed)
        if not example.assumed:
            raise CaptureError(f"the model does not run on {describe(model, inputs)} ({example.origin}): {problem}")
        tried.append(describe(model, inputs))
    guesses = f" ({', '.join(dict.fromkeys(tried))} do not run)" if tried else ""
    raise CaptureError(f"no input is known for this model{guesses}: pass --input-shape 1x3x224x224 or --input FILE")


def _candidates(
    model: nn.Module, input_file: Path | None, shapes: Sequence[NamedShape], stored: Inputs | None
) -> Iterator[Example]:
    """Yield what to try; all but the last given one are assumptions."""
    from normfuse.made_up_inputs import made_up_inputs, maker, parameters_of

    if input_file is not None:
        yield Example(read_arrays(input_file), "--input")
    elif shapes:
        yield Example(from_shapes(shapes, list(parameters_of(model)), maker(model)), "--input-shape")
    elif stored is not None:
        yield Example(stored, "stored in the file")
    else:
        yield from (Example(made.inputs, made.origin, assumed=True) for made in made_up_inputs(model))


def from_shapes(shapes: Sequence[NamedShape], names: Sequence[str], make: Callable[[tuple[int, ...]], Any]) -> Inputs:
    """Return inputs of the given shapes: by name where names are given, by position where not.

    Raises:
        click.UsageError: Some have names and some do not, or the model has no input of that name.
    """
    given = [shape.name for shape in shapes if shape.name is not None]
    unknown = [name for name in given if name not in names]
    if not given or (len(shapes) == 1 and unknown):
        return tuple(make(shape.shape) for shape in shapes)
    if unknown or len(given) != len(shapes):
        raise click.UsageError(f"--input-shape: the inputs of this model are {', '.join(names)}; name each or none")
    return {str(shape.name): make(shape.shape) for shape in shapes}


def from_specification(model: nn.Module, specification: Any) -> Inputs | None:
    """Return inputs as :func:`normfuse.outputs.specification` describes them; None if it does not, or wrongly."""
    import torch

    from normfuse.made_up_inputs import maker, parameters_of

    names, make, made = list(parameters_of(model)), maker(model), {}
    try:
        for entry in specification or ():
            made[entry["name"]] = make(tuple(entry["shape"])).to(getattr(torch, entry["dtype"]))
    except (KeyError, TypeError, AttributeError, RuntimeError):
        return None
    if not made or not set(made) <= set(names):
        return None
    return tuple(made.values()) if list(made) == names[: len(made)] else made


def placed(inputs: Inputs, model: nn.Module, device: str) -> Inputs:
    """Return the inputs on the device, floating-point ones in the precision of the model."""
    from normfuse.outputs import map_tensors
    from normfuse.rerun import main_dtype

    dtype: torch.dtype | None = main_dtype(model)
    return map_tensors(inputs, lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))


def failure(model: nn.Module, inputs: Inputs) -> str:
    """Return why the model does not run on the inputs, in one line; empty if it does."""
    from normfuse.rerun import evaluating, run

    try:
        with evaluating(model):
            run(model, inputs)
    except Exception as error:  # the model's own code may raise anything
        return f"{type(error).__name__}: {_first_line(error)}"
    return ""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
