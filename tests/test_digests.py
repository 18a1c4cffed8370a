"""A weight that was damaged after it was saved is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import normfuse
from normfuse import digests
from normfuse.errors import LoadError
from normfuse.saving import FOLDED_KEY
from tests.saved_net import ARCH, SUFFIXES, folded, unfolded

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_is_that_of_the_values(dtype: torch.dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    assert digests.of(tensor) == digests.of(tensor.clone()) == digests.of(tensor.t().contiguous().t())
    assert digests.of(tensor) != digests.of(tensor.reshape(4, 3))
    changed = tensor.clone()
    changed[0, 0] = 1
    assert digests.of(tensor) != digests.of(changed)


def test_a_digest_tells_dtypes_signs_of_zero_and_empty_tensors_apart():
    values = [torch.zeros(2), torch.zeros(2, dtype=torch.int32), -torch.zeros(2), torch.zeros(0), torch.zeros(0, 2)]
    assert len({digests.of(value) for value in values}) == len(values)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_tensor_of_a_file_has_one(suffix: str, tmp_path: Path):
    path = tmp_path / f"m{suffix}"
    model = folded()
    normfuse.save(model, path, arch=ARCH)
    loaded = normfuse.load(path, model=unfolded())
    assert loaded.normfuse_manifest["digests"] == digests.of_all(model.state_dict())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_weight_is_an_error(suffix: str, tmp_path: Path):
    """The value is changed where no checksum of the container sees it."""
    path = tmp_path / f"m{suffix}"
    model = folded()
    normfuse.save(model, path, arch=ARCH)
    if suffix == ".safetensors":
        content = bytearray(path.read_bytes())
        raw = model.conv1.weight.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        content[content.index(raw) + 3] ^= 1
        path.write_bytes(content)
    else:
        entries = torch.load(path, weights_only=True)
        entries["conv1.weight"].flatten()[2] += 1e-9
        torch.save(entries, path)
    with pytest.raises(LoadError, match=r"conv1\.weight is not what was saved"):
        normfuse.load(path, model=unfolded())


def test_only_files_of_the_first_version_have_no_digests(tmp_path: Path):
    normfuse.save(folded(), tmp_path / "m.pt", arch=ARCH)
    entries = torch.load(tmp_path / "m.pt", weights_only=True)
    manifest = json.loads(entries[FOLDED_KEY])
    del manifest["digests"]
    torch.save({**entries, FOLDED_KEY: json.dumps(manifest)}, tmp_path / "m.pt")
    with pytest.raises(LoadError, match="not what was saved"):
        normfuse.load(tmp_path / "m.pt", model=unfolded())
    manifest["schema_version"] = 1
    torch.save({**entries, FOLDED_KEY: json.dumps(manifest)}, tmp_path / "m.pt")
    assert normfuse.load(tmp_path / "m.pt", model=unfolded()) is not None
