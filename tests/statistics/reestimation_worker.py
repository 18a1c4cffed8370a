"""One of several processes that re-estimate the norms of one model, each on its share of the data.

Usage: python -m tests.statistics.reestimation_worker RANK PROCESSES RENDEZVOUS OUTPUT
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from normfuse.statistics import correct_bias, reestimate
from tests.statistics.networks import images, network

SHARES = ([slice(0, 5), slice(5, 6)], [slice(6, 17)])
"""Which pictures each process reads, in batches: unequal numbers of both."""


def main(rank: str, processes: str, rendezvous: str, output: str) -> None:
    """Re-estimate in both orders, correct shifts, and save the states."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(processes))
    data = [images(17)[part] for part in SHARES[int(rank)]]
    group = dist.new_group(list(range(int(processes))))
    states = {
        "parallel": reestimate(network(), data, process_group="world").state_dict(),
        "sequential": reestimate(network(), data, order="sequential", process_group=group).state_dict(),
        "bias": correct_bias(network(), data, weight_bits=4, process_group="world").state_dict(),
    }
    torch.save(states, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
