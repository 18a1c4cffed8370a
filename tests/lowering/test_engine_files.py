"""What is beside an engine, what it lists, and what TensorRT's errors become: nothing here needs TensorRT."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from normfuse.errors import LoadError, LoweringError, MissingDependencyError
from normfuse.lowering.engine_errors import translate
from normfuse.lowering.engine_norms import CLASSES, norm_layers, norm_nodes
from normfuse.lowering.engine_sidecar import Sidecar, read_sidecar, sha256, sidecar_path
from normfuse.lowering.graphs import SCOPES
from normfuse.lowering.tensorrt_build import read_layers


def sidecar(engine: Path, **changes: Any) -> Sidecar:
    engine.write_bytes(b"an engine")
    values: dict[str, Any] = {
        "tensorrt": {"package": "tensorrt_rtx", "version": "1.7"},
        "target": ["sm_86"],
        "device": None,
        "precision": "fp16",
        "shapes": {"x": [[1, 3], [2, 3], [4, 3]]},
        "dtypes": {"x": "HALF", "y": "HALF"},
        "outputs": {"y": [-1, 5]},
        "layers": [],
        "norm_layers": [],
        "network": {"CONVOLUTION": 1},
        "source_sha256": "a",
        "onnx_sha256": "b",
        "engine_sha256": sha256(engine),
        "normfuse": "0",
    }
    return Sidecar(**(values | changes))


def test_a_description_is_read_as_it_was_written(tmp_path: Path):
    engine = tmp_path / "x.engine"
    written = sidecar(engine)
    written.write(sidecar_path(engine))
    assert sidecar_path(engine).name == "x.engine.json"
    assert read_sidecar(engine) == written
    written.require_file(engine)


def test_an_engine_without_a_readable_description_is_refused(tmp_path: Path):
    engine = tmp_path / "x.engine"
    with pytest.raises(LoadError, match=r"no file .*x\.engine$"):
        read_sidecar(engine)
    description = dataclasses.asdict(sidecar(engine))
    with pytest.raises(LoadError, match=r"no file .*x\.engine\.json"):
        read_sidecar(engine)
    for text, reason in (
        ("{", "not the description of an engine"),
        (json.dumps({"schema_version": 1}), "not the description of an engine"),
        (json.dumps(description | {"schema_version": 2}), "schema is version 2, this reads 1"),
    ):
        sidecar_path(engine).write_text(text)
        with pytest.raises(LoadError, match=reason):
            read_sidecar(engine)


def test_a_damaged_engine_is_refused(tmp_path: Path):
    found = sidecar(tmp_path / "x.engine")
    (tmp_path / "x.engine").write_bytes(b"an enginf")
    with pytest.raises(LoadError, match="or damaged: rebuild it"):
        found.require_file(tmp_path / "x.engine")


def test_an_engine_of_another_version_or_for_another_gpu_is_refused(tmp_path: Path):
    engine = tmp_path / "x.engine"
    found = sidecar(engine)
    found.require_package("1.7", engine)
    with pytest.raises(LoadError, match=r"built by tensorrt_rtx 1\.7, this is 1\.8"):
        found.require_package("1.8", engine)
    found.require_gpu((8, 6), "A card", engine)
    with pytest.raises(LoadError, match=r"built for sm_86, this is sm_90 \(H200\): rebuild it with --target sm_90"):
        found.require_gpu((9, 0), "H200", engine)
    anywhere = sidecar(engine, target=[])
    anywhere.require_gpu((8, 9), "A card", engine)
    with pytest.raises(LoadError, match=r"built for sm_80 and later, this is sm_75"):
        anywhere.require_gpu((7, 5), "T4", engine)


# which nodes compute a norm


def node(operator: str, inputs: list[str], output: str, **names: str) -> onnx.NodeProto:
    made = helper.make_node(operator, inputs, [output], name=f"node_{output}")
    for key, value in names.items():
        made.metadata_props.add(key=SCOPES if key == "scopes" else CLASSES, value=value)
    return made


def graph_of(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    return helper.make_model(helper.make_graph(list(nodes), "g", values[:1], values[1:]))


def test_norms_are_found_by_operator_by_module_and_by_shape():
    model = graph_of(
        node("LayerNormalization", ["x", "w"], "a"),
        node("Mul", ["a", "w"], "b", scopes="['', 'stem', 'stem.norm', 'm']", classes="['M', 'S', 'my.L1Norm', 'm']"),
        node("Conv", ["b", "k"], "c", scopes="['', 'b', 'b.conv', 'c']", classes="['M', 'ConvNormAct', 'C', 'c']"),
        node("ReduceMean", ["c"], "d"),
        node("Add", ["d", "eps"], "e"),
        node("Sqrt", ["e"], "f"),
        node("Sqrt", ["x"], "y"),
    )  # fmt: skip
    found = norm_nodes(model)
    assert found == {"node_a": "LayerNormalization", "node_b": "stem.norm", "node_f": "a norm written out at node_f"}


def test_layers_that_hold_a_norm_alone_or_fused():
    layers = [
        {"name": "one", "type": "kgen", "onnx": ["node_a"]},
        {"name": "two", "type": "correlation", "onnx": ["node_conv", "node_relu"]},
        {"name": "three", "type": "kgen", "onnx": ["node_add", "node_b", "node_c"]},
    ]
    norms = {"node_a": "norm1", "node_b": "norm2", "node_c": "norm2"}
    assert list(norm_layers(layers, norms)) == [
        {"name": "one", "type": "kgen", "norms": ["norm1"]},
        {"name": "three", "type": "kgen", "norms": ["norm2"]},
    ]


def test_the_list_of_layers_in_the_log_is_read():
    text = (
        "Layers:\nName: __myl_MeanSub_myl0_1, LayerType: kgen, Inputs: [ { Name: x } ], Outputs: [], "
        "Metadata: [ONNX Layer: node_b][ONNX Layer: node_a][ONNX Layer: node_b]\nsomething else\n"
        "Name: node_conv + act, LayerType: correlation, Inputs: []"
    )
    assert read_layers(text) == [
        {"name": "__myl_MeanSub_myl0_1", "type": "kgen", "onnx": ["node_a", "node_b"]},
        {"name": "node_conv + act", "type": "correlation", "onnx": []},
    ]


# errors

JOB = {"package": "tensorrt_rtx", "onnx": "x.onnx"}
DRIVER = "Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient)"
TARGETS = (
    "Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for target(s) sm86, because the model contains "
    "HW-specific datatypes: fp8_e4m3. In compileGraph)"
)


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ({"stage": "import", "message": "libcuda.so.1"}, MissingDependencyError, r"cannot be imported \(libcuda"),
        ({"stage": "device"}, MissingDependencyError, "no NVIDIA driver or GPU here"),
        ({"stage": "target", "unknown": ["sm_90"], "known": ["sm_86"]}, LoweringError, "no target sm_90: .* has sm_86"),
        ({"stage": "target", "message": "ahead of time"}, LoweringError, "leave --target out, or use tensorrt_rtx"),
        ({"stage": "profile", "inputs": {"x": [-1, 3]}, "errors": ["MIN<=OPT"]}, LoweringError, r"x:-1x3, -1 is any"),
        (
            {"stage": "build", "errors": [DRIVER, TARGETS]},
            LoweringError,
            "fp8_e4m3 is not for sm86: leave these targets",
        ),
        (
            {"stage": "build", "errors": ["a\nb"]},
            LoweringError,
            "cannot build the engine: a; the whole log is in x.log",
        ),
        ({"stage": "build", "errors": []}, LoweringError, "no reason given"),
        ({"stage": "parse", "parser": [], "errors": []}, LoweringError, "found no network"),
    ],
)
def test_errors_say_what_is_wrong_and_what_to_do(answer: Any, kind: Any, text: str):
    error = translate(answer, JOB, Path("x.log"))
    assert isinstance(error, kind)
    with pytest.raises(kind, match=text):
        raise error
    assert "\n" not in str(error)


def test_a_node_that_cannot_be_parsed_is_named_with_its_module(tmp_path: Path):
    onnx.save(graph_of(node("Fancy", ["x"], "y", scopes="['', 'neck', 'neck.odd', 'fancy']")), tmp_path / "x.onnx")
    job = JOB | {"onnx": str(tmp_path / "x.onnx")}
    reason = {"node": "node_y", "operator": "Fancy", "known": False, "reason": "Assertion failed: false"}
    text = str(translate({"stage": "parse", "parser": [reason], "errors": []}, job, Path("x.log")))
    assert text.startswith("TensorRT cannot take Fancy (node_y, in neck.odd): it has no such operator; replace that")
    reason |= {"known": True, "reason": "Assertion failed: Mixed precision between inputs"}
    text = str(translate({"stage": "parse", "parser": [reason], "errors": []}, job, Path("x.log")))
    assert "(node_y, in neck.odd): Mixed precision between inputs; its inputs have different types" in text
