"""Load a ``.pt2`` file without running code from it.

``torch.export.load`` is not safe by format: it unpickles some payloads, and it *evaluates* symbolic sizes, guards and
the tree descriptions that it finds in the JSON. So the archive is not handed to it. It is read record by record, every
string is compared with what a plain tensor program needs, and a new archive is written in memory from what passed: the
graph with operators of ATen, the raw tensors, and sample inputs that ``weights_only=True`` accepts. Guards and stack
traces are left out. That archive is what gets loaded.

An archive that needs more (pickled tensors, custom objects, compiled code, named tuples) is refused unless trusted.
"""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from normfuse.errors import LoadError
from normfuse.unpickle import unpickle_stream

MODEL, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/", "data/constants/"
CONFIGS = {WEIGHTS: "data/weights/model_weights_config.json", CONSTANTS: "data/constants/model_constants_config.json"}

ARITHMETIC = "getitem|add|sub|mul|floordiv|truediv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|not_"
OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.(?!save\b|from_file\b|set_\b|resize|sparse)[a-z]\w*\.\w+"
    r"|torch\.ops\.aten\.(_softmax|_log_softmax|_to_copy|_unsafe_view|_assert_\w+|_native_batch_norm_legit\w*"
    r"|_adaptive_avg_pool[23]d|_upsample\w+|_scaled_dot_product\w+)\.\w+"
    r"|torch\.ops\.higher_order\.wrap_with_set_grad_enabled"
    rf"|_operator\.({ARITHMETIC})|math\.(ceil|floor|trunc|sqrt)|torch\.sym_(int|float|max|min|not|ite|sum)"
)
NAME = re.compile(r"[\w.-]*")
TEXT = re.compile(r"[\w .,:;<>=+*/-]*")
"""No quote, bracket or line break: such a text cannot become a call wherever it is pasted into generated code."""

SYMBOL = re.compile(r"[a-z]{1,2}\d+")
SYMBOLIC = frozenset(
    {"Symbol", "Integer", "Add", "Mul", "Pow", "Mod", "Max", "Min", "FloorDiv", "CleanDiv", "CeilDiv", "PythonMod"}
)
EXPRESSION_NODES = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare),
    *(ast.operator, ast.unaryop, ast.cmpop),
)
TREE_TYPES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


class UnsafeArchive(Exception):  # noqa: N818 - control flow, always turned into a LoadError
    """The archive holds something that could run code."""


def load_exported_program(path: str | Path, *, trust_pickle: bool = False) -> ExportedProgram:
    """Return the program in a ``.pt2`` file.

    Args:
        path: What ``torch.export.save`` wrote.
        trust_pickle: Give the file to ``torch.export.load`` as it is. This can run code from the file.

    Raises:
        LoadError: The archive is damaged, of another torch version, or not safe to load.
    """
    data = Path(path).read_bytes()
    try:
        return torch.export.load(io.BytesIO(data) if trust_pickle else io.BytesIO(rewritten(data)))
    except UnsafeArchive as error:
        raise LoadError(
            f"{path}: {error}; export the model again without it, give the python model instead, "
            "or pass --trust-pickle: loading this file can run code from it, use it only if you trust its source"
        ) from error
    except Exception as error:  # a damaged archive can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoadError(f"{path}: torch {torch.__version__} cannot read this ExportedProgram ({reason})") from error


def example_inputs(program: ExportedProgram) -> tuple[Any, ...] | dict[str, Any] | None:
    """Return the sample inputs of a program: a tuple, or by name if some are keyword arguments; None if not stored."""
    args, kwargs = program.example_inputs or ((), {})
    if not args and not kwargs:
        return None
    signature = program.module_call_graph[0].signature
    names = (signature.forward_arg_names if signature else None) or ()
    return {**dict(zip(names, args, strict=False)), **kwargs} if kwargs else tuple(args)


def rewritten(data: bytes) -> bytes:
    """Return a new archive with those parts of the given one that cannot run code.

    Raises:
        UnsafeArchive: It needs a part that can.
    """
    reader = PT2ArchiveReader(io.BytesIO(data))  # type: ignore[arg-type] - the parser that torch.export.load uses
    records = set(reader.get_file_names())
    _refuse_records(records)
    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:  # type: ignore[arg-type]
        writer.write_string(MODEL, json.dumps(_clean(json.loads(reader.read_string(MODEL)))))
        for folder, name in CONFIGS.items():
            config = _clean(json.loads(reader.read_string(name)))
            writer.write_string(name, json.dumps(config))
            for payload in _payloads(config, folder):
                writer.write_bytes(payload, reader.read_bytes(payload))
        writer.write_bytes(SAMPLES, _sample_inputs(reader.read_bytes(SAMPLES) if SAMPLES in records else b""))
    return buffer.getvalue()


def _refuse_records(records: set[str]) -> None:
    if MODEL not in records:
        raise UnsafeArchive("it has no program named 'model' in the archive format of torch 2.8 and later")
    if any(name.startswith("data/aotinductor") for name in records):
        raise UnsafeArchive("it holds compiled code (AOTInductor)")
    legacy = sorted(records & {f"{WEIGHTS}model.pt", f"{CONSTANTS}model.pt"})
    if legacy:
        raise UnsafeArchive(f"it holds pickled tensors ({legacy[0]})")


def _payloads(config: Any, folder: str) -> list[str]:
    entries = config["config"].items()
    pickled = [key for key, meta in entries if meta["use_pickle"] is not False or meta["tensor_meta"] is None]
    if pickled:
        raise UnsafeArchive(f"it holds a pickled payload ({pickled[0]})")
    names = {meta["path_name"] for _, meta in entries}
    odd = [name for name in names if not re.fullmatch(r"(weight|tensor)_\d+", name)]
    if odd:
        raise UnsafeArchive(f"it holds an object that is not a tensor ({odd[0]})")
    return sorted(folder + name for name in names)


def _sample_inputs(data: bytes) -> bytes:
    """Return the stored inputs if they are plain tensors and containers; they are not needed to run the program."""
    try:
        loaded = unpickle_stream(io.BytesIO(data), "its sample inputs")
    except Exception:  # a hostile pickle can raise anything; it was not executed
        return b""
    return data if isinstance(loaded, (tuple, dict)) else b""


def _clean(value: Any, key: str = "") -> Any:
    """Return a JSON value in which every string is one that :data:`RULES` let pass, without metadata and guards."""
    if isinstance(value, dict):
        for name in value:
            _require(NAME.fullmatch(name), "an unusual name", name)
        return {name: DROPPED[name] if name in DROPPED else _clean(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, key) for item in value]
    if isinstance(value, str):
        RULES.get(key, _check_text)(value)
    return value


DROPPED: dict[str, Any] = {"metadata": {}, "guards_code": [], "treespec_namedtuple_fields": {}}


def _require(passed: object, what: str, text: str) -> None:
    if not passed:
        raise UnsafeArchive(f"it holds {what} ({text[:80]!r})")


def _check_text(text: str) -> None:
    _require(TEXT.fullmatch(text), "an unusual text", text)


def _check_name(text: str) -> None:
    _require(NAME.fullmatch(text), "an unusual name", text)


def _check_operator(text: str) -> None:
    _require(OPERATOR.fullmatch(text), "an operator that is not a plain tensor operation", text)


def _check_object(text: str) -> None:
    _require(False, "a custom object", text)


def _check_expression(text: str) -> None:
    """A symbolic size: it is *evaluated* by torch, so only arithmetic on symbols and numbers may pass."""
    try:
        passed = all(map(_is_arithmetic, ast.walk(ast.parse(text, mode="eval"))))
    except (SyntaxError, ValueError):
        passed = False
    _require(passed, "a symbolic size that is not arithmetic", text)


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in SYMBOLIC or bool(SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str) or bool(SYMBOL.fullmatch(node.value))
    return isinstance(node, EXPRESSION_NODES)


def _check_tree(text: str) -> None:
    """The structure of inputs and outputs: torch imports the types that it names."""
    try:
        parsed = json.loads(text)
        known = isinstance(parsed, list) and all(not isinstance(p, dict) or _is_plain_tree(p) for p in parsed)
    except (ValueError, KeyError, TypeError):
        known = False
    _require(known, "inputs or outputs that are not tuples, lists and dictionaries", text)


def _is_plain_tree(node: dict[str, Any]) -> bool:
    context = json.loads(node["context"]) if node["context"] is not None else None
    plain = context is None or (isinstance(context, list) and all(isinstance(key, (str, int)) for key in context))
    names = [key for key in context or () if isinstance(key, str)]
    return (
        set(node) == {"type", "context", "children_spec"}
        and node["type"] in TREE_TYPES
        and plain
        and all(NAME.fullmatch(name) for name in names)
        and all(_is_plain_tree(child) for child in node["children_spec"])
    )


RULES = {
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_expression,
    "in_spec": _check_tree,
    "out_spec": _check_tree,
    "class_fqn": _check_object,
    "name": _check_name,
    "as_name": _check_name,
    "fqn": _check_name,
    "path_name": _check_name,
    "forward_arg_names": _check_name,
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name"), _check_name),
    "user_input_name": _check_name,
}
