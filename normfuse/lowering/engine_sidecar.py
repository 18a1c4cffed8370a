"""``x.engine.json``: what an engine was built from, by what and for which GPU; checked before the engine is opened.

An engine does not travel: it is for one version of one package and for the GPUs it was built for, and TensorRT's own
words for that are no help. The sidecar is written with the engine and says it first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from normfuse.errors import LoadError

SCHEMA_VERSION = 1
Package = Literal["tensorrt_rtx", "tensorrt"]
"""What a description may say that it was built by: the package is imported to open the engine."""

AMPERE = 80  # tensorrt_rtx builds for this and later where no target is given


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The description of an engine.

    Attributes:
        tensorrt: ``{"package": "tensorrt_rtx", "version": "1.7.1.116"}``.
        target: The GPUs, ``["sm_86"]``; empty where the package chose, which is Ampere and later.
        device: The GPU that it was built on, None where it was built ahead of time.
        precision: The word that it was asked for by.
        shapes: ``{input: [smallest, usual, largest]}``, three equal shapes for an input of one shape.
        dtypes: ``{input or output: type}`` in TensorRT's words.
        outputs: The shapes of the outputs, -1 for an axis of any size.
        layers: Name, type and ONNX nodes of each layer.
        norm_layers: Those of them that compute a normalization, alone or fused with others, and which; empty is good.
        network: How many layers of each type the parsed network had, before TensorRT's own optimizations.
        source_sha256: Hash of the model file it was exported from, or of the ONNX file where there was none.
        onnx_sha256: Hash of the ONNX file that was parsed.
        engine_sha256: Hash of the engine itself.
        normfuse: The version that built it.
    """

    tensorrt: dict[str, str]
    target: list[str]
    device: dict[str, Any] | None
    precision: str
    shapes: dict[str, list[list[int]]]
    dtypes: dict[str, str]
    outputs: dict[str, list[int]]
    layers: list[dict[str, Any]]
    norm_layers: list[dict[str, Any]]
    network: dict[str, int]
    source_sha256: str
    onnx_sha256: str
    engine_sha256: str
    normfuse: str
    schema_version: int = SCHEMA_VERSION

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def require_file(self, engine: Path) -> None:
        """Raise unless this is the description of that engine.

        Raises:
            LoadError: The engine is another one, or is damaged.
        """
        if sha256(engine) != self.engine_sha256:
            raise LoadError(
                f"{engine}: not the engine that {sidecar_path(engine).name} describes, or damaged: rebuild it"
            )

    def require_package(self, version: str, engine: Path) -> None:
        """Raise unless the engine was built by this version of its package.

        Raises:
            LoadError: It was built by another.
        """
        package, built = self.tensorrt["package"], self.tensorrt["version"]
        if version != built:
            raise LoadError(
                f"{engine}: built by {package} {built}, this is {version}: rebuild it here, or install {built}"
            )

    def require_gpu(self, capability: Sequence[int], name: str, engine: Path) -> None:
        """Raise unless the engine was built for a GPU of this compute capability.

        Raises:
            LoadError: It was built for another.
        """
        here = "sm_{}{}".format(*capability)
        fits = here in self.target if self.target else int(here[3:]) >= AMPERE
        if not fits:
            built = ", ".join(self.target) or f"sm_{AMPERE} and later"
            raise LoadError(f"{engine}: built for {built}, this is {here} ({name}): rebuild it with --target {here}")


def sidecar_path(engine: str | os.PathLike[str]) -> Path:
    """Return where the description of an engine is: ``x.engine.json``."""
    return Path(f"{os.fspath(engine)}.json")


def read_sidecar(engine: str | os.PathLike[str]) -> Sidecar:
    """Return the description of an engine.

    Raises:
        LoadError: There is no engine, or no description beside it that can be read.
    """
    path = sidecar_path(engine)
    for file in (Path(engine), path):
        if not file.is_file():
            raise LoadError(f"there is no file {file}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema_version"] != SCHEMA_VERSION:
            raise LoadError(f"{path}: its schema is version {document['schema_version']}, this reads {SCHEMA_VERSION}")
        if document["tensorrt"]["package"] not in get_args(Package):
            raise LoadError(f"{path}: names a package that builds no engines; rebuild the engine")
        return Sidecar(**document)
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise LoadError(f"{path}: not the description of an engine ({error}): rebuild the engine") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the hash of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
