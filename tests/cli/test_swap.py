from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import normfuse
from normfuse.cli import calibration_data
from normfuse.errors import LoadError
from normfuse.layers import L1LayerNorm, UnifiedNorm
from tests.transformers_small import ViT, images

FACTORY = "tests.transformers_small:ViT"


@pytest.fixture
def vit_file(folder: Path) -> str:
    torch.manual_seed(0)
    torch.save(ViT().state_dict(), "vit.pt")
    np.save("calib.npy", images(12).numpy())
    return "vit.pt"


def swap(run, *args: object):
    return run("swap", "vit.pt", "--arch", FACTORY, "--to", "unified", "--calib", "calib.npy", *args)


def count(model: nn.Module) -> int:
    return sum(isinstance(module, UnifiedNorm) for module in model.modules())


def test_writes_a_swapped_file_that_folds(run, vit_file, folder: Path):
    result = swap(run)
    assert result.exit_code == 0, result.output
    assert "5 of 5 norms" in result.stdout
    assert "normfuse fold vit.swapped.pt" in result.stdout
    assert sorted(os.listdir(folder)) == ["calib.npy", "vit.pt", "vit.swapped.pt"]
    assert count(normfuse.load("vit.swapped.pt", arch=FACTORY)) == 5
    folded = run("fold", "vit.swapped.pt", "--arch", FACTORY, "--require-fold", "-o", "vit.folded.pt")
    assert folded.exit_code == 0, folded.output
    assert "PASSED" in folded.stdout
    assert count(normfuse.load("vit.folded.pt", arch=FACTORY)) == 0


def test_json(run, vit_file):
    document = json.loads(swap(run, "--json", "-", "--exclude", "norm").stdout)
    assert document["swapped"] == 4
    assert [pair["reason"] for pair in document["pairs"]].count("EXCLUDED") == 1
    fits = [pair["unexplained"] for pair in document["pairs"] if pair["action"] == "applied"]
    assert len(fits) == 4
    assert all(0 <= fit < 1 for fit in fits)
    assert 0 < document["verify"]["cosine"] <= 1
    assert document["model"]["inputs"][0]["shape"] == [12, 1, 8, 8]
    assert document["next"] == "normfuse fold vit.swapped.pt"


def test_reconstruction_comes_nearer_and_keeps_a_checkpoint(run, vit_file, folder: Path):
    plain = json.loads(swap(run, "--json", "-", "--batch-size", 4).stdout)
    options = ("--reconstruct-steps", 10, "--lr", "1e-3", "--checkpoint", "fit.pt", "-o", "fitted.pt")
    fitted = json.loads(swap(run, "--json", "-", "--batch-size", 4, *options).stdout)
    assert fitted["verify"]["max_abs"] < plain["verify"]["max_abs"]
    assert (folder / "fit.pt").exists()
    result = swap(run, "--reconstruct-steps", 11, "--checkpoint", "fit.pt", "-o", "other.pt")
    assert result.exit_code == 2
    assert "another fit" in result.stderr
    assert not (folder / "other.pt").exists()


def test_a_tolerance_must_hold(run, vit_file, folder: Path):
    result = swap(run, "--atol", "1e-9")
    assert result.exit_code == 1
    assert not (folder / "vit.swapped.pt").exists()
    assert swap(run, "--atol", "100").exit_code == 0


def test_requirement(run, vit_file):
    assert swap(run, "--require-swap", "--exclude", "norm").exit_code == 3


def test_wrong_data(refuses, vit_file):
    np.save("wide.npy", np.zeros((2, 3, 9, 9), dtype=np.float32))
    Path("text.npy").write_text("no array")
    command = ("swap", "vit.pt", "--arch", FACTORY, "--to", "unified", "--calib")
    assert "does not run on" in refuses(*command, "wide.npy", code=4)
    assert "not a .npz or .npy file" in refuses(*command, "text.npy", code=4)
    assert "does not exist" in refuses(*command, "nothing.npy", code=2)


def test_missing_options_and_existing_file(refuses, vit_file):
    assert "--calib" in refuses("swap", "vit.pt", "--to", "unified", code=2)
    Path("vit.swapped.pt").touch()
    assert "--force" in refuses("swap", "vit.pt", "--arch", FACTORY, "--to", "unified", "--calib", "calib.npy", code=2)


def read(path: Path, **options: int) -> list:
    return calibration_data.read(path, nn.Identity(), **{"batch_size": 2, "limit": 5, **options})


def test_arrays_and_tensors(folder: Path):
    x, ids = torch.randn(7, 3), torch.arange(7)
    np.savez("named.npz", x=x.numpy(), ids=ids.numpy())
    torch.save({"x": x, "ids": ids}, "named.pt")
    torch.save([x, ids], "pair.pt")
    for name in ("named.npz", "named.pt"):
        batches = read(Path(name))
        assert [len(batch["x"]) for batch in batches] == [2, 2, 1]
        assert torch.equal(torch.cat([batch["ids"] for batch in batches]), ids[:5])
    assert all(isinstance(batch, tuple) for batch in read(Path("pair.pt")))
    for wrong, text in (({"x": x, "ids": ids[:3]}, "samples"), ({"x": "text"}, "something else")):
        torch.save(wrong, "wrong.pt")
        with pytest.raises(LoadError, match=text):
            read(Path("wrong.pt"))


def test_a_folder_of_images(folder: Path):
    (folder / "set" / "cats").mkdir(parents=True)
    for index, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        Image.new("RGB", (30, 20), color).save(folder / "set" / "cats" / f"{index}.png")
    model = nn.Identity()
    model.default_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # type: ignore[assignment]
    batches = calibration_data.read(folder / "set", model, batch_size=2, limit=9)
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 8, 8), (1, 3, 8, 8)]  # type: ignore[union-attr]
    assert torch.equal(batches[0][0], torch.tensor([1.0, -1.0, -1.0]).reshape(3, 1, 1).expand(3, 8, 8))  # type: ignore[index]
    (folder / "set" / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(LoadError, match="not an image"):
        read(folder / "set")
    (folder / "empty").mkdir()
    with pytest.raises(LoadError, match="no image"):
        read(folder / "empty")


def test_to_l1_and_written_with_functions(run, vit_file, folder: Path):
    arguments = ("swap", "vit.pt", "--arch", FACTORY, "--to", "l1", "--calib", "calib.npy")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "5 of 5 norms" in result.stdout
    assert "an L1 norm leaves" in result.stdout
    loaded = normfuse.load("vit.swapped.pt", arch=FACTORY)
    assert sum(isinstance(module, L1LayerNorm) for module in loaded.modules()) == 5
    written = run("export", "vit.swapped.pt", "--arch", FACTORY, "--norm-functions", "-o", "vit.onnx", "--json", "-")
    assert written.exit_code == 0, written.output
    assert [function.name for function in onnx.load("vit.onnx").functions] == ["L1LayerNorm"]
