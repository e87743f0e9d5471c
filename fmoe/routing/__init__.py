"""Who goes where, as pure functions: a routing is made, counted, balanced, cut to a capacity, and made again.

route, topk_routing     a routing, also of experts that were chosen before (router replay)
routed                  with the logits, scores and counts that losses ask for
count, load             who gets how much; load_balance_metrics, of all layers, as runs are watched
update_bias             balance without a loss, as DeepSeek-V3 has it
drop                    experts of a capacity
"""

from fmoe.entrance import held
from fmoe.routing.choose import route, routed, routed_of, routing_of, topk_routing
from fmoe.routing.gate import gate_logits
from fmoe.routing.metrics import load_balance_metrics
from fmoe.routing.scores import SCORES, Score
from fmoe.routing.usage import count, drop, load, update_bias

__all__ = [
    "SCORES",
    "Score",
    "count",
    "drop",
    "gate_logits",
    "load",
    "load_balance_metrics",
    "route",
    "routed",
    "routed_of",
    "routing_of",
    "topk_routing",
    "update_bias",
]

_HOT = "count gate_logits route routed routed_of routing_of topk_routing update_bias"
held(globals(), "drop load load_balance_metrics", late=_HOT, error=ValueError)
