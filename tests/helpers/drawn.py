"""Adapters drawn by Hypothesis: every builder, beside, after and backwards."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from fmoe import Adapter, alias, drop, either, keep, rename, rule
from fmoe.layout.build import together

# k stands for a number of its own, so that the names of two of these never meet
RULES: tuple[Callable[[int], Adapter], ...] = (
    lambda k: rule(f"a{k}.{{l}}.{{e}}.{{g=up|gate}}.w [i d]", f"b{k}.{{l}}.w [e d (g i)]", i=2),
    lambda k: rule(f"{{pre}}c{k}.{{l}}.w [d i]", f"{{pre}}d{k}.{{l}}.w [i d]"),
    lambda k: rule(f"e{k}.{{rest}}", f"f{k}.{{rest}}"),
    lambda k: rule(f"g{k} [v d]", f"h{k} [d v]"),
    lambda k: rule(f"i{k}.{{p=q|k|v}} [p d]", f"j{k} [(k|q|v) d]", q=3, v=1),
    lambda k: rule(f"k{k}.{{l=m+3}}.w [(a b)]", f"l{k}.{{m}} [b a 1]", a=2, b=2),
    lambda k: rule(f"m{k}.{{name}}.w", f"n{k}.{{name}}"),
    lambda k: rule(f"o{k} [e d]", f"p{k}.{{e}} [d]", e=2),
)


@st.composite
def leaves(draw: Callable[..., Any], k: int) -> Adapter:
    """One builder's adapter, of names that no leaf of another k uses."""
    one, other = (RULES[i](k) for i in draw(st.permutations(range(len(RULES))))[:2])
    made: dict[str, Callable[[], Adapter]] = {
        "rule": lambda: one,
        "together": lambda: together(RULES[0](k), rule(f"a{k}.{{l}}.{{e}}.down [d i]", f"b{k}.{{l}}.v [e i d]", i=2)),
        "either": lambda: either(f"layout{k}", one=one, other=other),
        "keep": lambda: keep(f"{{pre}}keep{k}.{{rest}}"),
        "drop": lambda: drop(f"{{pre}}drop{k}.{{l}}", because="a test"),
        "alias of what is kept": lambda: alias(f"tied{k}", of=f"kept{k}") | keep(f"kept{k}"),
        "alias of what a rule moves": lambda: alias(f"g{k}.tied", of=f"g{k}") | RULES[3](k),
    }
    return made[draw(st.sampled_from(sorted(made)))]()


@st.composite
def adapters(draw: Callable[..., Any]) -> Adapter:
    def side(k: int) -> Adapter:
        adapter = draw(leaves(k))
        for i in range(draw(st.integers(0, 2))):
            adapter = adapter | draw(leaves(k + i + 1))
        return adapter.inverse if draw(st.booleans()) else adapter

    adapter = side(0)
    form = draw(st.sampled_from(["table", "kept", "renamed", "after", "beside", "back"]))
    if form in ("kept", "after", "renamed", "back"):
        adapter = adapter | keep("{rest}")
    if form == "renamed":
        adapter = adapter >> rename(*draw(st.sampled_from([("model.", "policy."), ("b0", "z"), ("", "root.")])))
    if form == "after":
        adapter = adapter >> (side(10) | keep("{rest}"))
    if form == "back":
        adapter = adapter >> adapter.inverse
    if form == "beside":
        adapter = (adapter >> (rename("b0.", "z.") | keep("{rest}"))) | (
            side(10) | draw(st.sampled_from([keep("x.{rest}"), keep("{rest}")]))
        )
    return adapter.inverse if draw(st.booleans()) else adapter
