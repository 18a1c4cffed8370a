"""A .pt2 file that torch.export.save writes loads by itself; one that could run code does not."""

from __future__ import annotations

import io
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from normfuse.errors import DeployedModelError, LoadError
from normfuse.exported_program import MODEL, OPERATOR, SAMPLES
from normfuse.formats import Format
from normfuse.serialize import read

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Net(nn.Module):
    """A nested output, a keyword, a string argument, a constant and a symbolic size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.constant = torch.randn(1)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        with torch.no_grad():
            x = self.norm(self.conv(x))
        y = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return {"a": y.reshape(y.shape[0], -1) * scale + self.constant, "b": (x[:, :2], x)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    x = torch.randn(2, 3, 8, 8)
    shapes = {"x": {0: torch.export.Dim("batch")}, "scale": None}
    program = torch.export.export(Net().eval(), (x,), {"scale": 2.0}, dynamic_shapes=shapes)
    with open(tmp_path / "m.pt2", "wb") as file:
        torch.export.save(program, file)
    return tmp_path / "m.pt2"


def edit(path: Path, record: str, change: Callable[[bytes], bytes]) -> None:
    """Rewrite one record of an archive."""
    reader = PT2ArchiveReader(io.BytesIO(path.read_bytes()))  # type: ignore[arg-type]
    records = {name: reader.read_bytes(name) for name in reader.get_file_names()}
    records[record] = change(records.get(record, b""))
    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:  # type: ignore[arg-type]
        for name, data in records.items():
            if not name.startswith(".data") and name not in ("version", "byteorder"):
                writer.write_bytes(name, data)
    path.write_bytes(buffer.getvalue())


def edit_json(path: Path, record: str, change: Callable[[Any], Any]) -> None:
    def rewrite(data: bytes) -> bytes:
        value = json.loads(data)
        change(value)
        return json.dumps(value).encode()

    edit(path, record, rewrite)


def test_loads_by_itself(path: Path) -> None:
    answer = read(path)
    x = torch.randn(5, 3, 8, 8)
    reference = torch.export.load(io.BytesIO(path.read_bytes())).module()(x, scale=2.0)
    result = answer.model(x, scale=2.0)
    assert torch.equal(result["a"], reference["a"])
    assert torch.equal(result["b"][1], reference["b"][1])
    assert answer.format is Format.EXPORTED


def test_example_inputs_and_mode(path: Path) -> None:
    answer = read(path)
    assert isinstance(answer.example_inputs, dict)
    assert answer.example_inputs["x"].shape == (2, 3, 8, 8)
    assert answer.example_inputs["scale"] == 2.0
    answer.model.eval()
    with pytest.raises(DeployedModelError, match="mode baked in"):
        answer.model.train()


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_hostile_sample_inputs_are_left_out(path: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(((Touch(tmp_path / "touched"),), {}), buffer)
    edit(path, SAMPLES, lambda _: buffer.getvalue())
    answer = read(path)
    assert answer.example_inputs is None
    assert not (tmp_path / "touched").exists()


def _graph(program: Any) -> Any:
    return program["graph_module"]["graph"]


def _signature(program: Any) -> Any:
    return program["graph_module"]["module_call_graph"][0]["signature"]


def _symbolic_size(program: Any) -> Any:
    sizes = next(
        size for meta in _graph(program)["tensor_values"].values() for size in meta["sizes"] if "as_expr" in size
    )
    return sizes["as_expr"]


CODE = "__import__('pathlib').Path('touched').touch()"
HOSTILE: dict[str, Callable[[Any], Any]] = {
    "symbolic size": lambda p: _symbolic_size(p).update(expr_str=CODE),
    "attribute of a symbol": lambda p: _symbolic_size(p).update(expr_str="Symbol('s1').__class__"),
    "operator": lambda p: _graph(p)["nodes"][0].update(target="torch.os.system"),
    "file operator": lambda p: _graph(p)["nodes"][0].update(target="torch.ops.aten.from_file.default"),
    "node name": lambda p: _graph(p)["nodes"][0].update(name=CODE),
    "argument name": lambda p: _graph(p)["nodes"][0]["inputs"][0].update(name=CODE),
    "tree": lambda p: _signature(p).update(
        in_spec=json.dumps([1, {"type": "enum.Enum", "context": '"os"', "children_spec": []}])
    ),
    "string argument": lambda p: _graph(p)["nodes"][0]["inputs"][0].update(arg={"as_string": f"' + {CODE} + '"}),
    "custom object": lambda p: _graph(p)["inputs"].append({"as_custom_obj": {"name": "x", "class_fqn": "a.B"}}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_code_in_the_graph_is_refused(what: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    edit_json(path, MODEL, HOSTILE[what])
    with pytest.raises(LoadError, match="--trust-pickle"):
        read(path)
    assert not (tmp_path / "touched").exists()


def test_guards_are_left_out(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    edit_json(path, MODEL, lambda program: program.update(guards_code=[CODE]))
    read(path).model(torch.randn(2, 3, 8, 8), scale=2.0)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "record", ["data/weights/model_weights_config.json", "data/constants/model_constants_config.json"]
)
def test_pickled_payloads_are_refused(record: str, path: Path) -> None:
    edit_json(path, record, lambda config: next(iter(config["config"].values())).update(use_pickle=True))
    with pytest.raises(LoadError, match=r"pickled payload.*--trust-pickle"):
        read(path)


@pytest.mark.parametrize("record", ["data/weights/model.pt", "data/constants/model.pt", "data/aotinductor/model/x.so"])
def test_other_payloads_are_refused(record: str, path: Path) -> None:
    edit(path, record, lambda _: b"x")
    with pytest.raises(LoadError, match="--trust-pickle"):
        read(path)


def test_path_of_a_payload_stays_inside_the_archive(path: Path) -> None:
    record = "data/weights/model_weights_config.json"
    edit_json(path, record, lambda c: next(iter(c["config"].values())).update(path_name="custom_obj_0"))
    with pytest.raises(LoadError, match="not a tensor"):
        read(path)


def test_damaged(path: Path) -> None:
    edit(path, MODEL, lambda _: b"{}")
    with pytest.raises(LoadError, match="cannot read"):
        read(path)


@pytest.mark.parametrize("name", ["attrgetter", "methodcaller", "itemgetter", "call", "setitem", "__getattribute__"])
def test_only_arithmetic_of_operator(name: str) -> None:
    assert name.startswith("__") or hasattr(operator, name) or name == "call"
    assert not OPERATOR.fullmatch(f"_operator.{name}")


@pytest.mark.models
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_real_models(name: str, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision").models
    size = 224 if "vit" in name else 32
    x = torch.randn(1, 3, size, size)
    model = models.get_model(name, weights=None).eval()
    with open(tmp_path / "m.pt2", "wb") as file:
        torch.export.save(torch.export.export(model, (x,)), file)
    with torch.no_grad():
        assert torch.allclose(read(tmp_path / "m.pt2").model(x), model(x), atol=1e-5)
