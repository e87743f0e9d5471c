"""The one exchange of a plan: what every rank must agree on, and numbers from each rank to each, in one message.

Its size depends on the number of ranks alone, so that ranks which agree on nothing else can still read each other, and
each of them raises. Only then does anything travel whose size they had to agree on.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fmoe.dispatch.context import Context

NUMBERS = 1024  # of all ranks together, at least: E, for all but the widest
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
DISPATCHERS = ("all_gather", "all_to_all")


def room(ctx: Context) -> int:
    """How many numbers each rank may tell each other in `agree`."""
    return -(-NUMBERS // ctx.size)


def agree(ctx: Context, facts: Mapping[str, Any], numbers: Tensor) -> Tensor:
    """received[s] = what rank s has at numbers[ctx.rank]; numbers, received [ranks, room] int64.

    facts: an int or a dtype for each name, in one order on all ranks. Raises ValueError on every rank if they differ.
    """
    values = [DISPATCHERS.index(ctx.name), *map(_code, facts.values())]
    said = torch.tensor(values, device=numbers.device).expand(ctx.size, -1)
    ones = [1] * ctx.size
    received = ctx.all_to_all("plan", torch.cat([said, numbers], 1), ones, ones)
    heard = dict(zip(("dispatcher", *facts), received[:, : len(values)].T.tolist(), strict=True))
    if wrong := [f"{name}: {_say(name, by_rank)}" for name, by_rank in heard.items() if len(set(by_rank)) > 1]:
        raise ValueError(
            f"{ctx.name}: plan: the ranks disagree on {', and on '.join(wrong)}.\n"
            "Expected on all ranks one dispatcher, config, K, dtype of x (config.dtype) and dtype of routing weights."
        )
    return received[:, len(values) :]


def _code(fact: Any) -> int:
    if not isinstance(fact, torch.dtype):
        return int(fact)
    if fact not in FLOATS:
        raise ValueError(f"config.dtype is {fact}, expected one of {', '.join(map(_word, FLOATS))}")
    return FLOATS.index(fact)


def _word(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _say(name: str, by_rank: list[int]) -> str:
    """'6 on ranks 0, 1; 8 on rank 2', four ranks of each at most."""
    names: Any = DISPATCHERS if name == "dispatcher" else FLOATS if "dtype" in name else range(max(by_rank) + 1)
    told = []
    for value in dict.fromkeys(by_rank):
        ranks = [rank for rank, other in enumerate(by_rank) if other == value]
        some = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
        told.append(f"{_word(names[value])} on rank{'s' * (len(ranks) > 1)} {some}")
    return "; ".join(told)
