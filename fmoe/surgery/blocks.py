"""Experts of a checkpoint selected, permuted, replicated and merged, layer by layer."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmoe.routing import SCORES
from fmoe.routing.gate import is_corrected
from fmoe.surgery.config import known, resized, says_each_layer
from fmoe.surgery.rows import counted_elsewhere, decoded, each_layer, layers, taken
from fmoe.types import MoEConfig, Params, brief

Ids = Sequence[int] | Tensor
Groups = Sequence[Sequence[int]]
SIZE = "n_routed_experts"


def select(native: Params, config: Any, keep: Ids | Mapping[str, Ids]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The experts `keep`, in that order: new expert j is old expert keep[j], and the router ranks these alone.

    keep: ids, or ids for each layer by its name in `layers`, every layer named. Where a family routes by groups, each
    group keeps as many experts, and in the order of groups. Raises ValueError for ids that are not there or twice, for
    fewer experts than a token goes to, and where layers end with different numbers and the config has one for all.

    >>> config = dict(model_type="mixtral", num_local_experts=3, num_experts_per_tok=1, hidden_size=2)
    >>> native = {"layers.0.mlp.experts.down_projs": torch.arange(3.0).view(3, 1, 1)}
    >>> native["layers.0.mlp.experts.gate_and_up_projs"] = torch.zeros(3, 1, 2)
    >>> few, config = select(native, config | dict(intermediate_size=1), [2, 0])
    >>> few["layers.0.mlp.experts.down_projs"].flatten().tolist(), config["num_local_experts"]
    ([2.0, 0.0], 2)
    """
    return _taken("select", native, config, keep, whole=False)


def permute(native: Params, config: Any, order: Ids | Mapping[str, Ids]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`select` of all experts in another order: what the model computes stays, for every order.

    A layer that a mapping does not name keeps its order. Where a family routes by groups, groups stay together.

    >>> sizes = dict(num_local_experts=2, hidden_size=2, intermediate_size=1)
    >>> config = dict(model_type="mixtral", num_experts_per_tok=1, **sizes)
    >>> native = {"layers.0.mlp.experts.down_projs": torch.tensor([1.0, 3.0]).view(2, 1, 1)}
    >>> native["layers.0.mlp.experts.gate_and_up_projs"] = torch.zeros(2, 1, 2)
    >>> permute(native, config, [1, 0])[0]["layers.0.mlp.experts.down_projs"].flatten()
    tensor([3., 1.])
    """
    return _taken("permute", native, config, order, whole=True)


def replicate(native: Params, config: Any, times: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Each expert `times` times, next to each other, and `times` as many experts for a token: the same output.

    Where a router does not share weights out among what it chose (sigmoid without normalisation), the down projection
    is divided by `times`. Raises ValueError for groups of experts, which copies would outweigh, and for a sparsemixer.

    >>> sizes = dict(num_local_experts=2, hidden_size=2, intermediate_size=1)
    >>> config = dict(model_type="mixtral", num_experts_per_tok=1, **sizes)
    >>> native = {"layers.0.mlp.experts.down_projs": torch.tensor([1.0, 3.0]).view(2, 1, 1)}
    >>> native["layers.0.mlp.experts.gate_and_up_projs"] = torch.zeros(2, 1, 2)
    >>> more, config = replicate(native, config, 2)
    >>> more["layers.0.mlp.experts.down_projs"].flatten(), config["num_experts_per_tok"]
    (tensor([1., 1., 3., 3.]), 2)
    """
    given, kind, moe = known(config)
    if not isinstance(times, int) or isinstance(times, bool) or not 1 <= times < 2**31:
        raise ValueError(f"replicate: times is {brief(times)}, expected a positive int")
    if moe.n_expert_groups > 1:
        raise ValueError(f"replicate: experts are routed by {moe.n_expert_groups} groups, which copies would outweigh")
    if moe.n_zero_experts:
        raise ValueError(
            f"replicate: experts are ranked beside {moe.n_zero_experts} zero experts, which have no copies"
        )
    if moe.score_func == "sparsemixer":
        raise ValueError("replicate: a sparsemixer weighs each choice among those that are left, where copies would be")
    softmax = moe.score_func.startswith("softmax")
    shares = moe.norm_topk_prob or softmax
    if not shares and moe.expert_norm_eps is not None:
        raise ValueError("replicate: each expert's output is normed, and weights do not sum to 1: copies would add up")

    def copied(name: str, t: Tensor) -> Tensor:
        if not shares and name.startswith(("experts.down_proj", "experts.lora_down_B")):
            return (decoded("replicate", name, t) / times).repeat_interleave(times, 0)
        if softmax and name == "gate.e_score_correction_bias":
            t = t / times  # as the score that it is added to
        return t.repeat_interleave(times, 0)

    def chosen(layer: str, ids: Tensor) -> Tensor:
        return (ids[..., None] * times + torch.arange(times, dtype=ids.dtype, device=ids.device)).flatten(1)

    counted_elsewhere("replicate", native, moe, times == 1)
    made = each_layer("replicate", native, moe, lambda layer: copied, chosen)
    given = resized(given, kind.fields[SIZE], moe.n_routed_experts * times)
    return made, resized(given, kind.fields["n_activated_experts"], moe.n_activated_experts * times)


def merge(
    native: Params, config: Any, groups: Groups | Mapping[str, Groups], weights: Any = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """New expert j = sum of weights[j][i] times expert groups[j][i], its row of the router and its biases alike.

    groups: lists of ids, together all experts once (`select` first, to leave some out), or such lists for each layer by
    name. weights: of the same form, each list summing to 1; None: the mean. Sums are taken in fp32 (fp64 stays).
    Raises ValueError for anything else, for weights in a code, and as `select`.

    >>> sizes = dict(num_local_experts=2, hidden_size=2, intermediate_size=1)
    >>> config = dict(model_type="mixtral", num_experts_per_tok=1, **sizes)
    >>> native = {"layers.0.mlp.experts.down_projs": torch.tensor([1.0, 3.0]).view(2, 1, 1)}
    >>> native["layers.0.mlp.experts.gate_and_up_projs"] = torch.zeros(2, 1, 2)
    >>> merge(native, config, [[0, 1]])[0]["layers.0.mlp.experts.down_projs"].flatten()
    tensor([2.])
    """
    given, kind, moe = known(config)
    E, found = moe.n_routed_experts, layers(native)
    of = _by_layer("merge", found, groups, "groups", 2)
    shares = None if weights is None else _by_layer("merge", found, weights, "weights", 2)
    parts = {name: None if shares is None else shares[name] for name in found}

    def mixer(layer: str) -> Callable[[str, Tensor], Tensor]:
        M = _matrix(layer, of[layer], parts[layer], E)

        def mixed(name: str, t: Tensor) -> Tensor:
            t = decoded("merge", f"{layer}.{name}", t)
            wide = torch.promote_types(t.dtype, torch.float32)
            return torch.tensordot(M.to(wide).to(t.device), t.to(wide), 1).to(t.dtype)

        return mixed

    counted_elsewhere("merge", native, moe, all(len(g) == E for g in of.values()))
    made = each_layer("merge", native, moe, mixer)
    first = {name: [ids[0] for ids in g] for name, g in of.items()}
    for name, g in of.items():
        _check_groups("merge", name, moe, first[name], [set(ids) for ids in g])
    return made, _recounted("merge", given, kind, moe, {name: len(g) for name, g in of.items()})


def _taken(
    what: str, native: Params, config: Any, ids: Ids | Mapping[str, Ids], *, whole: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    given, kind, moe = known(config)
    E, found = moe.n_routed_experts, layers(native)
    if whole and isinstance(ids, Mapping):
        ids = {name: range(E) for name in found} | dict(ids)
    of = _by_layer(what, found, ids, "order" if whole else "keep", 1)
    for name, own in of.items():
        wrong = not own or len(set(own)) < len(own) or any(not 0 <= i < E for i in own) or (whole and len(own) != E)
        if wrong:
            told = f"each of 0 to {E - 1} once" if whole else f"some of 0 to {E - 1}, each once"
            raise ValueError(f"{what}: {name}: ids are {own}, expected {told}")
        _check_groups(what, name, moe, own, [{i} for i in own])
    picker = lambda layer: lambda _, t: taken(t, of[layer])

    def chosen(layer: str, ids: Tensor) -> Tensor:
        new = torch.full((E,), -1, dtype=ids.dtype, device=ids.device)
        new[of[layer]] = torch.arange(len(of[layer]), dtype=ids.dtype, device=ids.device)
        if bool((new[ids.long()] < 0).any()):
            raise ValueError(
                f"{what}: {layer}.gate.tid2eid: tokens go to experts that are not kept, expected every one"
            )
        return new[ids.long()]

    counted_elsewhere(what, native, moe, all(len(own) == E for own in of.values()))
    made = each_layer(what, native, moe, picker, chosen)
    return made, _recounted(what, given, kind, moe, {name: len(own) for name, own in of.items()})


def _by_layer(what: str, found: Mapping[str, Any], given: Any, argument: str, depth: int) -> dict[str, Any]:
    """What is given for each layer, as lists `depth` deep; alike for all, if it is not a mapping."""
    if not found:
        raise ValueError(f"{what}: no layer has experts: no name ends with 'experts.down_projs'")
    of = given if isinstance(given, Mapping) else dict.fromkeys(found, given)
    made = {name: _listed(own, depth, argument != "weights") for name, own in of.items()}
    if not all(isinstance(name, str) for name in of) or any(own is None for own in made.values()):
        kind = {"weights": "numbers for each group", "groups": "groups of ids"}.get(argument, "ids")
        some = ", ".join(map(repr, [*found][:3])) + ", ..." * (len(found) > 3)
        raise ValueError(f"{what}: {argument} is {brief(given)}, expected {kind}, or {kind} by layer: {some}")
    if odd := sorted(made.keys() ^ found.keys()):
        raise ValueError(f"{what}: layers {odd} are named or have experts, expected both: {', '.join(found)}")
    return {name: made[name] for name in found}


def _listed(given: Any, depth: int, whole: bool) -> list[Any] | None:
    """Lists, `depth` deep, of ints (or, where not whole, of numbers); None for anything else.

    >>> _listed(torch.tensor([2, 0]), 1, True), _listed([[0, 1]], 1, True), _listed([[0.5, 0.5]], 2, False)
    ([2, 0], None, [[0.5, 0.5]])
    """
    if isinstance(given, Tensor) and (given.is_meta or given.layout != torch.strided):
        return None
    if hasattr(given, "tolist"):
        given = given.tolist()
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
        return None
    if depth > 1:
        inner = [_listed(own, depth - 1, whole) for own in given]
        return None if None in inner else inner
    numbers = [n.item() if hasattr(n, "item") and not getattr(n, "is_meta", False) else n for n in given]
    kinds = (int,) if whole else (int, float)
    return numbers if all(type(n) in kinds for n in numbers) else None  # a bool is no id


def _check_groups(what: str, layer: str, moe: MoEConfig, ids: list[int], sources: list[set[int]]) -> None:
    """Where a family routes by groups of neighbours, new groups are old ones, or parts of them of one size."""
    G = moe.n_expert_groups
    if G <= 1:
        return
    old, n = moe.n_routed_experts // G, len(ids) // G
    of = [{i // old for s in sources[g * n : (g + 1) * n] for i in s} for g in range(G)]
    if len(ids) % G or any(len(o) != 1 for o in of) or len(set().union(*of)) != G:
        raise ValueError(
            f"{what}: {layer}: experts are routed by {G} groups of neighbours, expected ids group by group"
        )
    least = 2 if SCORES[moe.score_func].group_of == 2 or is_corrected(moe) else 1
    least = max(least, -(-moe.n_activated_experts // moe.n_limited_groups))
    if n < least:
        told = f"a token goes to {moe.n_activated_experts} experts of {moe.n_limited_groups} groups"
        raise ValueError(f"{what}: {layer}: {G} groups would have {n} experts each, expected {least} at least: {told}")


def _recounted(what: str, config: dict[str, Any], kind: Any, moe: MoEConfig, counts: dict[str, int]) -> dict[str, Any]:
    if few := [name for name, n in counts.items() if n < moe.n_activated_experts]:
        told = f"expected K={moe.n_activated_experts} at least, which a token goes to"
        raise ValueError(f"{what}: {few[0]} would have {counts[few[0]]} experts, {told}")
    names = kind.fields[SIZE]
    if len(set(counts.values())) > 1:
        if not says_each_layer(config, names):
            raise ValueError(f"{what}: layers would have {counts} experts, expected one number: so the config has it")
        for name, n in counts.items():
            config = resized(config, names, n, int(re.findall(r"\d+", name)[0]))
        return config
    return resized(config, names, next(iter(counts.values())))


def _matrix(layer: str, groups: Groups, weights: Any, E: int) -> Tensor:
    """[new experts, E] fp64: the weight of each old expert in each new one."""
    if sorted(i for ids in groups for i in ids) != list(range(E)) or not all(groups):
        raise ValueError(f"merge: {layer}: groups are {list(groups)}, expected each of 0 to {E - 1} once")
    if weights is not None and len(weights) != len(groups):
        raise ValueError(f"merge: {layer}: {len(weights)} weights for {len(groups)} groups, expected a list for each")
    M = torch.zeros(len(groups), E, dtype=torch.float64)
    for j, ids in enumerate(groups):
        w = [1 / len(ids)] * len(ids) if weights is None else weights[j]
        if len(w) != len(ids) or abs(sum(w) - 1) > 1e-6:
            raise ValueError(f"merge: {layer}: weights of group {list(ids)} are {w}, expected as many, summing to 1")
        M[j, list(ids)] = torch.tensor(w, dtype=torch.float64)
    return M
