"""TorchScript: a model that is it is refused with the reason; one that holds it says what is in there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse.base import Reason
from normfuse.errors import CaptureError
from normfuse.report import Status
from tests.parity import assert_parity, randomize_norms
from tests.zoo.trap import image

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
INPUT = image(2, 3, 6, 6)
MAKERS = {"script": torch.jit.script, "trace": lambda model: torch.jit.trace(model, INPUT)}
FORMS = pytest.mark.parametrize("script", MAKERS.values(), ids=MAKERS)
ENTRIES: dict[str, Callable[[Any], Any]] = {
    "inspect": lambda m: normfuse.inspect(m, example_inputs=INPUT),
    "inspect without inputs": normfuse.inspect,
    "fold": lambda m: normfuse.fold(m, example_inputs=INPUT),
    "fold in place": lambda m: normfuse.fold(m, example_inputs=INPUT, inplace=True),
    "apply": lambda m: normfuse.apply(m, ["fold-bn"], example_inputs=INPUT),
    "tune_mode": normfuse.tune_mode,
    "quantize": lambda m: normfuse.quantize(m, calibration=[INPUT]),
    "swap_norms": lambda m: normfuse.swap_norms(m, "l1", [INPUT]),
    "export": lambda m: normfuse.export(m, "never-written.onnx", example_inputs=INPUT),
}


def net(channels: int = 4) -> nn.Sequential:
    return randomize_norms(nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)).double().eval())  # type: ignore[return-value]


@FORMS
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_says_what_to_pass_instead(entry: str, script: Callable[[nn.Module], nn.Module]):
    with pytest.raises(CaptureError, match=r"TorchScript, made from Sequential, .* pass the Python module"):
        ENTRIES[entry](script(net()))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@FORMS
def test_it_is_verified_against_its_source(script: Callable[[nn.Module], nn.Module]):
    source = net()
    assert normfuse.verify(source, script(source), INPUT)
    assert normfuse.verify(script(source), normfuse.fold(source, example_inputs=INPUT), INPUT)


@FORMS
@pytest.mark.parametrize("inputs", [INPUT, None], ids=["recorded", "traced"])
def test_a_part_is_left_as_it_is_and_its_norms_are_in_the_report(inputs: Any, script: Callable[[nn.Module], nn.Module]):
    model = nn.Sequential(*net(3), nn.ZeroPad2d(1), script(net()))
    result = normfuse.apply(model, ["fold-bn"], example_inputs=inputs)
    outer, inner = result.report.norms
    assert (outer.subject, outer.status) == ("1", Status.APPLIED)
    assert (inner.subject, inner.status, inner.layer) == ("3.1", Status.UNMATCHED, "BatchNorm2d, TorchScript")
    assert inner.refusal is not None
    assert inner.refusal.reason is Reason.UNSUPPORTED_LAYER
    assert "3 is TorchScript" in inner.refusal.detail
    assert any(note.startswith("3 is TorchScript") for note in result.report.notes)
    assert_parity(model, result.model, INPUT)
