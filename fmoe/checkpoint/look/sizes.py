"""How large the parts of a model are: parameters and bytes by kind and by layer, from names and shapes alone."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fmoe.types import MoEConfig, TensorSpec

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|block|layer|h)\.(\d+)\.")
_KINDS = (  # the first that fits names a tensor's kind
    ("multi-token prediction", re.compile(r"(^|\.)(mtp|nextn|mtp_block)")),
    ("vision and audio", re.compile(r"(^|\.)(visual|vision|audio|image|speech)")),
    ("shared experts", re.compile(r"shared_(expert|mlp)")),
    ("router", re.compile(r"(^|\.)(router|gate|moe_statics)(\.|$)|e_score_correction_bias|expert_bias")),
    ("norms", re.compile(r"norm|(^|\.)ln_")),
    ("attention", re.compile(r"attn|attention|mamba|mixer|\.conv|delta")),
    ("embeddings", re.compile(r"embed|lm_head|wte|(^|\.)output\.weight")),
    ("dense MLP", re.compile(r"mlp|feed_forward|ffn")),
)
_SCALES = re.compile(r"(_scale_inv|_scale|_scales|\.qscale_\w+|_activation_scale|_blocks_scale)$")


def kind_of(name: str, experts: Collection[str] = ()) -> str:
    """What a tensor is for, by its name; `experts` are names that are known to be routed experts'.

    >>> kind_of("model.layers.0.mlp.shared_expert.up_proj.weight"), kind_of("model.embed_tokens.weight")
    ('shared experts', 'embeddings')
    """
    if name in experts:
        return "routed experts"
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to, if its name has one."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def by_kind(
    stored: Mapping[str, TensorSpec],
    experts: Collection[str],
    native: Mapping[str, TensorSpec],
    stacks: Collection[str],
) -> dict[str, dict[str, int]]:
    """kind -> {"parameters", "bytes"}: bytes of what is stored, parameters of what it is natively (decoded).

    experts, stacks: the names of routed experts on either side.
    """
    found: dict[str, dict[str, int]] = {}
    for specs, names, key in ((native, stacks, "parameters"), (stored, experts, "bytes")):
        for name, spec in specs.items():
            sizes = found.setdefault(kind_of(name, names), {"parameters": 0, "bytes": 0})
            if key == "bytes":
                sizes[key] += spec.nbytes
            elif not _SCALES.search(name):
                sizes[key] += spec.numel
    there = {kind: sizes for kind, sizes in found.items() if any(sizes.values())}
    return dict(sorted(there.items(), key=lambda item: -item[1]["bytes"]))


def by_layer(stored: Mapping[str, TensorSpec]) -> list[dict[str, Any]]:
    """Bytes of each layer, neighbours of one size folded: [{"layers": "1-47", "count": 47, "bytes": of each}, ...].

    >>> import torch
    >>> spec = TensorSpec((4,), torch.float32)
    >>> by_layer({"layers.0.a": spec, "layers.1.a": spec, "norm": spec})
    [{'layers': '0-1', 'count': 2, 'bytes': 16}]
    """
    sizes: dict[int, int] = {}
    for name, spec in stored.items():
        if (layer := layer_of(name)) is not None:
            sizes[layer] = sizes.get(layer, 0) + spec.nbytes
    folded: list[dict[str, Any]] = []
    for number in sorted(sizes):
        last = folded[-1] if folded else None
        if last and last["bytes"] == sizes[number] and last["last"] == number - 1:
            last["last"] = number
        else:
            folded.append({"first": number, "last": number, "bytes": sizes[number]})
    return [
        {
            "layers": f"{f['first']}-{f['last']}" if f["last"] > f["first"] else f"{f['first']}",
            "count": f["last"] - f["first"] + 1,
            "bytes": f["bytes"],
        }
        for f in folded
    ]


def parameters(kinds: Mapping[str, Mapping[str, int]], config: MoEConfig | None) -> dict[str, int | None]:
    """{"total", "active"}: active counts K of E routed experts; None where no config says K."""
    total = sum(sizes["parameters"] for sizes in kinds.values())
    if config is None:
        return {"total": total, "active": None}
    routed = kinds.get("routed experts", {}).get("parameters", 0)
    idle = routed - routed * config.n_activated_experts // config.n_routed_experts
    return {"total": total, "active": total - idle}


def short(n: float, unit: str = "") -> str:
    """30532122624 -> '30.5 B': a count as people say it.

    >>> short(30532122624), short(999)
    ('30.5 B', '999')
    """
    for size, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if n >= size:
            return f"{n / size:.1f}{name}{unit}"
    return f"{n:.0f}{unit}"


def names_of(units: Iterable[tuple[list[str], list[str]]], stacks: Collection[str], native: bool) -> set[str]:
    """The stored names of routed experts: those of the units that hold a native stack."""
    held = set(stacks)
    return {n for s, t in units if not held.isdisjoint(s if native else t) for n in s}
