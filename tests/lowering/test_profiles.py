from __future__ import annotations

from typing import Any

import pytest
import torch

from normfuse.errors import LoweringError
from normfuse.lowering.profiles import Profile, ShapeRequest, with_profiles

NAMED = {"ids": torch.ones(2, 16), "mask": torch.ones(2, 16), "flag": True}


def test_what_is_usual_follows_the_example_within_the_bounds():
    (one,) = ShapeRequest({"ids": (1, 16)}, {}, {"ids": (8, 16)}).profiles(NAMED).values()
    assert one == Profile((1, 16), (2, 16), (8, 16))
    assert one.dynamic == (0,)
    (beyond,) = ShapeRequest({"ids": (4, 16)}, {}, {"ids": (8, 16)}).profiles(NAMED).values()
    assert beyond.usual == (4, 16)
    (below,) = ShapeRequest({None: (1, 3)}, {None: (1, 3)}, {None: (1, 3)}).profiles({"x": torch.ones(1, 3)}).values()
    assert (below.dynamic, below.to_list()) == ((), [[1, 3]] * 3)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (({"ids": (3, 16)}, {}, {"ids": (2, 16)}), "min <= opt <= max is not so"),
        (({"ids": (1, 16)}, {"ids": (9, 16)}, {"ids": (8, 16)}), "min <= opt <= max is not so"),
        (({"ids": (1, 16)}, {}, {"ids": (8, 16, 1)}), "have 2/3/3 axes, the input has 2"),
        (({"ids": (1, 8)}, {}, {"ids": (8, 8)}), "axis 1 is 8, but 16 in the example"),
        (({"ids": (1, 16)}, {}, {}), "smallest and the largest shape of each"),
        (({}, {"ids": (1, 16)}, {}), "smallest and the largest shape of each"),
        (({"image": (1, 16)}, {}, {"image": (1, 16)}), "profile of 'image': the inputs are ids, mask"),
        (({None: (1, 16)}, {}, {None: (1, 16)}), "needs names: its inputs are ids, mask"),
    ],
)
def test_what_does_not_fit_is_one_line(request_: Any, text: str):
    with pytest.raises(LoweringError, match=text) as caught:
        ShapeRequest(*request_).profiles(NAMED)
    assert "\n" not in str(caught.value)


def test_axes_of_profiles_are_dynamic_and_keep_given_names():
    profiles = {"ids": Profile((1, 4), (1, 4), (8, 16)), "mask": Profile((1, 4), (1, 4), (8, 4))}
    merged = with_profiles({"ids": {1: "tokens"}}, profiles)
    assert merged == {"ids": {0: "batch", 1: "tokens"}, "mask": {0: "batch"}}
    assert with_profiles({}, {"ids": Profile((1,), (1,), (1,))}) == {}


def test_a_dynamic_axis_without_a_profile_is_an_error():
    with pytest.raises(LoweringError, match="axis 1 of 'mask' is dynamic: an engine needs its min and max shape"):
        with_profiles({"mask": {1: "tokens"}}, {"ids": Profile((1,), (1,), (2,))})
