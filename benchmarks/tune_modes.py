"""The ways to train ConvBN blocks that the Tune mode benchmark compares, built from one calibrated network.

Train works by the statistics of the batch, Deploy on folded weights that are its parameters; all others have Eval's
outputs and gradients. Deploy has no gain to train: where the others train norms only, it trains the biases that folding
made, which is the least that any of them could do.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import signal
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from tune_networks import Batch, Network

import normfuse
from normfuse.layers import normalized_convolution

SETTINGS = {"all": "all", "last-stage": "last-stage", "norm-only": "norm"}
EAGER = ("train", "eval", "tune", "tune-kernels", "mmengine", "deploy")
COMPILED = ("compiled-eval", "compiled-tune", "inductor-pass")
BASELINES = ("deploy", "eval")


class UnavailableError(Exception):
    """A mode cannot take this network, or its package is not installed; the message says which."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One network in one mode.

    Attributes:
        mode: The mode.
        model: What holds the parameters.
        forward: What computes; the model itself unless it is compiled.
        network: Where the loss comes from.
        precision: What autocast computes in; None without it.
    """

    mode: str
    model: nn.Module
    forward: Callable[..., Any]
    network: Network
    precision: torch.dtype | None = None

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of one forward pass."""
        device = next(self.model.parameters()).device.type
        plain = contextlib.nullcontext() if self.mode == "tune-kernels" else normalized_convolution.kernels.unused()
        with plain, torch.autocast(device, self.precision, enabled=self.precision is not None):
            return self.network.loss(self.forward, batch)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of what is trained, by name."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self.model.parameters():
            parameter.grad = None


def variant(
    mode: str, source: nn.Module, network: Network, setting: str, batch: Batch, precision: torch.dtype | None = None
) -> Variant:
    """Return a copy of the calibrated network in a mode, with what the setting trains.

    Raises:
        UnavailableError: The mode cannot take the network.
    """
    model = copy.deepcopy(source)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    normfuse.parameter_groups(model, SETTINGS[setting])
    try:
        model = _MAKERS[mode](model, network, batch)
    except UnavailableError:
        raise
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from error
    network.start_training(model)
    forward = _compilable(model, mode) if mode in COMPILED else model
    return Variant(mode, model, forward, network, precision)


def _train(model: nn.Module, _network: Network, _batch: Batch) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return model


def _eval(model: nn.Module, _network: Network, _batch: Batch) -> nn.Module:
    return model


def _tune(model: nn.Module, network: Network, batch: Batch) -> nn.Module:
    normfuse.tune_mode(model, example_inputs=(batch.images,) if network.detects else None)
    if all(outcome.refusal for outcome in normfuse.inspect(model, ["tune-mode"]).norms):
        raise UnavailableError("no norm is paired with a layer")
    return model


def _tune_kernels(model: nn.Module, network: Network, batch: Batch) -> nn.Module:
    if next(model.parameters()).is_cuda:
        raise UnavailableError("the kernels are for CPUs")
    normfuse.build_kernels("tune-mode")
    return _tune(model, network, batch)


def _mmengine(model: nn.Module, network: Network, _batch: Batch) -> nn.Module:
    if importlib.util.find_spec("mmengine") is None:
        raise UnavailableError("mmengine is not installed")
    from mmengine.model import efficient_conv_bn_eval as peer  # type: ignore[import-not-found]

    peer.turn_on_efficient_conv_bn_eval_for_single_model(model.get_submodule(network.traced))
    return model


def _deploy(model: nn.Module, network: Network, batch: Batch) -> nn.Module:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {name for name, _ in model.named_parameters()}
    norms_only = not any(p.requires_grad and p.dim() > 1 for p in model.parameters())
    folded = normfuse.fold(model, example_inputs=(batch.images,) if network.detects else None)
    for name, parameter in folded.named_parameters():
        weight = f"{name.rpartition('.')[0]}.weight"
        parameter.requires_grad_(name in trained or (name not in names and (norms_only or weight in trained)))
    return folded


_MAKERS: dict[str, Callable[[nn.Module, Network, Batch], nn.Module]] = {
    "train": _train,
    "eval": _eval,
    "tune": _tune,
    "tune-kernels": _tune_kernels,
    "mmengine": _mmengine,
    "deploy": _deploy,
    "compiled-eval": _eval,
    "compiled-tune": _tune,
    "inductor-pass": _eval,
}


# compilation


def _compilable(model: nn.Module, mode: str) -> Callable[..., Any]:
    """Return the compiled model behind a code object of its own, so that no variant takes the graph of another."""

    def run(images: Tensor) -> Any:
        return model(images)

    code = run.__code__.replace(co_name=f"run_{mode.replace('-', '_')}")
    entry = types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
    return torch.compile(entry, fullgraph=True, dynamic=False)


def compile_now(made: Variant, batch: Batch, limit: float) -> dict[str, int]:
    """Run one step of a compiled variant, and return how many graphs that compiled and how often the pass matched.

    Raises:
        UnavailableError: It did not compile in ``limit`` seconds, no graph was compiled, or the pass matched nothing.
    """
    graphs, matches = counters["stats"]["unique_graphs"], counters["inductor"]["efficient_conv_bn_eval"]
    with_pass = made.mode == "inductor-pass"
    try:
        with (
            _time_limit(limit),
            inductor.patch(
                efficient_conv_bn_eval_fx_passes=with_pass,
                force_disable_caches=True,  # a graph from the cache was not matched in this run
            ),
        ):
            made.loss(batch).backward()
    except TimeoutError as error:
        raise UnavailableError(f"compilation stopped after {limit:.0f} s") from error
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from error
    made.clear()
    found = {
        "graphs": counters["stats"]["unique_graphs"] - graphs,
        "matches": counters["inductor"]["efficient_conv_bn_eval"] - matches,
    }
    if found["graphs"] != 1 or (found["matches"] > 0) != with_pass:
        raise UnavailableError(f"not what was to be compiled: {found}")
    return found


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`TimeoutError` in the block after some seconds; in the main thread only."""

    def stop(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
