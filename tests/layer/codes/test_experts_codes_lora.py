"""Codes that stay as they are: LoRA beside them, and what does not fit is refused by name."""

from typing import Any

import pytest
import torch
from coded_cases import equal, every_backend, every_format, few_formats, mine
from kept import layer, lora, results, tokens

import fmoe
from fmoe.types import bits


@few_formats
@every_backend
def test_lora_beside_codes_is_lora_beside_what_they_say(fmt: str, backend: Any) -> None:
    codes, decoded, config = layer(fmt)
    x, routing = tokens(config)
    for adapters in (lora(config), {n: t for n, t in lora(config).items() if "down" in n}):
        expected = results(
            decoded | adapters, x, routing, config, lora_alpha=8.0, backend="loop" if backend is mine else backend
        )
        found = results(codes | adapters, x, routing, config, lora_alpha=8.0, backend=backend)
        assert set(adapters) < found.keys() and all(found[n][0].any() and not found[n][1].any() for n in adapters)
        equal(found, expected)


@every_format
def test_lora_is_drawn_in_the_shape_of_what_codes_say(fmt: str) -> None:
    codes, decoded, _ = layer(fmt)
    made, wanted = fmoe.lora.init(codes, r=4), fmoe.lora.init(decoded, r=4)
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in wanted.items()}
    assert {t.dtype for t in made.values()} == {torch.bfloat16}
    with pytest.raises(fmoe.AdapterError, match="'down_projs' is .*, expected it decoded, or its scales beside it"):
        fmoe.lora.init({"down_projs": codes["down_projs"]}, r=4)


@few_formats
def test_a_step_of_training_changes_lora_and_nothing_else(fmt: str) -> None:
    codes, _, config = layer(fmt)
    x, routing = tokens(config)
    before = {n: t.clone() for n, t in codes.items()}
    train = {n: torch.nn.Parameter(t) for n, t in lora(config).items()}
    optimizer = torch.optim.Adam(train.values(), lr=1e-5)
    loss = lambda: fmoe.experts(codes | train, x, routing, config).square().mean()
    old, first = {n: t.detach().clone() for n, t in train.items()}, loss()
    first.backward()
    optimizer.step()
    assert loss() < first
    assert all(not torch.equal(t, old[n]) for n, t in train.items())
    assert all(torch.equal(bits(t), bits(before[n])) for n, t in codes.items())


def refusals() -> dict[str, tuple[Any, str]]:
    scale = "gate_and_up_projs_scale_inv"
    floats = lambda p: {n: t for n, t in p.items() if n != scale}
    return {
        "no scale": (floats, "'gate_and_up_projs' is torch.uint8, expected it decoded.* its scales"),
        "two scales": (lambda p: p | {"gate_and_up_projs_scale_nvfp4": p[scale]}, "beside two scales.*expected one"),
        "a scale too short": (lambda p: p | {scale: p[scale][:, :1]}, r"is codes .*scales \[3, 1, 256\] uint8.*mxfp4"),
        "codes of another width": (lambda p: p | {"down_projs": p["down_projs"][:, :32]}, r"has shape \[3, 64, 128\]"),
        "of other experts": (lambda p: p | {scale: p[scale][:2]}, r"scales \[2, 4, 256\]"),
        "scales of floats": (lambda p: p | {scale: torch.ones(3, 4, 256)}, "float32.*expected those of"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refusals())
@every_backend
def test_what_does_not_fit_is_refused_by_name(case: str, backend: Any) -> None:
    codes, _, config = layer("mxfp4 blocks")
    change, text = refusals()[case]
    with pytest.raises(ValueError, match=text):
        fmoe.experts(change(codes), *tokens(config), config, backend=backend)


@every_backend
def test_a_scale_that_is_no_number_is_told_where_it_is_used(backend: Any) -> None:
    codes, _, config = layer("fp8 side channel")
    x, routing = tokens(config)
    name = "down_projs_scale_fp8_side_channel"
    for e, used in ((1, False), (2, True)):  # expert 1 is idle
        bad = codes[name].clone()
        bad[e, 0, 5] = torch.nan
        if not used:
            equal(*(results(codes | {name: s}, x, routing, config, backend=backend) for s in (bad, codes[name])))
            continue
        with pytest.raises(ValueError, match="'down_projs', expert 2: a scale is nan, expected finite"):
            fmoe.experts(codes | {name: bad}, x, routing, config, backend=backend)


def test_codes_that_require_a_gradient_are_refused() -> None:
    codes, _, config = layer("fp8 blocks")
    trained = codes | {"down_projs": codes["down_projs"].clone().requires_grad_()}
    with pytest.raises(ValueError, match="'down_projs' is codes and requires a gradient, expected it frozen"):
        fmoe.experts(trained, *tokens(config), config)
    with pytest.raises(ValueError, match="'gate_and_up_projs' is codes and requires a gradient"):
        torch.func.grad(lambda p: fmoe.experts(p, *tokens(config), config).sum())(codes)
