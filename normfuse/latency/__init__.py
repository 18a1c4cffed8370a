"""Latency of a model, unfolded and folded, on the backends of this machine; what ``normfuse bench`` runs."""

from normfuse.latency.backends import BACKENDS
from normfuse.latency.clock import Spread
from normfuse.latency.files import measure_file
from normfuse.latency.measuring import VARIANTS, measure
from normfuse.latency.results import Benchmark, Row

__all__ = ["BACKENDS", "VARIANTS", "Benchmark", "Row", "Spread", "measure", "measure_file"]
