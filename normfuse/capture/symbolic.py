"""Read a model without an input, by symbolic tracing; placeholder during bring-up."""
from __future__ import annotations

from torch import nn

from normfuse.errors import CaptureError
from normfuse.graph import ModelGraph


def trace(model: nn.Module) -> ModelGraph:
    raise CaptureError("todo")
