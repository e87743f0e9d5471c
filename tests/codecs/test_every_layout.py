"""Every format of the table in every way that experts lie: what is read is right and comes back, or it is refused."""

import affine_cases
import pytest
import torch
from torch import Tensor

import fmoe
from fmoe.codecs.foreign import twofold
from fmoe.codecs.formats import FORMATS, Format
from fmoe.codecs.parts import as_named
from fmoe.families import family
from fmoe.testing import same

E, D, I = 2, 128, 128
UP, DOWN = (I, D), (D, I)
MLP, MIXTRAL, GRANITE = "layers.1.mlp.", "model.layers.1.block_sparse_moe.", "model.layers.1.block_sparse_moe."
each = lambda stem, up, down: {
    f"{stem}{e}.{n}.weight": DOWN if n == down else UP for e in range(E) for n in (*up, down)
}
fused = lambda stem: {f"{stem}experts.gate_up_proj": (E, 2 * I, D), f"{stem}experts.down_proj": (E, D, I)}
turned = lambda stem: {n: (e, i, o) for n, (e, o, i) in fused(stem).items()}
WAYS = {
    "qwen3_moe": each(f"model.{MLP}experts.", ("gate_proj", "up_proj"), "down_proj"),
    "mixtral": each(f"{MIXTRAL}experts.", ("w1", "w3"), "w2"),
    "nemotron_h": each("backbone.layers.1.mixer.experts.", ("up_proj",), "down_proj"),
    "deepseek_v3": fused(f"model.{MLP}"),
    "qwen3_5_moe_text": fused(f"model.{MLP}"),
    "qwen3_vl_moe": turned(f"model.language_model.{MLP}"),
    "llama4_text": turned("model.layers.1.feed_forward."),
    "gpt_oss": turned(f"model.{MLP}"),
    "step3p5": {f"model.layers.1.moe.{n}_proj.weight": (E, I, D) for n in ("gate", "up", "down")},
    "granitemoe": {f"{GRANITE}input_linear.weight": (E, 2 * I, D), f"{GRANITE}output_linear.weight": (E, D, I)},
    "jetmoe": {f"model.{MLP}input_linear.weight": (E, 2 * I, D), f"model.{MLP}output_linear.weight": (E, D, I)},
    "dbrx": {f"transformer.blocks.1.ffn.experts.mlp.{n}": (E * I, D) for n in ("w1", "v1", "w2")},
}
"""Family -> experts of a layer as its files have them: one by one, fused, turned, stacked, flattened."""
BESIDE = {
    "gpt_oss": {
        f"model.{MLP}experts.{n}_bias": torch.ones(E, o) for n, o in (("gate_up_proj", 2 * I), ("down_proj", D))
    }
}
CHOICES = {"qwen3_vl_moe": {"layout": "transposed"}}


def parts(f: Format, name: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """A drawn weight's parts in a format, and what they say. Raises ValueError where it has no such form."""
    if f.zeros:
        made, said = affine_cases.parts(f.name, name.removesuffix(".weight"), *shape[-2:], 32, len(name))
        stack = len(shape) == 3
        return ({n: torch.stack([t] * E) for n, t in made.items()}, torch.stack([said] * E)) if stack else (made, said)
    p = as_named(name, f, shape)
    if p is None:
        raise ValueError(name)
    weight, second = torch.randn(shape), {}
    if p.second:
        codes, scale, whole = twofold.encode(f, weight)
        second = {p.second[0]: whole.reshape(p.kept[1][2])}
        said = f.decode(codes, scale, torch.float32, second=whole)
    else:
        codes, scale = f.encode(weight)
        said = f.decode(codes, scale, torch.float32)
    made = {p.codes: codes, p.scale: scale.reshape(f.spelled(tuple(scale.shape)))} | second
    return made | ({p.extent: torch.tensor(shape)} if p.extent else {}), said


def declared(f: Format) -> dict:
    if f.zeros:
        return affine_cases.config_of(f.name, 32)
    method, _, form = f.method.partition(" ")
    weights = {"num_bits": 8 if "int8" in f.name else 4, "group_size": 32}
    found = {"quant_method": method, "config_groups": {"group_0": {"weights": weights}}}
    return found | ({"format": form} if form else {}) | ({"weight_block_size": [*f.block]} if f.block[0] > 1 else {})


@pytest.mark.parametrize("model_type", WAYS)
def test_what_is_read_is_right_and_comes_back_or_it_is_refused(model_type: str) -> None:
    torch.manual_seed(0)
    sizes = dict(n_routed_experts=E, n_activated_experts=1, dim=D, moe_inter_dim=I)
    config = {family(model_type).fields[f].split()[0]: n for f, n in sizes.items()} | {"torch_dtype": "float32"}
    plain, read = fmoe.adapter(model_type, config, **CHOICES.get(model_type, {})), set()
    for name, f in FORMATS.items():
        hf, said = dict[str, Tensor](), dict[str, Tensor]()
        try:
            for key, shape in WAYS[model_type].items():
                made, said[key] = parts(f, key, shape)
                hf |= made
        except (ValueError, IndexError, RuntimeError):  # a matrix of such a shape has no such parts
            continue
        hf, said = ({**made, **BESIDE.get(model_type, {})} for made in (hf, said))
        whole = plain.resolve(said).from_hf({n: t.float() for n, t in said.items()})
        for how in ("decode", "keep"):
            try:
                asked = config | {"quantization_config": declared(f)}
                adapter = fmoe.adapter(model_type, asked, quantized=how, **CHOICES.get(model_type, {})).resolve(hf)
                native = adapter.from_hf(hf)
            except fmoe.AdapterError:
                continue
            same(adapter.to_hf(native), hf)
            read.add((how, name))
            for n, t in whole.items() if how == "decode" else ():
                torch.testing.assert_close(native[n].double(), t.double(), rtol=1e-2, atol=1e-4)
    assert {how for how, _ in read} == {"decode", "keep"}
