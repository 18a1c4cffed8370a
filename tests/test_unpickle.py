"""Pickled models load without running code from their file, or do not load."""

from __future__ import annotations

import functools
import importlib
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normfuse.errors import LoadError
from normfuse.pickles.allowed import ENUMS, FUNCTIONS, RECORDS, Allowed, Kind
from normfuse.pickles.objects import Uncallable
from normfuse.serialize import read
from normfuse.unpickle import unpickle


class Call:
    """Pickles to a call of a function with arguments."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


class Net(nn.Module):
    """A class that normfuse does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def saved(value: object, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


# hostile files


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["root", "nested", "in a module", "hook"])
def test_hostile_pickle_never_runs(zip_format: bool, protocol: int, place: str, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    payload: Any = Call(Path.touch, target)
    if place == "nested":
        payload = {"state_dict": {"a": torch.ones(1)}, "extra": [payload]}
    elif place == "in a module":
        module = nn.Linear(2, 2)
        vars(module)["payload"] = payload
        payload = module
    elif place == "hook":
        module = nn.Linear(2, 2)
        module._forward_hooks[0] = payload
        payload = module
    path = saved(payload, tmp_path / "x.pt", _use_new_zipfile_serialization=zip_format, pickle_protocol=protocol)
    with pytest.raises(LoadError):
        read(path)
    assert not target.exists()


def test_trust_pickle_is_the_only_way_to_run_it(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    path = saved({"a": Call(Path.touch, target)}, tmp_path / "x.pt")
    with pytest.raises(LoadError, match="no state_dict"):
        read(path, trust_pickle=True)
    assert target.exists()


@pytest.mark.parametrize(
    "function", [getattr, eval, exec, __import__, functools.partial, importlib.import_module, nn.Module.register_module]
)
def test_calls_are_refused(function: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(LoadError):
        read(saved({"x": Call(function, "abs")}, tmp_path / "x.pt"))


class Recorder(nn.Module):
    """Stands in for a known class whose constructor must not run."""

    calls: list[tuple] = []  # noqa: RUF012 - what the test reads

    def __init__(self, *args: object) -> None:
        Recorder.calls.append(args)
        super().__init__()


def test_a_file_cannot_run_a_constructor(tmp_path: Path) -> None:
    path = saved({"x": Call(Recorder, "hf-hub:someone/something")}, tmp_path / "x.pt")
    Recorder.calls.clear()
    with pytest.raises(LoadError, match="with arguments"):
        unpickle(path, allow_globals=[f"{Recorder.__module__}.Recorder"])
    with pytest.raises(LoadError, match="lacks its"):
        unpickle(saved({"x": Call(Recorder)}, path), allow_globals=[f"{Recorder.__module__}.Recorder"])
    assert Recorder.calls == []


@pytest.mark.parametrize("attribute", ["forward", "eval", "named_modules"])
def test_methods_cannot_be_replaced(attribute: str, tmp_path: Path) -> None:
    module = nn.ReLU()
    vars(module)[attribute] = nn.functional.relu
    with pytest.raises(LoadError, match=attribute):
        unpickle(saved(module, tmp_path / "x.pt"))


def test_methods_of_hidden_modules_cannot_be_replaced(tmp_path: Path) -> None:
    inner, outer = nn.ReLU(), nn.Sequential()
    vars(inner)["forward"] = nn.functional.relu
    vars(outer)["aside"] = [{"inner": inner}]
    with pytest.raises(LoadError, match="forward"):
        unpickle(saved(outer, tmp_path / "x.pt"))


@pytest.mark.parametrize("table", ["_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks"])
def test_hooks_cannot_be_smuggled_in(table: str, tmp_path: Path) -> None:
    module = nn.ReLU()
    vars(module)[table][0] = nn.functional.relu
    with pytest.raises(LoadError, match=table):
        unpickle(saved(module, tmp_path / "x.pt"))


def test_partial_of_a_foreign_class_stays_inert(tmp_path: Path) -> None:
    module = nn.ReLU()
    vars(module)["make"] = functools.partial(Net)
    loaded = unpickle(saved(module, tmp_path / "x.pt"), allow_globals=[f"{Net.__module__}.Net"])
    assert isinstance(loaded.make, Uncallable)
    with pytest.raises(LoadError, match="--trust-pickle"):
        loaded.make()


# what is allowed


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("torch.nn.modules.conv.Conv2d", True),
        ("torch.nn.functional.relu", True),
        ("torch.nn.modules.module.register_module_forward_hook", False),
        ("torch.nn.modules.conv.math", False),
        ("torch.jit._script.ScriptModule", False),
        ("torch.fx.graph_module.GraphModule", False),
        ("torch.distributed.nn.api.remote_module.RemoteModule", False),
        ("torch.nn.parallel.distributed.DistributedDataParallel", False),
        ("torch.hub.load", False),
        ("functools.partial", False),
        ("builtins.getattr", False),
        ("os.system", False),
        ("torch.nn.modules.__builtins__.eval", False),
    ],
)
def test_names_that_are_listed(name: str, allowed: bool) -> None:
    assert (Allowed().kind(name) not in (None, Kind.PARTIAL)) is allowed


def test_only_classes_and_pure_helpers_are_listed() -> None:
    heads = {name.partition(".")[0] for name in FUNCTIONS | RECORDS | ENUMS}
    assert heads == {"torch", "torchvision", "timm", "transformers", "normfuse", "argparse"}


def test_refusal_names_the_classes_and_the_ways_out(tmp_path: Path) -> None:
    name = f"{Net.__module__}.Net"
    with pytest.raises(LoadError) as caught:
        unpickle(saved(Net(), tmp_path / "x.pt"))
    for text in (name, "state_dict", f"--allow-global {name}", "--trust-pickle", "trust its source"):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_allow_global(tmp_path: Path) -> None:
    net = Net()
    loaded = unpickle(saved(net, tmp_path / "x.pt"), allow_globals=[f"{Net.__module__}.Net"])
    assert type(loaded) is Net
    assert torch.equal(loaded.layer.weight, net.layer.weight)


@pytest.mark.parametrize("name", ["os.system", "builtins.getattr", "no_such_package.Net", "NoModule"])
def test_allow_global_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="--allow-global"):
        unpickle(saved(Net(), tmp_path / "x.pt"), allow_globals=[name])


def test_allowed_names_do_not_leak_into_the_process(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())  # torch keeps a set: its order is not kept
    unpickle(saved(nn.ReLU(), tmp_path / "x.pt"))
    assert set(torch.serialization.get_safe_globals()) == before


def test_reading_imports_nothing_the_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "innocent_looking.py").write_text("class Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    pickled = b"\x80\x02cinnocent_looking\nNet\n)\x81."
    buffer = io.BytesIO()
    torch.save({"a": 1}, buffer)
    path = tmp_path / "x.pt"
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", pickled, len(pickled))
    writer.write_end_of_file()
    with pytest.raises(LoadError, match="innocent_looking"):
        read(path)
    assert "innocent_looking" not in sys.modules


MODULES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(2, 3),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, activation="gelu"),
    "sequential": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish()),
    "data parallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torch_load_by_themselves(name: str, tmp_path: Path) -> None:
    module = MODULES[name]()
    loaded = unpickle(saved(module, tmp_path / "x.pt"))
    assert repr(loaded) == repr(module)
    for key, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_hooks_of_torch_itself_are_kept(norm: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    module = norm(nn.Linear(3, 3)).eval()
    loaded = unpickle(saved(module, tmp_path / "x.pt"))
    x = torch.randn(2, 3)
    assert torch.equal(loaded(x), module(x))


@pytest.mark.models
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "mobilenet_v3_small", "densenet121"])
def test_torchvision(name: str, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision").models
    module = models.get_model(name, weights=None).eval()
    loaded = unpickle(saved(module, tmp_path / "x.pt"))
    size = 224 if name == "vit_b_16" else 64
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(x), module(x))


@pytest.mark.models
def test_torchvision_detector(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision").models
    module = models.get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=3)
    loaded = unpickle(saved(module.eval(), tmp_path / "x.pt"))
    x = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        assert torch.equal(loaded(x)[0]["boxes"], module(x)[0]["boxes"])


@pytest.mark.models
@pytest.mark.parametrize("name", ["efficientnet_lite0", "regnetx_002", "convnext_atto", "test_vit"])
def test_timm(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model(name).eval()
    loaded = unpickle(saved(module, tmp_path / "x.pt"))
    size = module.default_cfg["input_size"][-1] if "vit" in name else 64
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(x), module(x))


def test_torchvision_keeps_the_class_it_refers_to(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision").models
    assert unpickle(saved(models.resnet18(), tmp_path / "x.pt"))._norm_layer is nn.BatchNorm2d


@pytest.mark.parametrize("protocol", [2, 4])
def test_legacy_module(protocol: int, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 2))
    module[2].weight = nn.Parameter(module[0].weight.detach().flatten()[3:7].view(2, 2))  # memory of another tensor
    path = saved(module, tmp_path / "x.pt", _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    loaded = unpickle(path)
    assert isinstance(loaded, nn.Sequential)
    for key, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert loaded[2].weight.data_ptr() == loaded[0].weight.data_ptr() + 3 * 4


@pytest.mark.parametrize("junk", [b"\x80\x02c", b"\x80\x02}.", b"", pickle.dumps({"a": len}, protocol=4)])
def test_junk_inside_a_zip_is_a_load_error(junk: bytes, tmp_path: Path) -> None:
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "x.pt"))
    writer.write_record("data.pkl", junk, len(junk))
    writer.write_end_of_file()
    with pytest.raises(LoadError):
        read(tmp_path / "x.pt")
