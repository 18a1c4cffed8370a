"""What to run a model on, where the user does not say.

In order: ``--input``, ``--input-shape``, the inputs stored in the file, ``default_cfg`` (timm) or
``example_input_array`` (Lightning), and at last a guess from the first layer, which is tried and printed as an
assumption.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli.arguments import NamedShape
from normfuse.errors import CaptureError, LoadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from normfuse.outputs import Inputs

SIZES = (224, 32, 64, 128, 299, 28, 256, 512)
LENGTHS = (224, 32, 64, 128, 299, 1024, 16000)
VOLUMES = ((16, 112, 112), (32, 32, 32), (8, 64, 64), (16, 224, 224))
TOKENS = 16


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
    if input_file is not None:
        yield Example(read_arrays(input_file), "--input")
    elif shapes:
        yield Example(from_shapes(shapes, list(_parameters(model)), _maker(model)), "--input-shape")
    elif stored is not None:
        yield Example(stored, "stored in the file")
    else:
        for config in ("pretrained_cfg", "default_cfg"):
            size = setting(getattr(model, config, None), "input_size")
            if size:
                yield Example(_normal(1, *size), f"the model's {config}", assumed=True)
        if getattr(model, "example_input_array", None) is not None:
            yield Example(model.example_input_array, "the model's example_input_array", assumed=True)  # type: ignore[arg-type]
        yield from _guesses(model)


def setting(config: Any, key: str) -> Any:
    """Return an entry of a model's configuration, a dictionary or an object; None where there is none."""
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)


def read_arrays(path: Path) -> Inputs:
    """Return the arrays of a ``.npz`` (by name, or by position if saved so) or ``.npy`` file; nothing is unpickled.

    Raises:
        LoadError: The file is not one of these, or holds pickled objects.
    """
    import numpy
    import torch

    try:
        loaded = numpy.load(path, allow_pickle=False)
        if not hasattr(loaded, "files"):
            return torch.from_numpy(loaded)
        arrays = {name: torch.from_numpy(loaded[name]) for name in loaded.files}
    except (OSError, ValueError, EOFError, TypeError, KeyError) as error:
        raise LoadError(f"{path}: not a .npz or .npy file of plain arrays ({_first_line(error)})") from error
    if len(arrays) == 1 or all(name.startswith("arr_") for name in arrays):
        return tuple(arrays.values())
    return arrays


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
    """Return inputs as a manifest describes them (see :func:`specification`); None if it does not, or wrongly."""
    import torch

    names, make, made = list(_parameters(model)), _maker(model), {}
    try:
        for entry in specification or ():
            made[entry["name"]] = make(tuple(entry["shape"])).to(getattr(torch, entry["dtype"]))
    except (KeyError, TypeError, AttributeError, RuntimeError):
        return None
    if not made or not set(made) <= set(names):
        return None
    return tuple(made.values()) if list(made) == names[: len(made)] else made


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(model.forward).parameters
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind not in kinds}


def _maker(model: nn.Module) -> Callable[[tuple[int, ...]], Tensor]:
    """Return what makes an input of a shape: numbers, or indices where an embedding comes first."""
    layer = next(_first_layers(model), (None, None))[1]
    if not hasattr(layer, "num_embeddings"):
        return lambda shape: _normal(*shape)
    return lambda shape: _indices(layer, *shape)


def _normal(*shape: int) -> Tensor:
    import torch

    return torch.randn(*shape)


def _indices(embedding: Any, *shape: int) -> Tensor:
    import torch

    return torch.randint(0, embedding.num_embeddings, shape)


def _guesses(model: nn.Module) -> Iterator[Example]:
    required = [p for p in _parameters(model).values() if p.default is inspect.Parameter.empty]
    for name, layer in _first_layers(model):
        origin = f"guessed from {name or 'the model'} ({type(layer).__name__})"
        for tensor in _tensors_for(layer):
            yield Example((tensor,) * max(1, len(required)), origin, assumed=True)
            if tensor.dim() == 4:  # detectors take a list of images
                yield Example(([tensor[0]],), origin, assumed=True)
        return


def _first_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers whose weights tell the shape of what they take, in the order in which they were defined."""
    for name, module in model.named_modules():
        if next(_tensors_for(module), None) is not None:
            yield name, module


def _tensors_for(layer: nn.Module) -> Iterator[Tensor]:
    """Yield inputs that a layer may take, the likeliest first."""
    from torch import nn

    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if isinstance(layer, convolution):
        spaces = {1: [(n,) for n in LENGTHS], 2: [(n, n) for n in SIZES], 3: VOLUMES}[len(layer.kernel_size)]
        yield from (_normal(1, layer.in_channels, *space) for space in spaces)
    elif isinstance(layer, nn.Linear):
        yield _normal(1, layer.in_features)
        yield _normal(1, TOKENS, layer.in_features)
    elif isinstance(layer, nn.Embedding):
        yield _indices(layer, 1, TOKENS)
    elif isinstance(layer, nn.RNNBase):
        yield _normal(1, TOKENS, layer.input_size)
    elif isinstance(layer, nn.BatchNorm2d) and layer.num_features:
        yield from (_normal(1, layer.num_features, n, n) for n in SIZES)


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


def describe(model: nn.Module, inputs: Inputs) -> str:
    """Return inputs for people: ``"x:1x3x224x224 float32"``."""
    entries = specification(model, inputs)
    return ", ".join(f"{entry['name']}:{'x'.join(map(str, entry['shape']))} {entry['dtype']}" for entry in entries)


def specification(model: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
    """Return name, shape and type of each tensor of the inputs, as JSON-ready values."""
    from torch import Tensor

    from normfuse.outputs import flatten, named_inputs

    try:
        named: Any = named_inputs(model, inputs)
    except TypeError:
        named = inputs
    tensors = [(name, leaf) for name, leaf in flatten(named) if isinstance(leaf, Tensor)]
    return [
        {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors
    ]
