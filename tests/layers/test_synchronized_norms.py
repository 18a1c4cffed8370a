"""UnifiedNorm and PowerNorm with statistics over several processes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.layers import synchronized_worker
from tests.layers.running_norms import assert_same_state, power, train, unified
from tests.parity import EXACT, error
from tests.processes import run_two


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two processes saved."""
    return run_two("tests.layers.synchronized_worker", tmp_path_factory.mktemp("two_processes"))


@pytest.mark.parametrize("group", ["world", "group"])
@pytest.mark.parametrize("name", ["UnifiedNorm", "PowerNorm"])
def test_two_processes_are_one(name: str, group: str, two_processes: list[dict[str, Any]]) -> None:
    """Two processes, each with its share of the batch, do what one does with the whole of it."""
    whole = synchronized_worker.train(synchronized_worker.make(name), slice(None))
    alone = synchronized_worker.train(synchronized_worker.make(name), synchronized_worker.SHARES[0])
    assert name == "PowerNorm" or whole["buffers"]["skipped_steps"] > 0
    parts = [saved[name][group] for saved in two_processes]
    for kind in ("outputs", "x_grads"):
        for one, *two in zip(whole[kind], *(part[kind] for part in parts), strict=True):
            assert error(one, torch.cat(two)) <= EXACT
    for parameter, one in whole["grads"].items():
        assert error(one, sum(part["grads"][parameter] for part in parts)) <= EXACT
    for buffer, one in whole["buffers"].items():
        assert all(error(one, part["buffers"][buffer]) <= EXACT for part in parts), buffer
    assert error(whole["buffers"]["running_second_moment"], alone["buffers"]["running_second_moment"]) > EXACT


def test_copies_share_their_process_group(tmp_path: Path) -> None:
    """A process group cannot be copied, a model with one can; by name it can also be pickled."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'alone'}", rank=0, world_size=1)
    try:
        group = torch.distributed.new_group([0])
        copied = copy.deepcopy(nn.Sequential(unified(process_group=group), power(process_group=group)))
        assert all(norm.process_group is group for norm in copied)
        named = pickle.loads(pickle.dumps(unified(process_group="world")))
        alone = unified()
        for norm in (named, copied[0], alone):
            train(norm, 5, 3)
        assert_same_state(alone, named, 1e-6)
        assert_same_state(alone, copied[0], 1e-6)
    finally:
        torch.distributed.destroy_process_group()
