"""fmoe.testing holds a user's own adapter to the laws: a broken one is told which law it breaks."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

import fmoe
from fmoe import Adapter, TensorSpec, keep, rule
from fmoe.testing import assert_laws, checkpoints

SPECS = {f"w.{e}": TensorSpec((2, 3), torch.float32) for e in range(2)}
STACK = lambda p: {"w": torch.stack([p[n] for n in sorted(p)])}
BACK = lambda p: {f"w.{e}": t for e, t in enumerate(p["w"])}


def test_two_functions_are_held_to_the_laws():
    assert_laws((STACK, BACK), SPECS)


@pytest.mark.parametrize(
    "there, back, why",
    [
        # follows the order of the dict
        (lambda p: {"w": torch.stack(list(p.values()))}, BACK, "order: from_hf of x in another order gives 'w' with"),
        (STACK, lambda p: {"w.0": p["w"][0]}, r"inverse: to_hf\(from_hf\(x\)\) gives other names: without \['w.1'\]"),
        (STACK, lambda p: {n: t.T for n, t in BACK(p).items()}, r"inverse: .* 'w.0' as \[3, 2\], expected \[2, 3\]"),
        (STACK, lambda p: {n: t.add(1) for n, t in BACK(p).items()}, "inverse: .* gives 'w.0' with other values"),
        (STACK, lambda p: {n: t.add_(1) for n, t in BACK(p).items()}, "purity: to_hf changed its argument 'w'"),
        (lambda p: STACK({n: t.add_(1) for n, t in p.items()}), BACK, "purity: from_hf changed its argument 'w.0'"),
        (lambda p: {"w": torch.stack([p.pop(f"w.{e}") for e in (0, 1)])}, BACK, "purity: from_hf changed .* 'w.0'"),
        (lambda p: {n: t.half() for n, t in p.items()}, lambda p: p, "inverse: .* in torch.float16, expected torch.fl"),
        (lambda p: {n: t.T for n, t in p.items()}, lambda p: {n: t.T for n, t in p.items()}, "order: from_hf"),
    ],
)
def test_a_broken_pair_is_told_what_it_breaks(there, back, why):
    with pytest.raises(AssertionError, match=why):
        assert_laws((there, back), SPECS)


@settings(deadline=None)
@given(checkpoints(rule("a.{e}.{g=up|gate} [i d]", "b [e d (g i)]") | keep("{rest}")))
def test_the_example_of_the_page(specs):
    assert_laws(rule("a.{e}.{g=up|gate} [i d]", "b [e d (g i)]") | keep("{rest}"), specs)


def test_dir_shows_the_public_names_and_no_others():
    assert dir(fmoe.testing) == sorted(fmoe.testing.__all__) and "checkpoints" in dir(fmoe.testing)


THERE, BACK_, VIEWS = Adapter.from_hf, Adapter.to_hf, Adapter.views
HALF = lambda t: t._replace(dtype=torch.float16) if isinstance(t, TensorSpec) else t
BROKEN = {
    "inverse": ("to_hf", lambda self, x, **how: {n: t + 1 for n, t in BACK_(self, x, **how).items()}),
    "purity": ("from_hf", lambda self, x, copy=False, **how: THERE(self, x, **how)),
    "abstract": ("from_hf", lambda self, x, **how: {n: HALF(t) for n, t in THERE(self, x, **how).items()}),
    "views": ("views", lambda self, x: VIEWS(self, {n: torch.zeros_like(t) for n, t in x.items()})),
    "restriction": ("from_hf", lambda self, x, e=None, **how: THERE(self, x, **how)),
}


@pytest.mark.parametrize("law", BROKEN)
def test_a_broken_adapter_is_told_the_law_by_name(law, monkeypatch):
    """Rules cannot be wrong, so a method is broken from outside, one for each law."""
    adapter, specs = rule("w.{e} [i d]", "w [e i d]") | keep("n"), SPECS | {"n": TensorSpec((2,), torch.float32)}
    assert_laws(adapter, specs)
    monkeypatch.setattr(Adapter, *BROKEN[law])
    with pytest.raises(AssertionError, match=f"^{law}: "):
        assert_laws(adapter, specs)


def test_laws_need_no_hypothesis_and_strategies_name_the_extra():
    code = "import sys; sys.modules['hypothesis'] = None\nimport fmoe.testing as t\nt.assert_laws\n"
    code += "try: t.checkpoints\nexcept ImportError as error: print(error)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "fmoe[testing]"' in run.stdout


def test_a_repr_is_a_line_and_problems_of_one_kind_fold():
    adapter = fmoe.adapter("qwen3_moe", {"model_type": "qwen3_moe"})
    assert repr(adapter).startswith("Adapter(qwen3_moe, layout=per_expert|fused") and len(repr(adapter)) < 200
    head = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    shapes = {"gate": (3, 4), "up": (3, 4), "down": (4, 3)}
    hf = {head.format(l, e, p): torch.ones(s) for l in range(9) for e in range(6) for p, s in shapes.items()}
    plan = adapter.plan(hf)
    assert repr(plan).startswith("Plan(162 tensors -> 18 tensors") and "<table>" in plan._repr_html_()
    assert "<table>" in adapter._repr_html_()
    (own,) = rule("a.{e} [d]", "b [e d]").stages[0].rules()
    assert own._repr_html_() == "<table><tr><td><code>a.{e} [d]</code></td><td><code>b [e d]</code></td></tr></table>"
    for e in (2, 3):
        for l in range(9):
            del hf[head.format(l, e, "gate")], hf[head.format(l, e, "up")]
    with pytest.raises(fmoe.AdapterError) as error:
        adapter.from_hf(hf)
    assert len(str(error.value).split("\n")) <= 20 and "model.layers.{0..8}.mlp.experts.{2,3}" in str(
        error.value
    ).replace("{2..3}", "{2,3}")
    assert len([k for k in error.value.keys if "gate" in k or "up" in k]) >= 36
