"""Families that Transformers has no class for, or none that is small: published names and axes."""

import math
import re

import pytest
import torch
from published_names import PUBLISHED
from torch import Tensor

import fmoe
from fmoe.families import FAMILIES
from fmoe.testing import same


def laid(stack: Tensor, axes: str, prefix: str, address: str) -> dict[str, Tensor]:
    """A stack over `axes`, one letter each, as the tensors that an address names."""
    name, dims = address.removesuffix("]").split(" [")
    found = {prefix + name: (stack, axes)}
    for slot in re.findall(r"\{.+?\}", name):
        letter, _, labels = slot.strip("{}").partition("=")
        count = stack.shape[axes.index(letter)]
        found = {
            n.replace(slot, label): (t.select(a.index(letter), k), a.replace(letter, ""))
            for n, (t, a) in found.items()
            for k, label in enumerate(labels.split("|") if labels else map(str, range(count)))
        }
    shape = [d.strip("()").replace(" ", "") for d in re.findall(r"\(.+?\)|\w", dims)]
    order = "".join(shape)
    sizes = lambda t, a: [math.prod(t.shape[a.index(x)] for x in d) for d in shape]
    return {n: t.permute([a.index(x) for x in order]).reshape(sizes(t, a)).clone() for n, (t, a) in found.items()}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_names_become_the_native_stacks(model_type):
    prefix, (up, down), native = PUBLISHED[model_type]
    gates = "g" in up.split(" [")[0] + up.split(" [")[1] and re.search(r"\bg\b", up)
    both, last = torch.randn(3, 2 if gates else 1, 4, 5), torch.randn(3, 5, 4)
    hf_tensors = laid(both if gates else both[:, 0], "egid" if gates else "eid", prefix, up)
    hf_tensors |= laid(last, "edi", prefix, down) | {"other": torch.ones(1)}
    found = FAMILIES[model_type]
    sizes = dict(n_routed_experts=3, moe_inter_dim=4, dim=5)
    adapter = found.adapter({found.fields[field].split()[0]: n for field, n in sizes.items()})
    params = adapter.from_hf(hf_tensors)
    stem = native or prefix
    assert params.keys() == {stem + "gate_and_up_projs", stem + "down_projs", "other"}
    assert torch.equal(params[stem + "gate_and_up_projs"], both.flatten(1, 2).mT)
    assert torch.equal(params[stem + "down_projs"], last.mT)
    same(adapter.resolve(hf_tensors).to_hf(params), hf_tensors)
    same(adapter.to_hf(params), hf_tensors)


def test_hunyuan_image_has_up_before_gate_and_lists_for_numbers():
    D, I, S, E, block = 6, 4, 5, 3, "model.layers.0.mlp."
    tensors = {f"{block}experts.{e}.gate_and_up_proj.weight": torch.randn(2 * I, D) for e in range(E)}
    tensors |= {f"{block}experts.{e}.down_proj.weight": torch.randn(D, I) for e in range(E)}
    tensors |= {block + "shared_mlp.gate_and_up_proj.weight": torch.randn(2 * S, D)}
    tensors |= {block + "shared_mlp.down_proj.weight": torch.randn(D, S), "vae.x.weight": torch.ones(2)}
    tensors |= {block + "gate.wg.weight": torch.randn(E, D)}
    sizes = dict(num_hidden_layers=2, num_experts=[E, E], moe_topk=[2, 2], hidden_size=D, moe_intermediate_size=[I, I])
    adapter = fmoe.adapter("hunyuan_image_3_moe", sizes)
    native = adapter.from_hf(tensors)
    same(adapter.to_hf(native), tensors)
    for e, (up, gate) in enumerate(tensors[f"{block}experts.{e}.gate_and_up_proj.weight"].split(I) for e in range(E)):
        assert torch.equal(native[block + "experts.gate_and_up_projs"][e], torch.cat([gate, up]).T)
    up, gate = tensors[block + "shared_mlp.gate_and_up_proj.weight"].split(S)
    assert torch.equal(native[block + "shared_experts.gate_proj.weight"], gate)
    assert torch.equal(native[block + "shared_experts.up_proj.weight"], up)
    assert torch.equal(native[block + "gate.weight"], tensors[block + "gate.wg.weight"])
    other = fmoe.adapter("hunyuan_image_3_moe", sizes | dict(num_experts=[E, E + 1]))
    with pytest.raises(fmoe.AdapterError, match="num_experts"):
        other.moe_config  # noqa: B018


def test_a_shift_by_a_size_wants_that_size():
    two = ("x.{e}.w [c]", "text [e c]"), ("x.{k=e+E}.w [d]", "vision [e d]")
    tensors = {f"x.{n}.w": torch.full((2 + n // 3,), float(n)) for n in range(6)}
    rules = fmoe.rule(*two[0], e=3) | fmoe.rule(*two[1], e=3)
    native = rules.from_hf(tensors)
    assert native["text"][:, 0].tolist() == [0, 1, 2] and native["vision"][:, 0].tolist() == [3, 4, 5]
    same(rules.to_hf(native), tensors)
    assert "{k=e+3}" in str(rules) and "{k=e+E}" in str(fmoe.rule(*two[1]))
    with pytest.raises(fmoe.AdapterError, match="needs the size E") as error:
        fmoe.rule(*two[1]).from_hf(tensors)
    assert error.value.keys == ("x.0.w",)
    with pytest.raises(fmoe.AdapterError, match="a size is added"):
        fmoe.rule("x.{k=e-E}.w [d]", "v [e d]")
