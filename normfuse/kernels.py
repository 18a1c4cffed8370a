"""Building everything that this package has in C and C++."""

from __future__ import annotations

from pathlib import Path

from normfuse.layers import normalized_convolution
from normfuse.quantization import native_norms

_KINDS = {"tune-mode": normalized_convolution.kernels, "integer-norms": native_norms.kernels}


def build_kernels(*which: str, force: bool = False) -> list[Path]:
    """Compile kernels for this processor and this torch, once, and use them from now on, also in later processes.

    Everything works without them, to the same results within rounding; they only save time, on CPUs. They are kept in
    ``$NORMFUSE_CACHE_DIR``, or else the user's cache folder, and used only where trial runs give the right results;
    ``NORMFUSE_KERNELS=0`` in the environment turns them off. An upgrade of torch needs another build. This takes
    about a minute.

    Args:
        which: ``"tune-mode"``: the step of a convolution in Tune mode (needs a C++ compiler); ``"integer-norms"``: the
            L1 norms in int8 (needs a C compiler). Default: both.
        force: Compile again where they are there already.

    Returns:
        The libraries.

    Raises:
        ValueError: There are no kernels of that name.
        NormfuseError: There is no compiler, it fails, the folder cannot be written to, or a library does not reproduce
            what it should.
    """
    unknown = set(which) - set(_KINDS)
    if unknown:
        raise ValueError(f"no kernels are called {sorted(unknown)[0]!r}: choose from {', '.join(_KINDS)}")
    return [_KINDS[name].build(force=force) for name in which or _KINDS]


def built_kernels() -> list[str]:
    """Return the names of the kernels that are used in this process."""
    return [name for name, kernels in _KINDS.items() if kernels.get() is not None]
