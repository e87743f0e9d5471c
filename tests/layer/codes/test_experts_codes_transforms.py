"""Experts in codes under the transforms of PyTorch, as plain ones; and the memory that they take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kept import layer, lora, results, tokens
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fmoe
from fmoe.backends import BACKENDS, coded
from fmoe.backends.loop import loop
from fmoe.codecs.formats import FORMATS
from fmoe.types import MoEConfig, Routing

FEW = ["fp8 side one", "mxfp4 .scale", "nvfp4", "int4 pack"]
few_formats = pytest.mark.parametrize("fmt", FEW)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
either = pytest.mark.parametrize("recompute", [False, True])


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()  # the lambdas of all rows are one piece of code


def mine(params: Any, rows: Any, config: MoEConfig) -> Tensor:
    return loop(params, rows, config)


def both(fmt: str, backend: Any, **how: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Any, ...]]:
    """f(x, weights, lora) on codes, and on what they say; and arguments."""
    codes, decoded, config = layer(fmt)
    x, routing = tokens(config)
    of = lambda p: (
        lambda x, w, tuned: fmoe.experts(p | tuned, x, routing._replace(weights=w), config, backend=backend, **how)
    )
    return of(codes), of(decoded), (x, routing.weights, lora(config))


def value(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: f(*args).square().mean()


def same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert b.any() and a.dtype == b.dtype and (a - b).norm() <= tolerance * b.norm()


@few_formats
@every_backend
@either
def test_func_grad_and_vmap(fmt: str, backend: str, recompute: bool) -> None:
    f, plain, args = both(fmt, backend, recompute=recompute)
    grads = torch.func.grad(value(plain), (0, 1, 2))(*args)
    same(torch.func.grad(value(f), (0, 1, 2))(*args), grads)
    many = torch.stack([args[0], -args[0], args[0].flip(0)]), *args[1:]
    over = lambda g: torch.vmap(g, (0, None, None))
    same(over(f)(*many), over(plain)(*many))
    same(over(torch.func.grad(value(f), (0, 1, 2)))(*many), over(torch.func.grad(value(plain), (0, 1, 2)))(*many))


slow = lambda *row: pytest.param(*row, marks=pytest.mark.slow)
COMPILED = [slow(fmt, b, again) for fmt in FEW for b in BACKENDS for again in (True, False) if fmt != "nvfp4" or again]


@pytest.mark.parametrize(("fmt", "backend", "recompute"), [("nvfp4", "loop", False), *COMPILED])
def test_compiled_in_one_graph(fmt: str, backend: str, recompute: bool) -> None:
    f, plain, args = both(fmt, backend, recompute=recompute)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    same(compiled(*args), plain(*args), 1e-6)
    compiled = torch.compile(torch.func.grad(value(f), (0, 1, 2)), fullgraph=True, backend="aot_eager")
    same(compiled(*args), torch.func.grad(value(plain), (0, 1, 2))(*args), 1e-6)


@every_backend
def test_vmap_over_routings_and_over_codes(backend: str) -> None:
    codes, decoded, config = layer("nvfp4")
    x, routing = tokens(config)
    ids = torch.stack([routing.indices, (routing.indices + 1) % 3])
    run = lambda p, i: fmoe.experts(p, x, routing._replace(indices=i), config, backend=backend)
    same(torch.vmap(lambda i: run(codes, i))(ids), torch.vmap(lambda i: run(decoded, i))(ids))
    stacked = {n: torch.stack([t, t.flip(0)]) for n, t in codes.items()}
    expected = torch.stack([run({n: t[k] for n, t in stacked.items()}, ids[k]) for k in (0, 1)])
    same(torch.vmap(run)(stacked, ids), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, on import
@every_backend
def test_derivatives_of_derivatives_and_forward_mode(backend: str) -> None:
    f, plain, args = both("int4 pack", backend)
    second = lambda g: torch.func.grad(lambda x: torch.func.grad(value(g))(x, *args[1:]).square().sum())(args[0])
    same(second(f), second(plain), 1e-6)
    jvp = lambda g: torch.func.jvp(g, args, args)[1]
    same(jvp(f), jvp(plain), 1e-6)


@every_backend
def test_checkpointing_and_autocast(backend: str) -> None:
    f, plain, args = both("mxfp4 .scale", backend)

    def grads(g: Callable[..., Tensor]) -> Any:
        x, w = (t.clone().requires_grad_() for t in args[:2])
        return torch.autograd.grad(g(x, w, args[2]).square().sum(), (x, w))

    same(grads(lambda *a: checkpoint(f, *a, use_reentrant=False)), grads(plain))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(f(*args), plain(*args))  # exact in bf16


@pytest.mark.slow
@every_backend
def test_compiled_with_dynamic_numbers_of_tokens(backend: str) -> None:
    codes, decoded, config = layer("mxfp4 .scale")
    x, routing = tokens(config)
    run = lambda p, x, w, i: fmoe.experts(p, x, Routing(i, w), config, backend=backend)
    dynamic = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (6, 4):
        part = x[:n], routing.weights[:n], routing.indices[:n]
        same(dynamic(codes, *part), run(decoded, *part), 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, on import
@few_formats
def test_compiled_by_inductor(fmt: str) -> None:
    f, plain, args = both(fmt, "loop")
    same(torch.compile(f, fullgraph=True)(*args), plain(*args), 1e-6)


@few_formats
def test_on_meta_and_fake_shapes_come_out(fmt: str) -> None:
    codes, _, config = layer(fmt)
    x, routing = tokens(config)
    for backend in (*BACKENDS, mine):
        run = lambda p, x, r: fmoe.experts(p, x, r, config, backend=backend)  # noqa: B023
        y = run(*(torch.utils._pytree.tree_map(lambda t: t.to("meta"), a) for a in (codes, x, routing)))
        assert y.is_meta and y.shape == x.shape
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = (torch.utils._pytree.tree_map(mode.from_tensor, a) for a in (codes, x, routing))
            assert run(*fake).shape == x.shape


def test_operators_pass_opcheck() -> None:
    import fmoe.backends.coded  # noqa: F401

    codes, _, config = layer("int4 pack")  # opcheck compares arguments with allclose, which knows no e4m3
    name, suffix = "gate_and_up_projs", "_scale_int4_pack"
    held = codes[name], codes[name + suffix], None
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    for turned, width in ((False, config.dim), (True, 2 * config.moe_inter_dim)):
        x = torch.randn(6, width)
        torch.library.opcheck(
            torch.ops.fmoe.gmm_codes.default, (x, *held, offsets, name, suffix, False, turned, "loop")
        )


def test_a_backend_that_takes_no_codes_is_transformed_as_far_as_the_host_can_count() -> None:
    f, plain, args = both("nvfp4", mine)
    same(torch.func.grad(value(f), (0, 1, 2))(*args), torch.func.grad(value(plain), (0, 1, 2))(*args))
    many = torch.stack([args[0], -args[0]])
    same(torch.vmap(lambda x: f(x, *args[1:]))(many), torch.vmap(lambda x: plain(x, *args[1:]))(many))
    codes, _, config = layer("nvfp4")
    x, routing = tokens(config)
    run = lambda i: fmoe.experts(codes, x, routing._replace(indices=i), config, backend=mine)
    with pytest.raises(ValueError, match="backend 'mine': parameters are codes, expected a routing that the host can"):
        torch.vmap(run)(torch.stack([routing.indices] * 2))


@pytest.mark.slow
def test_a_backend_that_takes_no_codes_breaks_the_graph_of_a_compiler() -> None:
    f, plain, args = both("nvfp4", mine)
    same(torch.compile(f, backend="aot_eager")(*args), plain(*args))


class Peak(TorchDispatchMode):
    """The most bytes that storages made within hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (at := t.untyped_storage()._cdata) not in known:
                self.held[at] = StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()
        self.held = {at: (ref, n) for at, (ref, n) in self.held.items() if not ref.expired()}
        self.most = max(self.most, sum(n for _, n in self.held.values()))
        return out


@pytest.mark.parametrize("fmt", FEW)
@every_backend
def test_memory_is_that_of_one_decoded_expert(fmt: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, all experts used: bytes held at once, beside arguments, however many they are."""
    D, I = 512, 512
    one = 4 * D * 2 * I
    f = FORMATS[fmt]
    multiply = coded._multiply

    def peak(E: int) -> int:
        g = torch.Generator().manual_seed(0)
        config = MoEConfig(n_routed_experts=E, n_activated_experts=1, dim=D, moe_inter_dim=I)
        params = {}
        for name, (k, m) in {"gate_and_up_projs": (D, 2 * I), "down_projs": (I, D)}.items():
            codes = torch.randint(0, 100, (E, m, k * f.stored.itemsize // f.packed), generator=g, dtype=torch.uint8)
            grid = f.scale_shape((m, k))
            scale = (
                torch.full((E, *grid), 1, dtype=torch.uint8).view(f.scales[0])
                if f.scales[0].itemsize == 1
                else (torch.ones((E, *grid), dtype=f.scales[0]))
            )
            params |= {name: codes.view(f.stored).mT, name + f.beside: scale.mT}
            params |= {f"{name}{f.beside}_second": torch.ones(E, 1, 1)} if f.second else {}
        x, most = torch.randn(E, D, generator=g), [0]

        def watched(*args: Any) -> Tensor:
            with Peak() as seen:
                out = multiply(*args)
            most[0] = max(most[0], seen.most)
            return out

        monkeypatch.setattr(coded, "_multiply", watched)
        routing = Routing(torch.arange(E)[:, None], torch.ones(E, 1))
        results(params, x, routing, config, backend=backend)
        return most[0] - 4 * E * 2 * I  # less the rows that come out

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    few, many = peak(2), peak(16)
    torch.set_num_threads(threads)
    assert one <= few and abs(many - few) < one / 8
    assert many < 2.5 * one, many / one  # of which what decodes holds a part, of some 2^17 numbers at a time
