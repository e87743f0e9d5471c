"""Does a family say its router? What it leaves unsaid is refused by name, and not guessed."""

from collections.abc import Mapping
from typing import Any

AFTER = dict(score_func="softmax", softmax_before_topk=False)
"""A softmax over the K experts chosen."""


def unsaid(
    family: str, fixed: Mapping[str, Any], fields: Mapping[str, str], values: Mapping[str, Any]
) -> dict[str, str]:
    """A `score_func` that `route` and `moe` refuse by name, where a family leaves its router to be guessed; else {}.

    values: MoEConfig's fields, as far as fixed and the config say them. Of a softmax the order counts too: over all
    experts before the choice of the top k, or over those chosen.

    >>> unsaid("mine", {}, {}, {})
    {'score_func': 'unsaid by mine: score_func in its fixed or fields says it'}
    >>> unsaid("mine", {"score_func": "sigmoid"}, {}, {"score_func": "sigmoid"})
    {}
    """
    ordered = "softmax_before_topk" in {**fixed, **fields, **values}
    score = values.get("score_func") or ("softmax" if ordered and "score_func" not in fields else None)
    if score is not None and (score != "softmax" or ordered):
        return {}
    what, field = ("", "score_func") if score is None else ("softmax before or after top k, ", "softmax_before_topk")
    return {"score_func": f"{what}unsaid by {family}: {field} in its fixed or fields says it"}
