"""The types of options."""

from __future__ import annotations

import click
import pytest

from normfuse.cli.arguments import AxisType, KeyValueType, NamedShape, ShapeType


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x:1x3x224x224", NamedShape("x", (1, 3, 224, 224))),
        ("x:1,3,224,224", NamedShape("x", (1, 3, 224, 224))),
        ("1x3x8", NamedShape(None, (1, 3, 8))),
        ("16", NamedShape(None, (16,))),
        ("input:0:1x3", NamedShape("input:0", (1, 3))),
    ],
)
def test_shapes_in_both_ways_of_writing(text: str, expected: NamedShape):
    assert ShapeType().convert(text, None, None) == expected


@pytest.mark.parametrize("text", ["", "x:", "1x-3", "1x0", "axb", "1,,3", "1.5"])
def test_what_is_not_a_shape(text: str):
    with pytest.raises(click.BadParameter):
        ShapeType().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("depth=3", ("depth", 3)),
        ("name=tiny", ("name", "tiny")),
        ("size=(1, 2)", ("size", (1, 2))),
        ("text=a=b", ("text", "a=b")),
    ],
)
def test_key_value(text: str, expected: tuple):
    assert KeyValueType().convert(text, None, None) == expected


@pytest.mark.parametrize("text", ["depth", "=3", "a b=3"])
def test_what_is_not_key_value(text: str):
    with pytest.raises(click.BadParameter):
        KeyValueType().convert(text, None, None)


@pytest.mark.parametrize("text", ["0", "x:0", "x:0=batch"])
def test_axes(text: str):
    assert AxisType().convert(text, None, None) == text


@pytest.mark.parametrize("text", ["x", "x:", "x:-1", "x:0=two words"])
def test_what_is_not_an_axis(text: str):
    with pytest.raises(click.BadParameter):
        AxisType().convert(text, None, None)
