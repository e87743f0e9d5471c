"""The table of dispatchers that tests are parametrised by, and the cases that each of them has to get right.

A new dispatcher is a line in `DISPATCHERS`. `parity` runs on every rank of whatever group there is, processes or
threads, and compares each rank's part with the whole batch on one device.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import naive
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fmoe
from fmoe import MoEConfig, Routing
from fmoe.dispatch import Dispatcher, all_gather, all_to_all, local

# by name: the dispatcher of a group, and whether it moves anything (if not, it is for one rank)
DISPATCHERS: dict[str, Callable[[Any], Dispatcher]] = {
    "local": lambda group=None: local,
    "all_gather": all_gather,
    "all_to_all": all_to_all,
}
OVER_GROUPS = tuple(name for name in DISPATCHERS if name != "local")

CONFIG = MoEConfig(
    n_routed_experts=8, n_activated_experts=3, dim=6, moe_inter_dim=4, expert_bias=True, dtype=torch.float64
)
E = CONFIG.n_routed_experts


class Batch(NamedTuple):
    """The tokens of all ranks, lengths[r] of rank r in turn, and r, the gradient of the loss in y."""

    lengths: list[int]
    x: Tensor
    routing: Routing
    r: Tensor


def cycle(*lengths: int) -> Callable[[int], list[int]]:
    return lambda R: [lengths[rank % len(lengths)] for rank in range(R)]


def unchanged(x: Tensor, indices: Tensor, weights: Tensor, mask: Tensor) -> None:
    pass


def one_expert(x: Tensor, indices: Tensor, weights: Tensor, mask: Tensor) -> None:
    indices.fill_(E - 1)


def idle_experts(x: Tensor, indices: Tensor, weights: Tensor, mask: Tensor) -> None:
    """Only experts 1, 3: with two ranks and more, some rank multiplies nothing."""
    indices.copy_(1 + 2 * (indices % 2))


def masked(x: Tensor, indices: Tensor, weights: Tensor, mask: Tensor) -> None:
    mask[::2] = False


def all_masked(x: Tensor, indices: Tensor, weights: Tensor, mask: Tensor) -> None:
    mask.fill_(False)


def nowhere(x: Tensor, indices: Tensor, weights: Tensor, mask: Tensor) -> None:
    """Ids that no expert has, some so far out that int32 would wrap them to one that an expert has."""
    for i, away in enumerate((-1, E, E + 100, 2**32 + 1, -(2**32) + 2, 2**62)):
        indices.view(-1)[i::7] = away


def repeated(x: Tensor, indices: Tensor, weights: Tensor, mask: Tensor) -> None:
    indices.copy_(indices[:, :1].expand_as(indices))


def poisoned(x: Tensor, indices: Tensor, weights: Tensor, mask: Tensor) -> None:
    """NaN in everything that goes nowhere."""
    mask[::3] = False
    indices[1::3] = -1
    indices[2::3, 1] = E
    gone = (indices < 0) | (indices >= E) | ~mask[:, None]
    weights.masked_fill_(gone, torch.nan)
    x.masked_fill_(gone.all(1, keepdim=True), torch.nan)


CASES: dict[str, tuple[Callable[[int], list[int]], Callable[..., None]]] = {
    "even": (cycle(4), unchanged),
    "uneven": (cycle(3, 5, 0, 1), unchanged),
    "one rank has them all": (lambda R: [6] + [0] * (R - 1), unchanged),
    "the last rank has them all": (lambda R: [0] * (R - 1) + [6], unchanged),
    "no tokens": (cycle(0), unchanged),
    "one token": (cycle(1), unchanged),
    "one expert": (cycle(3, 2), one_expert),
    "idle experts": (cycle(2, 4), idle_experts),
    "masked": (cycle(4, 3), masked),
    "all masked": (cycle(2, 3), all_masked),
    "nowhere": (cycle(6, 4), nowhere),
    "repeated": (cycle(3, 4), repeated),
    "poisoned": (cycle(6, 3), poisoned),
}


@cache
def batch(name: str, R: int) -> Batch:
    of, change = CASES[name]
    lengths, generator = of(R), torch.Generator().manual_seed(len(name) + 31 * R)
    T, K, D = sum(lengths), CONFIG.n_activated_experts, CONFIG.dim
    x, r = (torch.randn(T, D, dtype=torch.float64, generator=generator) for _ in range(2))
    indices = torch.randint(0, E, (T, K), generator=generator)
    weights = torch.rand(T, K, dtype=torch.float64, generator=generator)
    mask = torch.ones(T, dtype=torch.bool)
    change(x, indices, weights, mask)
    return Batch(lengths, x, Routing(indices, weights, mask), r)


Layer = Callable[[dict[str, Tensor], Tensor, Routing], Tensor]


def grads(layer: Layer, params: dict[str, Tensor], x: Tensor, routing: Routing, r: Tensor) -> dict[str, Tensor]:
    """y, and the gradient of <y, r> in x, the routing weights and every parameter."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in params.items()}
    leaves |= {"x": x.detach().clone().requires_grad_(), "w": routing.weights.detach().clone().requires_grad_()}
    y = layer({name: leaves[name] for name in params}, leaves["x"], routing._replace(weights=leaves["w"]))
    (y * r.to(y.dtype)).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values()), "a gradient is missing, expected zeros"
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@cache
def expected(name: str, R: int) -> dict[str, Tensor]:
    """What one device makes of the whole batch, token by token; both weightings are this one formula."""
    _, x, routing, r = batch(name, R)

    def layer(params: dict[str, Tensor], x: Tensor, routing: Routing) -> Tensor:
        zero = sum(0 * t.nan_to_num().sum() for t in (x, routing.weights, *params.values()))  # or no gradient at all
        return naive.experts(params, x, routing, CONFIG) + zero

    return grads(layer, naive.draw(CONFIG), x, routing, r)


def plain(d: Dispatcher, config: MoEConfig, **how: Any) -> Layer:
    return lambda params, x, routing: fmoe.experts(params, x, routing, config, dispatcher=d, backend="loop", **how)


def checkpointed(d: Dispatcher, config: MoEConfig, reentrant: bool) -> Layer:
    """The whole layer recomputed in backward, the plan made outside."""

    def layer(params: dict[str, Tensor], x: Tensor, routing: Routing) -> Tensor:
        plan = d.plan(routing, replace(config, dtype=x.dtype))
        again = plain(d._replace(plan=lambda *_: plan), config)

        def flat(x: Tensor, weights: Tensor, *values: Tensor) -> Tensor:
            return again(dict(zip(params, values, strict=True)), x, routing._replace(weights=weights))

        y: Tensor = checkpoint(flat, x, routing.weights, *params.values(), use_reentrant=reentrant)
        return y

    return layer


AFTER = replace(CONFIG, apply_router_weight_after_down=True)
WAYS: dict[str, Callable[[Dispatcher], Layer]] = {
    "plain": partial(plain, config=CONFIG),
    "plain, weight after down": partial(plain, config=AFTER),
    "recompute": partial(plain, config=CONFIG, recompute=True),
    "checkpoint": partial(checkpointed, config=AFTER, reentrant=False),
    "checkpoint, reentrant": partial(checkpointed, config=CONFIG, reentrant=True),
}


class Off(NamedTuple):
    """How far this tensor of this rank is from that of one device, relative to its largest number where that is > 1."""

    case: str
    way: str
    tensor: str
    off: float


def parity(names: tuple[str, ...]) -> dict[str, list[Off]]:
    """For each dispatcher: every case, way and tensor."""
    # memory that nobody has written is NaN
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    R, rank, found = dist.get_world_size(), dist.get_rank(), {name: list[Off]() for name in names}
    for name in names:
        with DISPATCHERS[name](None) as d:
            for case, (way, make) in product(CASES, WAYS.items()):
                lengths, x, routing, r = batch(case, R)
                params = share(naive.draw(CONFIG), R, rank)
                x, r, *routed = of_rank((x, r, *routing), lengths, rank)
                for key, t in grads(make(d), params, x, Routing(*routed), r).items():
                    whole = expected(case, R)[key]
                    right = share({key: whole}, R, rank)[key] if key in params else of_rank([whole], lengths, rank)[0]
                    size = max(float(right.abs().max()), 1.0) if t.numel() else 1.0
                    found[name].append(Off(case, way, key, float((t - right).norm()) / size))
    return found


def share(params: dict[str, Tensor], R: int, rank: int) -> dict[str, Tensor]:
    """This rank's experts."""
    return {name: p[rank * E // R : (rank + 1) * E // R] for name, p in params.items()}


def of_rank(batches: Iterable[Any], lengths: list[int], rank: int) -> list[Tensor]:
    """This rank's tokens of each."""
    return [t.split(lengths)[rank] for t in batches]


@contextmanager
def counted() -> Iterator[list[tuple[int, str, int]]]:
    """(rank, verb, bytes handed over) of every collective while it is open, on all threads."""
    calls: list[tuple[int, str, int]] = []

    def watched(name: str, verb: Callable[..., Any]) -> Callable[..., Any]:
        def call(out: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = given if isinstance(given, list) else [given]
            calls.append((dist.get_rank(), name, sum(t.numel() * t.itemsize for t in tensors)))
            return verb(out, given, *args, **kwargs)

        return call

    verbs = {name: getattr(dist, name) for name in ("all_to_all_single", "all_gather", "reduce_scatter")}
    others = ("all_reduce", "all_to_all", "broadcast", "reduce", "all_gather_object")
    verbs |= {name: getattr(dist, name) for name in others}
    for name, verb in verbs.items():
        setattr(dist, name, watched(name, verb))
    try:
        yield calls
    finally:
        for name, verb in verbs.items():
            setattr(dist, name, verb)
