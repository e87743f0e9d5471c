"""How tensor-parallel ranks cut Megatron's parameters, as rules: rows, columns, halves of gate over up, or not at all.

rows      mp_rank_{t:02}.x [o d]       <->  x [(t o) d]
columns   mp_rank_{t:02}.x [o d]       <->  x [o (t d)]
halves    mp_rank_{t:02}.x [(g i) d]   <->  x [(g t i) d]
"""

import re
from collections.abc import Mapping
from typing import Any

from fmoe.families import family
from fmoe.families.kind import as_dict
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import rule, table
from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem, TensorSpec

ROWS = r"(embedding\.word_embeddings|output_layer)\.weight|.*\.self_attention\.(linear_qkv\.(weight|bias)" + (
    r"|(linear_q_proj|linear_q_up_proj|linear_kv_up_proj)\.weight|core_attention\.softmax_offset)"
)
COLUMNS = r".*\.(self_attention\.linear_proj\.weight|linear_fc2\.weight\d*)"
HALVES = r".*\.linear_fc1\.(weight|bias)\d*"
WHOLE = r".*(norm\.weight|layer_norm_weight|router\.(weight|bias|expert_bias)|linear_proj\.bias|linear_fc2\.bias\d*" + (
    r"|shared_experts\.gate_weight|[qk]_layernorm\.weight)"
)
EITHER = {
    r".*\.linear_q_down_proj\.weight": ("q_lora_rank",),
    r".*\.linear_kv_down_proj\.weight": ("kv_lora_rank", "qk_rope_head_dim"),
    r".*\.eh_proj\.weight": ("hidden_size",),
}
"""Cut by rows, or whole on every rank, as the run's layers are; the config says how many rows that is."""
EXPERTS = r".*\.experts\.(local_experts\.\d+\.)?linear_fc([12])\.(weight|bias)\d*"
"""Cut like other layers, or, with an expert-tensor-parallel size of 1, whole on the rank that has the expert."""
_NUMBERS = re.compile(r"(?<=\.layers\.)\d+|(?<=weight)\d+$|(?<=bias)\d+$|(?<=local_experts\.)\d+")


def replicated(name: str, spec: TensorSpec, config: Mapping[str, Any]) -> bool:
    """Whether every rank holds the whole of a parameter."""
    for pattern, fields in EITHER.items():
        if re.fullmatch(pattern, name):
            return spec.shape[:1] == (sum(int(config.get(field) or 0) for field in fields),)
    if (expert := re.fullmatch(EXPERTS, name)) and (expert[2], expert[3]) != ("2", "bias"):
        inner = family(str(config.get("model_type"))).values(as_dict(config)).get("moe_inter_dim")
        return inner is not None and (2 * inner == spec.shape[0] if expert[2] == "1" else inner == spec.shape[1])
    return bool(re.fullmatch(WHOLE, name))


def joined(specs: Mapping[str, TensorSpec], ranks: int) -> Adapter:
    """Names with their rank in front <-> the model's, joined as ranks cut them; of one rank nothing.

    Raises AdapterError naming what no rule here knows how to join.
    """
    if ranks == 1:
        return Adapter()
    cut = {n.partition(".")[2]: s for n, s in specs.items() if n.startswith("mp_rank_00.")}
    other = {n.partition(".")[2] for n in specs if n.startswith("mp_rank_") and not n.startswith("mp_rank_00.")} - {
        *cut
    }
    shapes: dict[str, tuple[str, int]] = {}
    for name, spec in cut.items():
        shapes.setdefault(_pattern(name), (name, len(spec.shape)))
    lost = [*sorted(other), *(name for name, _ in shapes.values() if not _axes(name, 1))]
    if lost:
        raise AdapterError([Problem(f"{some(lost)}: no rule says how tensor-parallel ranks cut this", tuple(lost))])
    rules = []
    for pattern, (name, rank) in shapes.items():
        here, there = _axes(name, rank)
        sizes = {"g": 2} if "g" in here else {}
        rules.append(rule(f"mp_rank_{{t:02}}.{pattern} [{here}]", f"{pattern} [{there}]", t=ranks, **sizes))
    whole = dict.fromkeys(_pattern(n) for n in specs if not n.startswith("mp_rank_"))
    return table([*rules, *(rule(pattern, pattern) for pattern in whole)])


def _pattern(name: str) -> str:
    """A name with captures for its layer and its expert."""
    letters = iter("le")
    return _NUMBERS.sub(lambda _: f"{{{next(letters)}}}", name)


def _axes(name: str, rank: int) -> tuple[str, str]:
    """The axes of a rank's part, and of the whole; ("", "") where nothing is known."""
    rest = " d" * (rank - 1)
    if re.fullmatch(ROWS, name) or any(re.fullmatch(pattern, name) for pattern in EITHER):
        return f"o{rest}", f"(t o){rest}"
    if re.fullmatch(COLUMNS, name):
        return "o d", "o (t d)"
    if re.fullmatch(HALVES, name):
        return f"(g i){rest}", f"(g t i){rest}"
    return "", ""
