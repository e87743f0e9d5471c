"""A stage that changes nothing, and refuses a shape that the config rules out: a rule that only renames sees none."""

import re
from dataclasses import dataclass
from math import prod

from fmoe.codecs import CodecPlan
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.stages import Stateless
from fmoe.types import AdapterError, Problem, brief

Said = dict[str, tuple[int | None, ...]]
LAYER = r"(?:model|mtp)\.layers\.\d+\."
NORM = LAYER + r"(?:input_layernorm|post_attention_layernorm|enorm|hnorm|shared_head\.norm)\.weight"


@dataclass(frozen=True)
class Shapes(Stateless):
    """x <-> x, where every tensor whose name fits a pattern has its shape; None is any size.

    Of a range of an axis nothing is said.
    """

    expected: tuple[tuple[str, tuple[int | None, ...]], ...]
    lossless: bool = True

    @property
    def inverse(self) -> "Shapes":
        return self

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> CodecPlan:
        found, seen = [], dict[str, tuple[int | None, ...] | None]()
        for name, spec in specs.items() if not window else ():
            key = re.sub(r"\d+", "0", name)
            if key not in seen:
                seen[key] = next((shape for pattern, shape in self.expected if re.fullmatch(pattern, key)), None)
            want = seen[key]
            if want is not None and spec.dtype.is_floating_point and not _fits(spec.shape, want):
                told = "[" + ", ".join("any" if n is None else str(n) for n in want) + "]"
                found.append(Problem(f"{name!r} is {list(spec.shape)}, expected {told} by the config", (name,)))
        if found:
            raise AdapterError(found)
        return CodecPlan(dict(specs), (), str(self))

    def __str__(self) -> str:
        return "shapes: as the config says them"


def _fits(shape: tuple[int, ...], want: tuple[int | None, ...]) -> bool:
    return len(shape) == len(want) and all(n is None or n == k for k, n in zip(shape, want, strict=True))


def shapes(facts: Facts) -> Shapes:
    """What the config says of the tensors in Hugging Face's names, as far as it says it."""
    at = {LAYER + name: shape for name, shape in (_attention(facts) | _mlp(facts) | _linear(facts)).items()}
    D, V = facts.get("hidden_size"), facts.get("vocab_size")
    top = {r"(?:model\.embed_tokens|lm_head)\.weight": (V, D), r"(?:model|mtp)\.norm\.weight": (D,), NORM: (D,)}
    return Shapes(tuple((top | at).items()))


def _attention(facts: Facts) -> Said:
    D, A = facts.get("hidden_size"), r"self_attn\."
    if not facts.get("num_attention_heads") or not (D or facts.get("head_dim")):
        return {}
    if facts.family == "deepseek_v3":
        nope, rope, v, q, kv = map(
            facts.get, ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank")
        )
        each, h = _sum(nope, rope), facts.heads
        return {
            A + r"q_a_proj\.weight": (q, D),
            A + r"q_a_layernorm\.weight": (q,),
            A + r"q_b_proj\.weight": (_times(h, each), q),
            A + r"q_proj\.weight": (_times(h, each), D),
            A + r"kv_a_proj_with_mqa\.weight": (_sum(kv, rope), D),
            A + r"kv_a_layernorm\.weight": (kv,),
            A + r"kv_b_proj\.weight": (_times(h, _sum(nope, v)), kv),
            A + r"o_proj\.weight": (D, _times(h, v)),
        }
    rows, kv = facts.heads * facts.head_dim, facts.groups * facts.head_dim
    q = rows * (2 if facts.family in ("qwen3_next", "qwen3_5_moe") else 1)  # with its gate
    return {
        A + r"q_proj\.weight": (q, D),
        A + r"q_proj\.bias": (q,),
        A + r"[kv]_proj\.weight": (kv, D),
        A + r"[kv]_proj\.bias": (kv,),
        A + r"o_proj\.weight": (D, rows),
        A + r"o_proj\.bias": (D,),
        A + r"[qk]_norm\.weight": (facts.head_dim,),
        A + r"sinks": (facts.heads,),
    }


def _mlp(facts: Facts) -> Said:
    values = facts.kind.values(facts.config)
    D, E, I = facts.get("hidden_size"), values.get("n_routed_experts"), values.get("moe_inter_dim")
    shared = facts.get("shared_expert_intermediate_size") or _times(facts.get("n_shared_experts"), I)
    wide = facts.get("intermediate_size")
    made: Said = {
        r"mlp\.experts\.gate_up_proj": (E, D, _times(2, I)),
        r"mlp\.experts\.gate_up_proj_bias": (E, _times(2, I)),
        r"mlp\.experts\.down_proj": (E, I, D),
        r"mlp\.experts\.down_proj_bias": (E, D),
        r"(?:mlp|block_sparse_moe)\.(?:gate|router)\.weight": (E, D),
        r"mlp\.(?:gate\.e_score_correction_bias|router\.bias)": (E,),
        r"mlp\.shared_expert_gate\.weight": (1, D),
    }
    for where, inner in ((r"mlp\.", wide), (r"mlp\.shared_experts?\.", shared)):
        made |= {where + r"(?:gate|up)_proj\.weight": (inner, D), where + r"down_proj\.weight": (D, inner)}
    experts = r"(?:mlp|block_sparse_moe)\.experts\.\d+\."
    return made | {
        experts + r"(?:gate_proj|up_proj|w1|w3)\.weight": (I, D),
        experts + r"(?:down_proj|w2)\.weight": (D, I),
    }


def _linear(facts: Facts) -> Said:
    heads, size = facts.get("linear_num_value_heads"), facts.get("linear_value_head_dim")
    key = _times(facts.get("linear_num_key_heads"), facts.get("linear_key_head_dim"))
    D, A, value = facts.get("hidden_size"), r"linear_attn\.", _times(heads, size)
    qkv = _sum(_times(2, key), value)
    return {
        A + r"in_proj_qkvz\.weight": (_sum(qkv, value), D),
        A + r"in_proj_ba\.weight": (_times(2, heads), D),
        A + r"in_proj_qkv\.weight": (qkv, D),
        A + r"in_proj_z\.weight": (value, D),
        A + r"in_proj_[ab]\.weight": (heads, D),
        A + r"conv1d\.weight": (qkv, 1, facts.get("linear_conv_kernel_dim")),
        A + r"(?:A_log|dt_bias)": (heads,),
        A + r"norm\.weight": (size,),
        A + r"out_proj\.weight": (D, value),
    }


def _whole(sizes: tuple[object, ...]) -> None:
    if odd := [n for n in sizes if n is not None and not isinstance(n, int)]:
        raise AdapterError(f"the config has the size {brief(odd[0])}, expected whole numbers")


def _sum(*sizes: int | None) -> int | None:
    _whole(sizes)
    return None if None in sizes else sum(n or 0 for n in sizes)


def _times(*sizes: int | None) -> int | None:
    _whole(sizes)
    return None if None in sizes else prod(n or 0 for n in sizes)
