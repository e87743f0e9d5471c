"""The layouts that many families share: experts one by one, or fused in one tensor; in FP8, and with biases.

Each is an adapter of rules and nothing else. hf and native say where the experts lie: a name's part up to `experts.`.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import or_

from fmoe.layout.adapter import Adapter
from fmoe.layout.build import either, keep, rule, table, together
from fmoe.layout.entries import Either, Entry
from fmoe.layout.table import Table

KEPT = keep("{rest}") | keep("{rest}.weight_scale_inv") | keep("{rest}.expert_bias")
"""Every other tensor, the FP8 scales of those that are quantised, and the router's bias as AFMoE and LFM2 name it."""

LAYER = "{pre}layers.{l}."
MLP = LAYER + "mlp."
EXPERTS = MLP + "experts."
BIAS = "gate.e_score_correction_bias"
SHARED = "shared_experts.{rest}"
FIELDS = dict(
    n_routed_experts="num_local_experts num_experts",
    n_activated_experts="num_experts_per_tok",
    dim="hidden_size",
    moe_inter_dim="intermediate_size",
)
"""The config's names of sizes that a family has which names none of them in its own way."""


def per_expert(
    hf: str = EXPERTS, native: str | None = None, gate_up: str = "gate_proj|up_proj", down: str = "down_proj"
) -> Adapter:
    """{e}.{gate,up,down}.weight, [out in] each; with FP8 scales and biases where there are some.

    gate_up: the names of gate and up, in this order; one name where the activation is not gated.
    """
    x, n = hf, native or hf
    g, u = ("{g=" + gate_up + "}", "(g i)") if "|" in gate_up else (gate_up, "i")
    return table(
        [
            together(
                rule(x + f"{{e}}.{g}.weight [i d]", n + f"gate_and_up_projs [e d {u}]"),
                rule(x + f"{{e}}.{down}.weight [d i]", n + "down_projs [e i d]"),
            ),
            together(
                rule(x + f"{{e}}.{g}.bias [i]", n + f"gate_up_proj_bias [e {u}]"),
                rule(x + f"{{e}}.{down}.bias [d]", n + "down_proj_bias [e d]"),
            ),
        ]
    )


def fused(hf: str = EXPERTS, native: str | None = None, gated: bool = True) -> Adapter:
    """gate_up_proj [e (g i) d] (or up_proj [e i d]) and down_proj [e d i]: how Transformers v5 holds them in memory."""
    x, n = hf, native or hf
    up = rule(x + "gate_up_proj [e (g i) d]", n + "gate_and_up_projs [e d (g i)]", g=2)
    if not gated:
        up = rule(x + "up_proj [e i d]", n + "gate_and_up_projs [e d i]")
    return together(up, rule(x + "down_proj [e d i]", n + "down_projs [e i d]"))


def experts(hf: str = EXPERTS) -> Adapter:
    """Published one by one; fused is accepted, found and given back too."""
    return either("layout", per_expert=per_expert(hf), fused=fused(hf))


def transposed(hf: str = EXPERTS, native: str | None = None, gate_up: str = "(g i)", biases: bool = False) -> Adapter:
    """gate_up_proj [e d (g i)] and down_proj [e i d]: as they multiply. gate_up: (i g) where the two alternate."""
    x, n = hf, native or hf
    weights = (
        rule(x + f"gate_up_proj [e d {gate_up}]", n + f"gate_and_up_projs [e d {gate_up}]", g=2),
        rule(x + "down_proj [e i d]", n + "down_projs [e i d]"),
    )
    bias = (
        rule(x + f"gate_up_proj_bias [e {gate_up}]", n + f"gate_up_proj_bias [e {gate_up}]", g=2),
        rule(x + "down_proj_bias [e d]", n + "down_proj_bias [e d]"),
    )
    return together(*weights, *(bias if biases else ()))


def block(
    hf: str, native: str, names: Mapping[str, str], gate_up: str = "gate_proj|up_proj", down: str = "down_proj"
) -> Adapter:
    """Experts one by one, with a router and shared experts under names of their own.

    hf and native say where the block lies: a name's part up to `experts.`. names: the other names in it, theirs ->
    ours, without that part; theirs may also be whole, from `{pre}` on.
    """
    return _named(per_expert(hf + "experts.", native + "experts.", gate_up, down), hf, native, names)


def renamed(
    names: Mapping[str, str], in_memory: Mapping[str, str] | None = None, hf: str = MLP, /, **words: str
) -> Adapter:
    """Published as a `block` at hf; fused under `mlp` is accepted, found and given back too.

    in_memory: the names beside fused experts, theirs -> ours; None: ours.
    """
    ours = {name: name for name in names.values()} if in_memory is None else in_memory
    return either("layout", per_expert=block(hf, MLP, names, **words), fused=_named(fused(), MLP, MLP, ours))


def first(rules: Adapter, **options: str) -> Adapter:
    """The same rules, of a class that reads no other option than these; quantised tensors lie in the one before.

    >>> str(first(either("layout", a=rule("x", "y"), b=rule("z", "y")), layout="b")).splitlines()[0]
    'layout = b (published):'
    """

    def led(entry: Entry) -> Entry:
        if not (isinstance(entry, Either) and (chosen := options.get(entry.name))):
            return entry
        others = tuple((label, entries) for label, entries in entry.options if label != chosen)
        return replace(
            entry,
            options=((chosen, entry.choose(chosen)), *others),
            quantized=entry.quantized or entry.options[0][0],
        )

    lead = lambda stage: replace(stage, entries=tuple(map(led, stage.entries))) if isinstance(stage, Table) else stage
    return replace(rules, stages=tuple(map(lead, rules.stages)))


def _named(experts: Adapter, hf: str, native: str, names: Mapping[str, str]) -> Adapter:
    whole = lambda name: name if name.startswith("{pre}") else hf + name
    return reduce(or_, (rule(whole(theirs), native + ours) for theirs, ours in names.items()), experts)
