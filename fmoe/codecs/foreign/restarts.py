"""Blocks that begin again inside a matrix, which only a config can say."""

from collections.abc import Mapping
from typing import Any


def restarts(config: Mapping[str, Any] | None) -> tuple[tuple[int, int], ...]:
    """(rows, shards) of fused query, key and value projections of which every shard has blocks of its own: MiMo-V2.5's.

    A shard is what one key-value head needs; sliding layers (swa_) count other heads.

    >>> told = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "v_head_dim": 8}
    >>> restarts(told | {"model_type": "mimo_v2"})
    ((176, 2),)
    """
    told: Mapping[str, Any] = config or {}
    found: dict[int, int] = {}
    if not str(told.get("model_type")).startswith("mimo_v2"):
        return ()
    plain = lambda n: isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31
    for pre in ("", "swa_"):
        said = {n: told.get(pre + n, told.get(n)) for n in ("num_attention_heads", "num_key_value_heads", "head_dim")}
        said["v_head_dim"] = told.get(pre + "v_head_dim", told.get("v_head_dim", said["head_dim"]))
        if all(map(plain, said.values())):
            q, kv, k, v = said.values()
            found[q * k + kv * (k + v)] = kv
    return tuple(found.items())
