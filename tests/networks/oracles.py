"""What is right about a folded network: the source computes the same, is unchanged, and the report tells what was done.

The judge is the source itself, in float64. A network may answer a call that was not its example with
:class:`normfuse.DeployedModelError`, where the call runs what the example did not; a wrong value it may not return.
"""

from __future__ import annotations

import collections
import copy
import io
import pickle
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from normfuse import api
from normfuse.exported_modules import as_module
from normfuse.report import Report, Status
from tests import parity
from tests.networks.network import NORMS, Call, Network

TOLERANCE = 1e-9
NOISE = 100.0  # how many times its own rounding noise a network may differ by


class Wrong(Exception):  # noqa: N818 - a verdict, no error of the program
    """A folded network, its report or its source is not as it should be."""


@dataclass(frozen=True)
class Verdict:
    """What came out of one reader of one network.

    Attributes:
        reader: ``"recorded"``, ``"traced"`` or ``"exported"``.
        kind: ``"right"``, ``"refused"`` (an error of normfuse that says why), ``"wrong"``, ``"crash"``.
        detail: What is wrong, in one line.
        norms: How many norms the report lists.
        folded: How many of them were applied.
    """

    reader: str
    kind: str
    detail: str = ""
    norms: int = 0
    folded: int = 0


@dataclass(frozen=True)
class Expected:
    """What the source makes of one call."""

    label: str
    call: Call
    outputs: list[Tensor]
    must: bool


def check(network: Network, readers: tuple[str, ...], *, extras: bool = False) -> list[Verdict]:
    """Fold a network through each reader, and judge what comes out.

    Args:
        network: The network.
        readers: Of :data:`READERS`.
        extras: Also copy, pickle, save, load, inspect and verify the result.
    """
    with network.surrounded():
        expected = list(expectations(network))
        return [_judged(network, reader, expected, extras) for reader in readers] if expected else []


def _judged(network: Network, reader: str, expected: list[Expected], extras: bool) -> Verdict:
    report: Report | None = None
    try:
        report, remarks = READERS[reader](network, expected, extras)
    except Wrong as wrong:
        return Verdict(reader, "wrong", str(wrong))
    except normfuse.VerificationError as error:
        return Verdict(reader, "wrong", f"VerificationError: {_line(error)}")
    except normfuse.NormfuseError as error:
        return Verdict(reader, "refused", _line(error))
    except Exception as error:
        return Verdict(reader, "crash", f"{type(error).__name__}: {_line(error)}{_place(error)}")
    if report is None:
        return Verdict(reader, "skipped", remarks)
    folded = sum(o.status is Status.APPLIED for o in report.norms)
    return Verdict(reader, "right", remarks, len(report.norms), folded)


def _line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _place(error: BaseException) -> str:
    """Return the last line of the package that an exception came through."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "normfuse" in file or "/passes/" in file:
            found = f" [{Path(file).name}:{trace.tb_frame.f_code.co_name}]"
        trace = trace.tb_next
    return found


# what the source does


def expectations(network: Network) -> Iterator[Expected]:
    """Yield what the source does with its example, other values, another batch size, and other flags."""
    model = network.build()
    first = network.call(network.seed)
    calls = [("on the example", first, True), ("on other values", network.call(network.seed + 1), True)]
    calls += [("on a batch of 3", network.call(network.seed + 2, 3), False)]
    calls += [(f"with {o}", network.call(network.seed + 3, **o), network.several) for o in network.others]
    for label, call, must in calls:
        try:
            outputs = run(model, call)
            again = run(model, call)
        except Exception:  # the network takes no such call
            if call is first:
                return
            continue
        if outputs and all(map(_same, outputs, again)):
            yield Expected(label, call, outputs, must)


def run(model: nn.Module, call: Call) -> list[Tensor]:
    """Return the tensors of the output on a copy of the arguments, in eval mode."""
    args, kwargs = parity.cloned(call[0]), parity.cloned(call[1])
    with parity.eval_mode(model), torch.no_grad():
        return [tensor.clone() for tensor in parity.tensors(model(*args, **kwargs))]


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def compare(model: nn.Module, network: Network, expected: list[Expected], what: str = "") -> None:
    """Run the folded model as the source was run.

    Raises:
        Wrong: A value differs, or a call that the source takes raises anything but ``DeployedModelError``.
    """
    for one in expected:
        try:
            found = run(model, one.call)
        except normfuse.DeployedModelError as error:
            if one.must:
                raise Wrong(f"{what}raises DeployedModelError {one.label}: {_line(error)}") from error
            continue
        except Exception as error:
            raise Wrong(f"{what}raises {type(error).__name__} {one.label}: {_line(error)}") from error
        _require_equal(one, found, network, what)


def _require_equal(one: Expected, found: list[Tensor], network: Network, what: str) -> None:
    shapes = [[(t.shape, t.dtype) for t in tensors] for tensors in (one.outputs, found)]
    if shapes[0] != shapes[1]:
        raise Wrong(f"{what}returns {shapes[1]} {one.label}, expected {shapes[0]}")
    worst = max(map(parity.error, one.outputs, found))
    if worst > TOLERANCE and worst > NOISE * noise(network, one):
        raise Wrong(f"{what}differs by {worst:.1g} {one.label}")


def noise(network: Network, one: Expected) -> float:
    """Return how far the source's output moves where everything it reads moves by a unit in the last place."""
    model = network.build()
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        step = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
        return tensor * (1 + step * 4e-16) if tensor.is_floating_point() else tensor

    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(moved(tensor))
    outputs = run(model, (tuple(map(moved, one.call[0])), one.call[1]))
    return max(map(parity.error, one.outputs, outputs))


# readers


def _folded(network: Network, expected: list[Expected], extras: bool, *, recorded: bool) -> tuple[Report, str]:
    source = network.build()
    run(source, expected[0].call)  # what hooks compute of weights is up to date then
    before = fingerprint(source)
    inputs: dict[str, Any] = {"example_inputs": _examples(network, expected)} if recorded else {}
    result = api.apply(source, api.EXACT_PASSES, **inputs, **network.options, verify=extras)
    if fingerprint(source) != before:
        raise Wrong("the source model was changed")
    _require_each_once(source, result.report)
    expected = expected if recorded else [_of_a_trace(one, network) for one in expected]
    compare(result.model, network, expected)
    if fingerprint(source) != before:
        raise Wrong("the folded model changes its source")
    if extras:
        _require_lasting(result.model, network, expected)
        _require_told(source, result.report, inputs, network)
        if expected[0].must and not normfuse.verify(source, result.model, expected[0].call[0]):
            raise Wrong("verify fails")
    return result.report, ""


def _of_a_trace(one: Expected, network: Network) -> Expected:
    """Return what is expected of a model that was read without an example: of flags and ranks nobody told it."""
    return replace(one, must=one.must and not one.call[1] and network.takes_batches)


def _examples(network: Network, expected: list[Expected]) -> Any:
    """Return the example, or that and a call with each of the other flags."""
    calls = [expected[0].call, *(one.call for one in expected if one.call[1])]
    if not network.several:
        return parity.cloned(expected[0].call[0])
    return normfuse.Examples(*(dict(zip(network.inputs, parity.cloned(c[0]), strict=True)) | c[1] for c in calls))


def _recorded(network: Network, expected: list[Expected], extras: bool) -> tuple[Report, str]:
    return _folded(network, expected, extras, recorded=True)


def _traced(network: Network, expected: list[Expected], extras: bool) -> tuple[Report, str]:
    return _folded(network, expected, extras, recorded=False)


def _exported(network: Network, expected: list[Expected], extras: bool) -> tuple[Report | None, str]:
    """Fold the exported program, whose shapes are those of the example."""
    args = expected[0].call[0]
    try:
        program = torch.export.export(network.build().eval(), parity.cloned(args))
    except Exception as error:  # torch's own limits
        return None, f"not exported: {type(error).__name__}"
    expected = [one for one in expected if one.must and not one.call[1]]
    try:
        compare(as_module(program), network, expected)
    except Wrong:  # what torch exports is not what runs, as inside of hooks of all modules
        return None, "exported as another function"
    result = api.apply(as_module(program), api.EXACT_PASSES, example_inputs=parity.cloned(args))
    compare(result.model, network, expected)
    return result.report, ""


READERS: dict[str, Callable[..., tuple[Report | None, str]]] = {
    "recorded": _recorded,
    "traced": _traced,
    "exported": _exported,
}


# what else must hold


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return all that a fold must leave alone: values, attributes, modes, hooks."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kept = {k: _trace_of(v) for k, v in vars(module).items()}
        tables = (module._parameters, module._buffers, module._modules)
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        found[name] = (
            kept,
            [{k: id(v) for k, v in table.items()} for table in tables],
            [list(table) for table in hooks],
        )
    tensors = [*model.parameters(), *model.buffers()]
    found["values"] = [(t.requires_grad, t.detach().numpy().tobytes()) for t in tensors]
    return found


def _trace_of(value: Any) -> Any:
    if isinstance(value, Tensor):  # one that a hook computes is another at each call, of the same values
        return value.detach().numpy().tobytes()
    return value if isinstance(value, bool | int | float | str) else id(value)


def _require_each_once(source: nn.Module, report: Report) -> None:
    """Every norm of the model stands in the report exactly once, under one of its names."""
    counts = collections.Counter(outcome.subject for outcome in report.norms)
    twice = [name for name, count in counts.items() if count > 1]
    names: dict[int, list[str]] = collections.defaultdict(list)
    for name, module in source.named_modules(remove_duplicate=False):
        if isinstance(module, NORMS):
            names[id(module)].append(name)
    missing = [some[0] for some in names.values() if sum(counts[name] for name in some) != 1]
    if twice or missing:
        raise Wrong(f"the report does not list once: {', '.join(twice or missing)}")


def _require_told(source: nn.Module, report: Report, inputs: dict[str, Any], network: Network) -> None:
    told = api.inspect(source, api.EXACT_PASSES, **inputs, **network.options)
    if [(o.subject, o.status) for o in told.outcomes] != [(o.subject, o.status) for o in report.outcomes]:
        raise Wrong(f"inspect says {told.summary()!r}, the fold did {report.summary()!r}")


def _require_lasting(folded: nn.Module, network: Network, expected: list[Expected]) -> None:
    """Copies, pickles and files of the folded model compute the same."""
    compare(copy.deepcopy(folded), network, expected, "a copy ")
    if _pickles(network.build()):
        compare(pickle.loads(pickle.dumps(folded)), network, expected, "a pickle ")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        try:
            normfuse.save(folded, path)
        except normfuse.NormfuseError:  # one that holds a lambda cannot be pickled
            return
        try:
            loaded = normfuse.load(path, model=network.build())
        except normfuse.NormfuseError as error:
            raise Wrong(f"a file does not load: {_line(error)}") from error
        compare(loaded, network, expected, "a file ")


def _pickles(model: nn.Module) -> bool:
    try:
        pickle.dump(model, io.BytesIO())
    except Exception:  # a lambda, a local object
        return False
    return True
