"""Experts in codes, each on a rank of its own: one device's result."""

from typing import Any

import kept
import pytest
import threads
import torch
import torch.distributed as dist

import fmoe
from fmoe.dispatch import all_gather, all_to_all


@pytest.mark.parametrize("fmt", ["fp8 side one", "nvfp4", "int4 pack"])
@pytest.mark.parametrize("move", [all_to_all, all_gather], ids=["all_to_all", "all_gather"])
def test_codes_on_ranks_are_those_of_one_device(fmt: str, move: Any) -> None:
    codes, _, config = kept.layer(fmt)
    x, routing = kept.tokens(config)
    part = lambda t, r: t[2 * r : 2 * r + 2]

    def rank() -> torch.Tensor:
        r = dist.get_rank()
        mine = {n: t[r : r + 1] if t.ndim else t for n, t in (codes | kept.lora(config)).items()}
        with move(dist.group.WORLD) as d:
            own = fmoe.Routing(*(part(t, r) for t in routing))
            return fmoe.experts(mine, part(x, r), own, config, backend="loop", dispatcher=d)

    whole = fmoe.experts(codes | kept.lora(config), x, routing, config, backend="loop")
    torch.testing.assert_close(torch.cat(threads.run(rank, 3)), whole)
