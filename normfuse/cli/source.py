"""The model that a command was given: a file or an architecture, loaded, checked and described."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli import inputs
from normfuse.cli.arguments import Request
from normfuse.cli.output import Output
from normfuse.errors import LoadError, MissingDependencyError

if TYPE_CHECKING:
    from torch import nn

    from normfuse.outputs import Inputs


@dataclass
class Source:
    """A loaded model.

    Attributes:
        name: What to call it: the stem of the file, or the architecture.
        model: The model, in eval mode, on the device.
        format: What the file holds; ``"architecture"`` without one.
        arch: The architecture, where one was given or the file names it.
        path: The file, if any.
        stored: The example inputs that the file holds, if any.
        manifest: What the file says about how it was made, if normfuse wrote it.
        notes: What the user should know about how it was loaded.
    """

    name: str
    model: nn.Module
    format: str
    arch: str | None = None
    path: Path | None = None
    stored: Inputs | None = None
    manifest: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def describe(self, example: inputs.Example) -> dict[str, Any]:
        """Return the ``model`` entry of the JSON document."""
        from normfuse import outputs

        return {
            **file_entry(self.path),
            "name": self.name,
            "format": self.format,
            "arch": self.arch,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "inputs": outputs.specification(self.model, example.inputs),
            "inputs_from": example.origin,
            "inputs_assumed": example.assumed,
        }


def is_file(model: str) -> bool:
    """Return whether MODEL is a file; otherwise it is an architecture.

    Raises:
        click.UsageError: It can be neither.
    """
    if Path(model).is_file():
        return True
    if ":" in model:
        return False
    kind = "is a folder" if Path(model).is_dir() else "there is no such file"
    raise click.UsageError(f"{model}: {kind}; MODEL is a file, timm:NAME, torchvision:NAME or package.module:factory")


def is_onnx(model: str) -> bool:
    """Return whether MODEL is an ONNX file, judged by its content."""
    from normfuse.formats import Format, sniff

    return is_file(model) and sniff(model) is Format.ONNX


def is_engine(model: str) -> bool:
    """Return whether MODEL is a TensorRT engine: by its name, as what it holds is TensorRT's own affair."""
    return is_file(model) and Path(model).suffix.lower() == ".engine"


def load(request: Request) -> Source:
    """Load the model of a request, move it to the device and check that it can be worked on.

    Raises:
        LoadError: The file is refused, or holds NaN or infinite weights.
        MissingDependencyError: The device is not there.
    """
    import torch

    check_device(request.device)
    torch.manual_seed(request.seed)
    source = _read(request)
    _check_finite(source)
    if source.path and any(module.training for module in source.model.modules()):
        source.notes.append("the model was saved in training mode; what is worked on is its eval form")
    for module in source.model.modules():
        module.training = False
    source.model.to(request.device)
    return source


def check_device(device: str) -> None:
    """Raise unless torch can compute on the device.

    Raises:
        click.UsageError: There is no such kind of device.
        MissingDependencyError: It is not in this machine, or this torch cannot use it.
    """
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise click.UsageError(f"--device {device}: write cpu or cuda:0") from error
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MissingDependencyError(f"--device {device}: not available here; run normfuse doctor") from error


def _read(request: Request) -> Source:
    kwargs = dict(request.arch_kwargs)
    if not is_file(request.model) and request.weights is None:
        from normfuse.architectures import build

        name = request.model.rpartition(":")[2]
        notes = ["the weights are random: pass --weights FILE for trained ones"]
        return Source(name, build(request.model, kwargs), "architecture", arch=request.model, notes=notes)
    from normfuse.serialize import read

    from_file = is_file(request.model)
    path = Path(request.model) if from_file else request.weights
    arch = request.arch if from_file else request.model
    assert path is not None
    loaded = read(
        path,
        arch=arch,
        arch_kwargs=kwargs,
        allow_globals=request.allow_globals,
        trust_pickle=request.trust_pickle,
    )
    stored = loaded.example_inputs
    if stored is None and loaded.manifest:
        stored = inputs.from_specification(loaded.model, loaded.manifest.get("inputs"))
    return Source(
        path.stem,
        loaded.model,
        loaded.format.value,
        arch=loaded.arch,
        path=path,
        stored=stored,
        manifest=loaded.manifest,
        notes=[*loaded.notes],
    )


def _check_finite(source: Source) -> None:
    """Refuse weights that are not numbers: folding would spread them."""
    state = [*source.model.named_parameters(), *source.model.named_buffers()]
    bad = [name for name, t in state if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        names = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise LoadError(f"{source.path or source.name}: NaN or infinite values in {names}")


def example_for(source: Source, request: Request, out: Output) -> inputs.Example:
    """Return an input the model runs on, and say what was assumed."""
    from normfuse import outputs

    with out.step("finding an example input"):
        example = inputs.resolve(
            source.model,
            input_file=request.input_file,
            input_shapes=request.input_shapes,
            stored=source.stored,
            device=request.device,
            seed=request.seed,
        )
    out.document["environment"] = environment(request.device)
    out.document["model"] = source.describe(example)
    count = out.document["model"]["parameters"]
    shapes = outputs.describe(source.model, example.inputs)
    out.field("model", f"{source.name}  {_millions(count)} params  input {shapes}")
    if example.assumed:
        out.note(f"the input is an assumption ({example.origin}): --input-shape says otherwise")
    for text in source.notes:
        out.note(text)
    return example


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count}"


def file_entry(path: Path | None) -> dict[str, Any]:
    """Return path, size and hash of a file as JSON-ready values."""
    if path is None:
        return {"path": None, "bytes": None, "sha256": None}
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return what a result depends on, as JSON-ready values."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
    }
