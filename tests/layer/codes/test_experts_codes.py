"""Experts run on their codes: what decoding all of them first gives."""

from dataclasses import replace
from typing import Any

import kept
import pytest
import torch
from coded_cases import equal, every_backend, every_format, few_formats, mine
from fmoe_kernels import reference
from kept import layer, lora, results, tokens
from torch import Tensor

import fmoe
from fmoe.backends.coded import in_tiles
from fmoe.backends.held import stacks
from fmoe.codecs.formats import FORMATS as FORMATS_OF
from fmoe.codecs.stacks import Codes, stack
from fmoe.types import MoEConfig, Routing


@every_format
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_give_what_decoding_all_first_gives(fmt: str, backend: Any, dtype: torch.dtype) -> None:
    codes, decoded, config = layer(fmt, dtype)
    x, routing = tokens(config, dtype)
    expected = results(decoded, x, routing, config, backend="loop" if backend is mine else backend)
    equal(results(codes, x, routing, config, backend=backend), expected)


@every_format
def test_the_kernel_that_decodes_its_tiles_knows_every_format(fmt: str) -> None:
    """As its eager twin says, bit for bit; tests/kernels holds the kernel to that."""
    codes, _, config = layer(fmt)
    for name, w in stacks(codes, config, torch.float32).items():
        tiles = in_tiles(w)
        assert tiles is not None, name
        said = reference.decode(*tiles[:5], divides=tiles.divides, late=tiles.late)
        assert all(torch.equal(said[e], w[e]) for e in range(len(said))), name


@few_formats
@every_backend
@pytest.mark.parametrize("how", [dict(recompute=True), dict(batch_invariant=True)], ids=str)
@pytest.mark.parametrize("after", [False, True])
def test_options_change_no_bit(fmt: str, backend: Any, how: dict[str, bool], after: bool) -> None:
    codes, decoded, config = layer(fmt)
    config = replace(config, apply_router_weight_after_down=after)
    x, routing = tokens(config)
    plain = "loop" if backend is mine else backend
    equal(
        results(codes, x, routing, config, backend=backend, **how),
        results(decoded, x, routing, config, backend=plain, **how),
    )


@few_formats
def test_every_order_of_strides_and_fp64(fmt: str) -> None:
    codes, decoded, config = layer(fmt)
    x, routing = tokens(config)
    equal(
        results({n: t.contiguous() for n, t in codes.items()}, x, routing, config), results(codes, x, routing, config)
    )
    wide = {n: t.double() for n, t in decoded.items()}
    biases = {n: t for n, t in wide.items() if "bias" in n}
    equal(results(codes | biases, x.double(), routing, config), results(wide, x.double(), routing, config))


@every_backend
@few_formats
def test_of_no_tokens_and_of_none_that_goes_anywhere(fmt: str, backend: Any) -> None:
    codes, _, config = layer(fmt)
    x, routing = tokens(config)
    nowhere = routing._replace(indices=torch.full_like(routing.indices, -1))
    for params in (codes, codes | lora(config)):
        found = results(params, x, nowhere, config, backend=backend)
        assert all(t is not None and not t.any() for t in found.values())
        none = Routing(routing.indices[:0], routing.weights[:0])
        assert results(params, x[:0], none, config, backend=backend)["y"].shape == (0, config.dim)


def test_columns_of_gate_and_up_that_take_turns_have_each_its_scale() -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 120, (2, 32, 8), generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor([[[1.0, 4.0]], [[2.0, 0.5]]])
    by_column = {False: scale.repeat_interleave(4, 2), True: scale.repeat(1, 1, 4)}
    for alternate, each in by_column.items():
        made = stack(codes, scale, None, "_scale_fp8_side_one", torch.float32, alternate=alternate)
        assert made.shape == (2, 32, 8) and all(torch.equal(made[e], codes[e].float() * each[e]) for e in range(2))
    config = MoEConfig(
        n_routed_experts=2, n_activated_experts=1, dim=32, moe_inter_dim=4, expert_activation="quick_geglu"
    )
    params = {
        "gate_and_up_projs": codes,
        "gate_and_up_projs_scale_fp8_side_one": scale,
        "down_projs": torch.ones(2, 4, 32),
    }
    x, routing = torch.randn(3, 32, generator=g) / 64, Routing(torch.tensor([[0], [1], [0]]), torch.ones(3, 1))
    decoded = {"gate_and_up_projs": codes.float() * by_column[True], "down_projs": params["down_projs"]}
    torch.testing.assert_close(fmoe.experts(params, x, routing, config), fmoe.experts(decoded, x, routing, config))


@every_backend
@few_formats
def test_only_used_experts_are_decoded_and_again_in_backward(
    fmt: str, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, _, config = layer(fmt)
    x, routing = tokens(config)
    asked: list[int] = []
    seen, told = (
        Codes.__getitem__,
        {codes[n][e].data_ptr(): e for n in ("gate_and_up_projs", "down_projs") for e in range(kept.E)},
    )

    def asking(held: Codes, e: int) -> Tensor:
        mine = held.codes[e]
        while torch._C._functorch.is_functorch_wrapped_tensor(mine):
            mine = torch._C._functorch.get_unwrapped(mine)
        asked.append(told[mine.data_ptr()])
        return seen(held, e)

    monkeypatch.setattr(Codes, "__getitem__", asking)
    x.requires_grad_()
    saved: list[int] = []
    pack = lambda t: saved.append(t.nbytes * t.is_floating_point() * (t.itemsize > 1)) or t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fmoe.experts(codes, x, routing, config, backend=backend)
    forward, asked[:] = sorted(asked), []
    assert forward == [0, 0, 2, 2]
    y.square().sum().backward()
    assert set(asked) == {0, 2} and 4 <= len(asked) <= 8
    rows = 4 * 12 * max(config.dim, 2 * config.moe_inter_dim)
    assert max(saved) <= max(rows, max(codes[n].nbytes for n in codes if "_scale" in n))  # nothing decoded is kept


@every_format
def test_what_is_decoded_takes_its_scales_along(fmt: str) -> None:
    """`fmoe.load` leaves them beside the weights, so that the bytes come back."""
    codes, decoded, config = layer(fmt)
    scales = {n: t for n, t in codes.items() if n not in decoded}
    assert scales
    equal(results(decoded | scales, *tokens(config), config), results(decoded, *tokens(config), config))


@every_backend
@few_formats
def test_through_the_whole_block(fmt: str, backend: Any) -> None:
    codes, decoded, config = layer(fmt)
    sizes = dict(n_routed_experts=kept.E, n_activated_experts=2, dim=config.dim, moe_inter_dim=config.moe_inter_dim)
    config = MoEConfig(**sizes, expert_activation=config.expert_activation, expert_bias=config.expert_bias)
    gate = {"gate.weight": torch.randn(3, config.dim, generator=torch.Generator().manual_seed(3))}
    x, _ = tokens(config)
    run = lambda p, b: fmoe.moe(gate | {f"experts.{n}": t for n, t in p.items()}, x, config, backend=b)
    assert torch.equal(run(codes, backend), run(decoded, "loop" if backend is mine else backend))


SHARED = [("fp8 blocks", False), ("mxfp4 packed", False), ("int4 pack", False), ("fp8 side tensor", False)]


@pytest.mark.parametrize(("fmt", "compile"), [*SHARED, pytest.param("int4 pack", True, marks=pytest.mark.slow)])
def test_shared_experts_in_codes(fmt: str, compile: bool) -> None:
    """A block of DeepSeek-V3's kind, all of its matrices in codes."""
    codes, decoded, config = layer("fp8 blocks")
    config = replace(config, n_shared_experts=1, shared_expert_inter_dim=config.moe_inter_dim, n_activated_experts=2)
    f, g = FORMATS_OF[fmt], torch.Generator().manual_seed(4)
    held = {"gate.weight": torch.randn(3, config.dim, generator=g)}
    if config.force_e_score_correction_bias:
        held["gate.e_score_correction_bias"] = torch.zeros(3)
    shared, said = {}, {}
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"shared_experts.{part}.weight"
        q, s = f.encode(torch.randn(128, 128, generator=g) / 11)
        shared |= {name: q, name + f.beside: s}
        said[name] = f.decode(q, s, torch.float32)
    of = lambda experts: held | {f"experts.{n}": t for n, t in experts.items()}
    x = tokens(config)[0].requires_grad_()
    run = lambda p, x: fmoe.moe(p, x, config, backend="loop")
    once = torch.compile(run, fullgraph=True, backend="aot_eager") if compile else run
    found, wanted = once(of(codes) | shared, x), run(of(decoded) | said, x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, wanted)))
    with pytest.raises(ValueError, match="'shared_experts.up_proj.weight' is .*, expected it decoded"):
        fmoe.moe({n: t for n, t in (of(codes) | shared).items() if "up_proj.weight_" not in n}, x, config)
