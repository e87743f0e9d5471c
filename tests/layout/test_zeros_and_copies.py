"""Numbers with leading zeros, and aliases over a capture: every law, both ways, and what is refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fmoe
from fmoe import AdapterError, alias, keep, rule
from fmoe.layout.names import Names, hits, patterns
from fmoe.layout.notation import Rule
from fmoe.layout.spelled.parsing import parse
from fmoe.testing import assert_laws, checkpoints, same

NUMBERS = st.lists(st.integers(0, 10**5) | st.integers(0, 120), min_size=1, max_size=6, unique=True)


@given(NUMBERS, st.integers(2, 5), st.sampled_from(["a.{r:W}.w", "rank_{r:W}.w", "{r:W}", "x{r:W}y.1"]))
def test_a_number_with_zeros_is_spelled_and_read_as_python_does(numbers, width, text):
    made = Rule(parse(text.replace("W", f"0{width}")), parse("b.{r}"))
    names = [text.replace("{r:W}", f"{n:0{width}}") for n in numbers]
    assert [patterns(made)[0].render({"r": n}) for n in numbers] == names
    found = {
        n: r
        for _, hit, rows in hits(made, Names(names))
        for n, r in zip(rows.names, hit.column("r", rows), strict=True)
    }
    assert found == dict(zip(names, numbers, strict=True))


@given(st.integers(0, 10**5), st.integers(1, 7), st.integers(2, 5))
def test_a_number_of_another_width_is_not_claimed(number, digits, width):
    name = f"a.{number:0{digits}}.w"
    claimed = any(hits(Rule(parse(f"a.{{r:0{width}}}.w"), parse("b.{r}")), Names([name])))
    assert claimed == (name == f"a.{number:0{width}}.w")


RULES = [
    rule("rank_{r:02}.{l}.w [d o]", "{l}.w [(r d) o]", r=12),
    rule("rank_{r:02}_{p:03}.w [d]", "w.{p} [r d]"),
    rule("layer_{l:03=k+7}.w [d]", "w.{k} [d]"),
    rule("{pre}{rank:02}.{e:03}.w [i d]", "{pre}{rank}.w [e d i]"),
    rule("a.{r:02}.w [d]", "b.{r:03}.w [d]"),
    rule("w [(r d)]", "a.{r:02} [d]", r=3),
]
COPIES = [
    alias("rank_{r:02}.norm", of="rank_00.norm", r=range(1, 4)) | rule("rank_00.norm [d]", "norm [d]"),
    alias("layers.{l}.embed.weight", of="embed.weight", l=range(61, 63)) | keep("embed.weight"),
    alias("rank_{r:02}.layers.{l}.norm", of="rank_00.layers.{l}.norm", r=range(1, 3))
    | rule("rank_00.layers.{l}.norm [d]", "norm [l d]"),
    alias("{r:02}_{x:03}.{rest}", of="{r:02}.{rest}", x=range(1, 3)) | rule("{r:02}.{rest}", "{r}:{rest}"),
]


@pytest.mark.parametrize("adapter", RULES + COPIES, ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_every_law_holds_both_ways(adapter, data):
    assert_laws(adapter, data.draw(checkpoints(adapter)))


@pytest.mark.parametrize("adapter", RULES, ids=str)
@settings(max_examples=10)
@given(data=st.data())
def test_every_law_holds_turned_round(adapter, data):
    assert_laws(adapter.inverse, data.draw(checkpoints(adapter.inverse)))


NORMS = COPIES[2]
HELD = {f"rank_{r:02}.layers.{l}.norm": torch.full((2,), float(l)) for r in range(3) for l in range(2)}


def test_copies_are_merged_and_given_back():
    native = NORMS.from_hf(HELD)
    assert native["norm"].tolist() == [[0, 0], [1, 1]]
    same(NORMS.resolve(HELD).to_hf(native), HELD)
    alone = {n: t for n, t in HELD.items() if n.startswith("rank_00")}
    same(NORMS.to_hf(NORMS.from_hf(alone)), alone)


@pytest.mark.parametrize("lost", ["rank_02.layers.1.norm", "rank_00.layers.1.norm"])
def test_a_copy_that_is_missing_is_named(lost):
    with pytest.raises(AdapterError, match="'rank_02.layers.1.norm'.*" if "02" in lost else "'rank_00.layers.1.norm'"):
        NORMS.from_hf({n: t for n, t in HELD.items() if n != lost})


def test_copies_that_differ_are_named():
    for other in (torch.ones(2) * 7, torch.ones(3), torch.ones(2, dtype=torch.float64)):
        with pytest.raises(AdapterError, match="'rank_01.layers.0.norm'"):
            NORMS.from_hf(HELD | {"rank_01.layers.0.norm": other})


def test_what_cannot_be_said_is_an_error():
    for make, match in [
        (lambda: alias("a.{r}", of="b"), "how many copies.*bound r, as in r=range"),
        (lambda: alias("a", of="b.{r}"), "{r} is captured in what the copies are of"),
        (lambda: alias("a.{r}", of="b", r=range(2), q=3), "no letter q"),
        (lambda: alias("a", of="b", r=3), "no letter r"),
        (lambda: alias("a.{r} [d]", of="b", r=3), "without axes"),
        (lambda: rule("a.{g:02=x|y}", "b.{g=x|y}"), "choices have no width"),
        (lambda: rule("a.{g:1}", "b.{g}"), "cannot read address"),
        (lambda: alias("a.{r}", of="a.0", r=3).from_hf({"a.0": torch.ones(1), "a.1": torch.ones(1)}), "itself"),
    ]:  # fmt: skip
        with pytest.raises(AdapterError, match=match):
            make()


def test_texts_of_rules_read_back():
    for adapter in RULES:
        left, right = str(adapter).split("   where ")[0].split("  <->  ")
        assert str(rule(left, right)) == f"{left}  <->  {right}"
    assert str(fmoe.alias("{r:02}.a", of="0.a", r=range(1, 3)).choose(**{"{r:02}.a": "present"})) == (
        "alias {r:02}.a   of 0.a   where r in 1..2"
    )
