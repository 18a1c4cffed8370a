"""Inputs that a model may take, made up where the user gives none.

In order: the size in ``default_cfg`` (timm), ``example_input_array`` (Lightning), and at last what the first layer
whose weights tell it takes: channels of a convolution, features of a linear layer, indices of an embedding. Whether the
model runs on one is for the caller to try; no size of a picture is more than a guess.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.examples import Inputs

SIZES = (224, 32, 64, 128, 299, 28, 256, 512)
LENGTHS = (224, 32, 64, 128, 299, 1024, 16000)
VOLUMES = ((16, 112, 112), (32, 32, 32), (8, 64, 64), (16, 224, 224))
TOKENS = 16
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class MadeUp:
    """An input that a model may take.

    Attributes:
        inputs: The input itself, on the CPU and in float32.
        origin: What it follows from, for people: ``"guessed from conv1 (Conv2d)"``.
    """

    inputs: Inputs
    origin: str


def made_up_inputs(model: nn.Module, sizes: Sequence[int] = SIZES) -> Iterator[MadeUp]:
    """Yield inputs that a model may take, the likeliest first.

    Args:
        model: Any module.
        sizes: Heights, which are widths as well, of the pictures that are tried.
    """
    for config in ("pretrained_cfg", "default_cfg"):
        size = setting(getattr(model, config, None), "input_size")
        if size:
            yield MadeUp(_normal(1, *size), f"the model's {config}")
    example: Any = getattr(model, "example_input_array", None)
    if example is not None:
        yield MadeUp(example, "the model's example_input_array")
    yield from _guesses(model, sizes)


def setting(config: Any, key: str) -> Any:
    """Return an entry of a model's configuration, a dictionary or an object; None where there is none."""
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)


def parameters_of(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Return the parameters of a model's ``forward`` that take one argument each."""
    parameters = inspect.signature(model.forward).parameters
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind not in kinds}


def maker(model: nn.Module) -> Callable[[tuple[int, ...]], Tensor]:
    """Return what makes an input of a shape: numbers, or indices where an embedding comes first."""
    layer = next(_first_layers(model, SIZES), (None, None))[1]
    if not hasattr(layer, "num_embeddings"):
        return lambda shape: _normal(*shape)
    return lambda shape: _indices(layer, *shape)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _indices(embedding: Any, *shape: int) -> Tensor:
    return torch.randint(0, embedding.num_embeddings, shape)


def _guesses(model: nn.Module, sizes: Sequence[int]) -> Iterator[MadeUp]:
    required = [p for p in parameters_of(model).values() if p.default is inspect.Parameter.empty]
    for name, layer in _first_layers(model, sizes):
        origin = f"guessed from {name or 'the model'} ({type(layer).__name__})"
        for tensor in _tensors_for(layer, sizes):
            yield MadeUp((tensor,) * max(1, len(required)), origin)
            if tensor.dim() == 4:  # detectors take a list of images
                yield MadeUp(([tensor[0]],), origin)
        return


def _first_layers(model: nn.Module, sizes: Sequence[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers whose weights tell the shape of what they take, in the order in which they were defined."""
    for name, module in model.named_modules():
        if next(_tensors_for(module, sizes), None) is not None:
            yield name, module


def _tensors_for(layer: nn.Module, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Yield inputs that a layer may take, the likeliest first."""
    if isinstance(layer, _CONVOLUTIONS):
        spaces = {1: [(n,) for n in LENGTHS], 2: [(n, n) for n in sizes], 3: VOLUMES}[len(layer.kernel_size)]
        yield from (_normal(1, layer.in_channels, *space) for space in spaces)
    elif isinstance(layer, nn.Linear):
        yield _normal(1, layer.in_features)
        yield _normal(1, TOKENS, layer.in_features)
    elif isinstance(layer, nn.Embedding):
        yield _indices(layer, 1, TOKENS)
    elif isinstance(layer, nn.RNNBase):
        yield _normal(1, TOKENS, layer.input_size)
    elif isinstance(layer, nn.BatchNorm2d) and layer.num_features:
        yield from (_normal(1, layer.num_features, n, n) for n in sizes)
