"""What a pickle describes is checked as a whole before anything of it exists."""

from __future__ import annotations

import argparse
import copyreg
import functools
import io
import pickle
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.list_inert_classes import faults, reached
from normfuse.errors import LoadError
from normfuse.pickles.allowed import Allowed, Kind, is_plain_module_class, listed
from normfuse.pickles.inert import Inert, read_inert
from normfuse.unpickle import unpickle

ROOT = Path(__file__).resolve().parent.parent


def saved(value: object, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def with_state(module: nn.Module, **state: Any) -> nn.Module:
    vars(module).update(state)
    return module


class Call:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


# modules hold modules, tensors and data


STATES: dict[str, dict[str, Any]] = {
    "a record among the modules": {"_modules": {"a": argparse.Namespace()}},
    "a text among the modules": {"_modules": {"a": "b"}},
    "a tensor among the modules": {"_modules": {"a": torch.ones(1)}},
    "a module among the parameters": {"_parameters": {"a": nn.ReLU()}},
    "a text among the buffers": {"_buffers": {"a": "b"}},
    "modules in a list": {"_modules": [nn.ReLU()]},
    "a function for the modules": {"_modules": nn.functional.relu},
    "a hook of a function": {"_forward_pre_hooks": {0: nn.functional.relu}},
    "a hook of a module": {"_backward_hooks": {0: nn.ReLU()}},
    "hooks in a list": {"_forward_hooks": [nn.functional.relu]},
    "an attribute of Python": {"__deepcopy__": None},
    "the class": {"__class__": nn.Conv2d},
    "an attribute that is no identifier": {"a b": 1},
    "a partial for a method": {"forward": functools.partial(nn.functional.relu)},
    "a module for a method": {"train": nn.ReLU()},
    "a record for a method": {"eval": argparse.Namespace()},
}


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("state", STATES)
def test_states_that_are_refused(state: str, zip_format: bool, tmp_path: Path):
    module = nn.Sequential(with_state(nn.ReLU(), **STATES[state]))
    with pytest.raises(LoadError):
        unpickle(saved(module, tmp_path / "m.pt", _use_new_zipfile_serialization=zip_format))


def test_data_in_a_module_is_kept(tmp_path: Path):
    kept = {
        "sizes": [1, (2, 3)],
        "table": {"a": torch.float16, torch.int8: None, "set": {1, 2}},
        "layers": [nn.ReLU(), nn.Linear(2, 2)],
        "act": nn.functional.relu,
        "make": functools.partial(nn.functional.softmax, dim=1),
        "norm": nn.LayerNorm,
        "shape": torch.Size([1, 2]),
        "where": torch.device("cpu"),
        "raw": b"\x00\xff",
        "ordered": OrderedDict(a=1),
    }
    loaded = unpickle(saved(with_state(nn.ReLU(), **kept), tmp_path / "m.pt"))
    for name in ("sizes", "table", "act", "norm", "shape", "where", "raw", "ordered"):
        assert getattr(loaded, name) == kept[name]
    assert isinstance(loaded.layers[1], nn.Linear)
    assert loaded.make.func is nn.functional.softmax
    assert loaded.make.keywords == {"dim": 1}


def test_cycles_and_shared_objects_stay_so(tmp_path: Path):
    inner, items = nn.Linear(2, 2), []
    items.append(items)
    module = with_state(nn.Sequential(inner, inner), items=items, aside=[inner])
    vars(module[0])["parent"] = module
    loaded = unpickle(saved(module, tmp_path / "m.pt"))
    assert loaded[0] is loaded[1] is loaded.aside[0]
    assert loaded[0].parent is loaded
    assert loaded.items[0] is loaded.items


def test_graph_modules_are_refused_wherever_they_are_defined(tmp_path: Path):
    """Such a module compiles code that its state holds, when it is copied."""
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    kind = feature_extraction.DualGraphModule
    assert Allowed().kind(f"{kind.__module__}.DualGraphModule") is None
    with pytest.raises(LoadError, match="compiles code"):
        Allowed([f"{kind.__module__}.DualGraphModule"])
    evil = with_state(object.__new__(kind), **vars(nn.Identity()), _graph=nn.Identity())

    class Pickler(pickle.Pickler):
        def reducer_override(self, o: Any) -> Any:
            return (copyreg.__newobj__, (kind,), vars(o)) if type(o) is kind else NotImplemented

    module = with_state(nn.ReLU(), aside=evil)
    with pytest.raises(LoadError, match="DualGraphModule"):
        unpickle(saved(module, tmp_path / "m.pt", pickle_module=types.SimpleNamespace(Pickler=Pickler, __name__="p")))


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "builtins.eval", "torch.load", "torch.hub.load", "functools.partial", "pathlib.Path"),
        *("torch.nn.functional.relu", "torch.fx.graph_module.GraphModule", "torch.jit._script.ScriptModule"),
        *("subprocess.Popen", "importlib.import_module", "torch.Tensor", "argparse.Namespace", "a b.c", "a\nb.c"),
    ],
)
def test_only_classes_of_modules_can_be_allowed(name: str):
    with pytest.raises(LoadError, match="--allow-global"):
        Allowed([name])


@pytest.mark.parametrize("function", [eval, pickle.loads, Path, io.BytesIO, print, zipfile.ZipFile, nn.functional.relu])
def test_only_layers_are_suggested(function: Callable[..., Any], tmp_path: Path):
    with pytest.raises(LoadError) as caught:
        unpickle(saved({"a": Call(function, "1")}, tmp_path / "m.pt"))
    assert "--allow-global" not in str(caught.value)


# tensors lie in their memory


def _strided(offset: Any, size: Any, stride: Any) -> bytes:
    """Return the pickle of ``torch.arange(4.)`` with a place in its memory of the file's choice."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if obj is Pickler else None

    buffer = io.BytesIO()
    call = Call(torch._utils._rebuild_tensor_v2, Pickler, offset, size, stride, False, OrderedDict())  # type: ignore[attr-defined]
    Pickler(buffer, protocol=2).dump(call)
    return buffer.getvalue()


def _archive(path: Path, pickled: bytes, content: bytes) -> Path:
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", pickled, len(pickled))
    writer.write_record("data/0", content, len(content))
    writer.write_end_of_file()
    return path


FOUR = torch.arange(4.0).numpy().tobytes()


def test_a_tensor_inside_of_its_memory(tmp_path: Path):
    loaded = unpickle(_archive(tmp_path / "m.pt", _strided(1, (3, 1), (1, 5)), FOUR))
    assert loaded.tolist() == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((0, (5,), (1,)), "larger than its memory"),
        ((1, (4,), (1,)), "larger than its memory"),
        ((0, (2, 2), (1, 3)), "larger than its memory"),
        ((-1, (1,), (1,)), "damaged place"),
        ((0, (1 << 40,), (0,)), "elements of a memory"),
        ((0, (1 << 40, 1 << 40), (0, 0)), "elements of a memory"),
        ((0, (-1,), (1,)), "not made of numbers"),
        ((0, (2,), (-1,)), "not made of numbers"),
        ((0, (1.5,), (1,)), "not made of numbers"),
        ((0, (2, 2), (1,)), "damaged place"),
        (("0", (1,), (1,)), "damaged place"),
    ],
)
def test_a_tensor_outside_of_its_memory(place: tuple[Any, Any, Any], message: str, tmp_path: Path):
    with pytest.raises(LoadError, match=message):
        unpickle(_archive(tmp_path / "m.pt", _strided(*place), FOUR))


@pytest.mark.parametrize("content", [FOUR[:-1], FOUR + b"0", b""])
def test_a_storage_of_another_length_than_it_says(content: bytes, tmp_path: Path):
    with pytest.raises(LoadError, match="elements, which it does not"):
        unpickle(_archive(tmp_path / "m.pt", _strided(0, (1,), (1,)), content))


def test_a_damaged_weight_is_noticed(tmp_path: Path):
    path = saved({"a": torch.zeros(100)}, tmp_path / "m.pt")
    content = bytearray(path.read_bytes())
    content[content.index(bytes(400)) + 40] = 1
    path.write_bytes(content)
    with pytest.raises(LoadError, match="CRC"):
        unpickle(path)


def test_a_zip_that_unpacks_to_far_more_than_its_size(tmp_path: Path):
    saved({"a": torch.zeros(1000)}, tmp_path / "m.pt")
    with (
        zipfile.ZipFile(tmp_path / "m.pt") as old,
        zipfile.ZipFile(tmp_path / "n.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("m/data/1", bytes(10_000_000))
    with pytest.raises(LoadError, match="times its size"):
        unpickle(tmp_path / "n.pt")


@pytest.mark.parametrize("index", [1 << 20, (1 << 32) - 1])
def test_numbers_of_values_that_would_take_memory(index: int):
    with pytest.raises(pickle.UnpicklingError, match="beyond their count"):
        read_inert(io.BytesIO(b"\x80\x02Nr" + index.to_bytes(4, "little") + b"."))


@pytest.mark.parametrize("depth", [100_000])
def test_nesting_without_end(depth: int, tmp_path: Path):
    pickled = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    with pytest.raises(LoadError):
        unpickle(_archive(tmp_path / "m.pt", pickled, FOUR))


def test_reading_makes_nothing(monkeypatch: pytest.MonkeyPatch):
    """Calls, state and items of what a pickle names end up as data."""
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol=2).dump([Call(eval, "1"), Call(OrderedDict), nn.Linear, {"a": nn.ReLU()}])
    monkeypatch.setattr("builtins.eval", lambda *_: pytest.fail("it was called"))
    made, ordered, reference, table = read_inert(io.BytesIO(buffer.getvalue()))
    assert (made.path, made.args) == ("builtins.eval", ("1",))
    assert ordered.path == "collections.OrderedDict"
    assert reference.path == "torch.nn.modules.linear.Linear"
    assert isinstance(table["a"], Inert)
    assert "_modules" in table["a"].state


# the list of classes


def test_listed_classes_are_plain_modules():
    heads = {module.partition(".")[0] for table in listed().values() for module in table}
    assert heads == {"torch", "torchvision", "timm", "transformers", "normfuse"}
    allowed = Allowed()
    for module, names in listed()[Kind.MODULE].items():
        if module.startswith(("torch.nn.", "normfuse.")):
            for name in names:
                cls = allowed.find(f"{module}.{name}")
                assert is_plain_module_class(cls)
                assert not [fault for _, function in reached(cls) for fault in faults(function)]


def test_every_layer_of_ours_is_listed():
    """What normfuse itself puts into models loads again; what cannot is named here."""
    from benchmarks.list_inert_classes import modules_of

    known = listed()[Kind.MODULE]
    for package in ("normfuse.layers", "normfuse.quantization"):
        for module in modules_of(package):
            classes = {
                n for n, c in vars(module).items() if is_plain_module_class(c) and c.__module__ == module.__name__
            }
            assert {name for name in classes if "<" not in name} <= known.get(module.__name__, frozenset()), module


class Evil(nn.Module):
    """A class of every fault that the list must not hold."""

    def forward(self, x: Any) -> Any:
        return self.helper(x)

    def helper(self, x: Any) -> Any:
        return getattr(self, self.name)(x)

    def train(self, mode: bool = True) -> Any:
        exec(self.code)
        return importlib_like(self.path)

    @property
    def text(self) -> str:
        return open(self.path).read()


def importlib_like(path: str) -> Any:
    return __import__(path)


def test_the_search_for_faults_finds_them():
    found = {fault for _, function in reached(Evil) for fault in faults(function)}
    assert found == {
        "calls an attribute by a computed name: getattr(self, self.name)",
        "calls exec",
        "calls __import__",
        "calls open",
    }


CONTROL = """
import sys
sys.path[:0] = ["benchmarks"]
import gadgets
from torch import nn

class Reads(nn.Module):
    def forward(self, x):
        return open(self.path).read()

class Runs(nn.Module):
    def __deepcopy__(self, memo):
        exec(self.code)

class Imports(nn.Module):
    @property
    def helper(self):
        return __import__(self.name)

sys.addaudithook(gadgets.audit)
gadgets.signal.signal(gadgets.signal.SIGALRM, lambda *_: None)
for cls, event in ((Reads, "open"), (Runs, "compile"), (Imports, "import"), (nn.Linear, "")):
    found = gadgets.tried(cls.__name__, cls)
    assert bool(found) == bool(event) and all(event in text for text in found), (cls, found)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_hostile_states_reach_nothing(tmp_path: Path):
    """The search finds what is there to be found, and finds nothing in what may be loaded."""
    (tmp_path / "control.py").write_text(CONTROL)
    search = ["benchmarks/gadgets.py", "--packages", "others", "--out", str(tmp_path / "gadgets.json")]
    for program in ([str(tmp_path / "control.py")], search):
        done = subprocess.run([sys.executable, *program], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr + done.stdout
