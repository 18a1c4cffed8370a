"""Names from files are plain words before they reach generated code, and harmless on a terminal."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse.errors import CaptureError, LoadError, LoweringError, NormfuseError, shown
from normfuse.names import is_plain, is_word, require_plain
from normfuse.saving import FOLDED_KEY, MODULE_KEY, PLAIN_KEY
from tests.saved_net import folded, unfolded

SEPARATORS = [c for c in map(chr, range(sys.maxunicode + 1)) if len(f"a{c}b".splitlines()) > 1]
CODE = "__import__('pathlib')\\x2ePath('ran')\\x2etouch()"
HOSTILE = {
    "quote": f'a")\rexec("{CODE}")\rdef g(self):\r    getattr(self, "a',
    "single quote": "a')",
    "backslash": "a\\",
    "bracket": "a[0]",
    "brace": "{a}",
    "empty": "",
    "dunder": "__class__",
    "escape": "a\x1b]0;title\x07",
    "right to left": "a\u202eb",
    "zero width": "a\u200bb",
    "nul": "a\0",
    "shell": "$(touch ran)`x`",
    "html": "<script>",
    **{f"separator {ord(c):x}": f"a{c}b" for c in SEPARATORS},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_no_words(name: str):
    assert not is_word(HOSTILE[name])


def test_every_line_separator_of_unicode_is_among_them():
    assert {"\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"} <= set(SEPARATORS)


@pytest.mark.parametrize("name", ["", "layer1.0.conv1", "up/0.x", "größe.ß", "层.0", "a-b.c d", "x:0.y=1", "_a.b_c"])
def test_ordinary_names_are_plain(name: str):
    assert is_plain(name)
    require_plain(name, "a module")


def test_no_character_of_a_word_ends_a_text_a_line_or_a_word():
    signs = [c for c in map(chr, range(sys.maxunicode + 1)) if is_word(c)]
    assert not [c for c in signs if unicodedata.category(c)[0] in "CZ" and c != " "]
    assert not set(signs) & set("\"'\\`$(){}[]<>|;&!*?%^.\n\r")


@pytest.mark.parametrize("name", ["a\nb", 'a"', 3, None, "a..b", ".a", "a" * 2000])
def test_the_error_names_what_bears_it_in_one_line(name: object):
    with pytest.raises(LoadError, match=r"a module in x\.pt is called") as caught:
        require_plain(name, "a module in x.pt", LoadError)
    assert str(caught.value).isprintable()


# where names come in


def _network(name: str, table: str = "_modules") -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    held: Any = model if table == "_modules" else model[0 if table == "_parameters" else 1]
    entries = getattr(held, table)
    entries[name] = entries.pop(next(iter(entries)))
    return model


@pytest.mark.parametrize("name", [n for n in HOSTILE if n != "empty"])
@pytest.mark.parametrize("table", ["_modules", "_parameters", "_buffers"])
def test_names_in_a_pickled_model(name: str, table: str, tmp_path: Path):
    torch.save(_network(HOSTILE[name], table), tmp_path / "m.pt")
    with pytest.raises(LoadError, match="not a plain word"):
        normfuse.load(tmp_path / "m.pt")


EDITS: dict[str, Callable[[str], dict[str, Any]]] = {
    "tie": lambda name: {"op": "tie", "tensor": f"conv1.{name}", "to": "conv1.weight"},
    "drop": lambda name: {"op": "drop", "tensor": f"conv1.{name}"},
    "untie": lambda name: {"op": "untie", "tensor": f"conv1.{name}"},
    "replace": lambda name: {"op": "replace", "path": name, "module": {"sequential": [{"ref": "conv1"}]}},
    "reference": lambda name: {"op": "replace", "path": "conv1", "module": {"sequential": [{"ref": name}]}},
    "resize": lambda name: {"op": "resize", "path": "conv1", "attributes": {}, "tensors": {name: [1]}},
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["quote", "separator d", "dunder"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_names_in_a_manifest(edit: str, name: str, suffix: str, tmp_path: Path):
    """A file of tensors alone, whose manifest adds a parameter under a name of its choice."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / f"m{suffix}"
    normfuse.save(folded(), path)
    metadata: dict[str, str] = {}
    if suffix == ".pt":
        entries = torch.load(path, weights_only=True)
        manifest = json.loads(entries[FOLDED_KEY])
    else:
        with safe_open(path, "pt") as file:
            metadata, entries = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        manifest = json.loads(metadata[PLAIN_KEY])
    manifest["edits"].append(EDITS[edit](HOSTILE[name]))
    if suffix == ".pt":
        torch.save({**entries, FOLDED_KEY: json.dumps(manifest)} | {MODULE_KEY: torch.zeros(0)}, path)
    else:
        save_file(entries, path, metadata | {PLAIN_KEY: json.dumps(manifest)})
    with pytest.raises(LoadError, match="is called") as caught:
        normfuse.load(path, model=unfolded())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_names_in_a_state_dict(suffix: str, tmp_path: Path):
    from safetensors.torch import save_file

    state = {key: value.clone() for key, value in unfolded().state_dict().items()} | {HOSTILE["quote"]: torch.ones(1)}
    torch.save(state, tmp_path / "m.pt") if suffix == ".pt" else save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(LoadError, match="is called"):
        normfuse.load(tmp_path / f"m{suffix}", model=unfolded())


def test_names_in_a_live_model(tmp_path: Path):
    x = torch.ones(1, 3, 5, 5)
    for name in ("quote", "separator 2028"):
        model = _network(HOSTILE[name])
        for run in (lambda m=model: normfuse.fold(m), lambda m=model: normfuse.inspect(m, example_inputs=x)):
            with pytest.raises(CaptureError, match="is called"):
                run()
        with pytest.raises((CaptureError, LoweringError), match="is called"):
            normfuse.export(model, tmp_path / "m.onnx", example_inputs=x)
        with pytest.raises(LoweringError, match="is called"):
            normfuse.export(model, tmp_path / "m.onnx", example_inputs=x, fold_bn=False)


# what is printed


@pytest.mark.parametrize("kind", [NormfuseError, LoadError, CaptureError])
def test_errors_are_one_harmless_line(kind: type[NormfuseError]):
    assert str(kind("a\x1b[2J\nb\u202ec")) == "a\\x1b[2J\\nb\\u202ec"


def test_reports_are_harmless():
    refusal = normfuse.Refusal(normfuse.Reason.SIGN, "a\x1b[2J", "b\n")
    outcome = normfuse.Outcome("fold-bn", normfuse.Status.REFUSED, "x\ny", "BatchNorm2d", refusal=refusal)
    report = normfuse.Report((outcome,), ("fold-bn",), ("c\x07",))
    assert all(line.isprintable() for line in str(report).splitlines())
    assert len(str(report).splitlines()) == 3


def test_shown_keeps_what_is_harmless():
    assert shown("größe 层 a-b") == "größe 层 a-b"
