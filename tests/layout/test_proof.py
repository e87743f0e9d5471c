"""A plan proves both directions for every row, or refuses: never does it convert what would not come back."""

import pytest
import torch
from torch import Tensor

import fmoe
from fmoe import Adapter, drop, keep, rule
from fmoe.testing import assert_laws, same


def of(*names: str, shape: tuple[int, ...] = (2,)) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name in names}


QKV = "{p=q|k|v}.w"
REFUSED = {
    "digits side by side": (rule("a.{l}.{k}.w", "b{l}{k}.w"), of("a.0.0.w", "a.1.11.w"), "'a.1.11.w'.*another name"),
    "the same, stacked": (
        rule("a.{l}.{k}.w [e d]", "b{l}{k}.{e}.w [d]"),
        of("a.0.0.w", "a.1.11.w", shape=(2, 1)),
        "'a.1.11.w'.*another name",
    ),
    "digits glued to a literal": (rule("a.{l}.{k}.w", "b1{l}{k}.w"), of("a.1.11.w", "a.0.0.w"), "a.1.11.w"),
    "words side by side": (rule("a.{foo}.{bar}.w", "b{foo}{bar}.w"), of("a.x.yz.w"), "a.x.yz.w"),
    "choices that are numbers": (
        rule("a.{g=1|11}.{h=1|11}.w", "b{g=1|11}{h=1|11}.w"),
        of("a.11.1.w"),
        "'a.11.1.w' would become 'b111.w'.*another name",
    ),
    "a later row is a rival's": (rule("a.{foo}.w", "b.{foo}.w") | rule("c.w", "b.7.w"), of("a.3.w", "a.7.w"), "a.7.w"),
    "a later row is a rival's, stacked": (
        rule("a [e d]", "b.{e} [d]") | rule("c [d 1]", "b.1 [d]"),
        of("a", shape=(2, 2)),
        "'a' would become 'b.1'.*would claim too",
    ),
    "bound of a rival": (
        rule("a.{l} [d]", "c.{l} [d]") | rule("b.{l} [d]", "c.{l} [d]", l=range(5, 6)),
        of("a.0", "a.5"),
        "a.5",
    ),
    "shift of a rival": (rule("a.{l} [d]", "c.{l} [d]") | rule("b.{l} [d]", "c.{k=l+3} [d]"), of("a.0", "a.5"), "a.5"),
    "a drop of a later row": (
        (drop("a.7.w", because="old") | rule("a.{foo}.w", "b.{foo}.w")).inverse,
        of("b.3.w", "b.7.w"),
        "'b.7.w' would become 'a.7.w'.*drop",
    ),
    "sizes lost in a merge": (rule("x [a b]", "y [(a b)]"), of("x", shape=(3, 4)), "how long a, b are"),
    "parts and a factor": (
        rule(f"{QKV} [(p h) d]", "w [(q|k|v h) d]", q=2, k=1),
        {"q.w": torch.ones(4, 3), "k.w": torch.ones(2, 3), "v.w": torch.ones(2, 3)},
        "how long v, h|sizes of",
    ),
    "parts left unbound": (
        rule("x.{p=q|k} [p d]", "w [(q|k) d]"),
        {"x.q": torch.ones(2, 3), "x.k": torch.ones(1, 3)},
        "bind q, k",
    ),
    "kept, and suspected on the way back": (
        rule("w [e d]", "a.{e}.w [d]") | keep("{rest}"),
        {"w": torch.ones(2, 3), "a.norm": torch.ones(2)},
        "'a.norm' would be kept, but not on the way back",
    ),
    "an empty stack": (
        rule("w [e d]", "w.{e} [d]"),
        of("w", shape=(0, 3)),
        "'w': nothing would come out, since e is 0",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "beside a keep"])
def test_what_would_not_come_back_is_refused_on_the_way_there(what, turned):
    adapter, hf, why = REFUSED[what]
    if turned and what != "parts left unbound":  # which `|` refuses
        adapter, hf = adapter | keep("kept"), hf | of("kept")
    with pytest.raises(fmoe.AdapterError, match=why) as error:
        adapter.from_hf(hf)
    assert set(error.value.keys) & hf.keys()


RIGHT: dict[str, tuple[Adapter, dict[str, Tensor]]] = {
    "digits side by side that can be told apart": (rule("a.{l}.{k}.w", "b{l}x{k}.w"), of("a.0.0.w", "a.1.11.w")),
    "numbers as choices, between dots": (rule("a.{g=1|11}.{l}", "b.{l}.{g=11|1}"), of("a.1.11", "a.11.1", "a.11.11")),
    "a rival elsewhere": (
        rule("a.{l} [d]", "c.{l} [d]", l=range(0, 5)) | rule("b.{l} [d]", "c.{k=l+5} [d]"),
        of("a.0", "a.4", "b.0"),
    ),
    "a merge with a size": (rule("x [a b]", "y [(a b)]", a=3), of("x", shape=(3, 4))),
    "a merge of what names count": (rule("x [a b d]", "y.{a} [(b d)]", d=2), of("x", shape=(3, 4, 2))),
    "all parts bound": (
        rule(f"{QKV} [(p h) d]", "w [(q|k|v h) d]", q=2, k=1, v=1),
        {"q.w": torch.ones(4, 3), "k.w": torch.ones(2, 3), "v.w": torch.ones(2, 3)},
    ),
}


@pytest.mark.parametrize("what", RIGHT)
def test_what_comes_back_is_converted(what):
    adapter, hf = RIGHT[what]
    same(adapter.to_hf(adapter.from_hf(hf)), hf)
    assert_laws(adapter, {n: fmoe.TensorSpec(tuple(t.shape), t.dtype) for n, t in hf.items()})


def test_unbound_parts_are_refused_where_adapters_are_joined():
    qkv = rule("{pre}self_attn.{p=q|k|v}_proj.weight [p d]", "{pre}self_attn.qkv.weight [(q|k|v) d]")
    base = fmoe.adapter("qwen3_moe")
    for join in (lambda: base | qkv, lambda: qkv | base, lambda: base >> qkv, lambda: base >> (qkv | keep("{rest}"))):
        with pytest.raises(fmoe.AdapterError, match=r"bind q, k, v, or all but one of them"):
            join()


def test_a_name_that_ends_in_a_number_is_refused_with_a_line_that_keeps_it():
    table = rule("c1{k}a.{e}1 [d]", "b{k}w [e d]")
    hf = of(*(f"c1{k}a.{e}" for k in (1, 2, 3) for e in (10, 12)))
    with pytest.raises(fmoe.AdapterError, match=r'keep\("\{pre\}c12a.\{rest\}"\)') as error:
        (table | keep("{rest}")).from_hf(hf)
    assert "\0" not in str(error.value)
    kept = table | keep("{pre}c11a.{rest}") | keep("{pre}c12a.{rest}") | keep("{pre}c13a.{rest}")
    same(kept.to_hf(kept.from_hf(hf)), hf)


def test_rules_that_come_together_count_the_same_layers_in_whatever_order_their_names_have_them():
    pair = fmoe.together(rule("a.{l}.{k} [d]", "v.{l}.{k} [d]"), rule("b.{k}.{l} [d]", "w.{k}.{l} [d]"))
    hf = of("a.1.2", "b.2.1")
    same(pair.to_hf(pair.from_hf(hf)), hf)
    with pytest.raises(fmoe.AdapterError, match="missing 'b.2.1'|missing 'a.2.1'"):
        pair.from_hf(of("a.1.2", "b.1.2"))
    for other in ("b.{l} [d]", "w.{l} [d]"), ("b [d]", "w [d]"), ("b.{l}.{k=x|y} [d]", "w.{l}.{k=x|y} [d]"):
        with pytest.raises(fmoe.AdapterError, match="the same captures on both sides"):
            fmoe.together(rule("a.{l}.{k} [d]", "v.{l}.{k} [d]"), rule(*other))
