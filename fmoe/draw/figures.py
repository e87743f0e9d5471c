"""The figures: layouts side by side, bytes by layer and kind, expert load."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmoe.draw.files import pyplot
from fmoe.draw.panels import Drawn, Panel, panels
from fmoe.layout.adapter import Adapter
from fmoe.types import AdapterError, brief, human

SHOWN = 6  # experts of a stack that are drawn


def layout(adapter: Adapter, *, ranks: int = 1, e: range | None = None) -> Any:
    """A figure: the expert tensors of each layout on disk and of the native one, with axes, shapes and strides.

    adapter: a family's, with a config. ranks: experts are coloured by the rank of so many that holds them; e: or by
    whether they lie in this range. Raises AdapterError without a config.

    >>> import fmoe, fmoe.docs
    >>> len(layout(fmoe.adapter(fmoe.docs.example()), ranks=2).axes) > 0
    True
    """
    found = panels(adapter)
    _check(ranks)
    plot = pyplot()
    tall = max(len(panel.tensors) for panel in found)
    figure, axes = plot.subplots(1, len(found), figsize=(4.6 * len(found), 1.1 + 1.9 * tall), squeeze=False)
    n_experts = adapter.moe_config.n_routed_experts
    for axis, panel in zip(axes[0], found, strict=True):
        _panel(axis, panel, tall, n_experts, ranks, e)
    _legend(figure, ranks, e)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def checkpoint(path: Path | str, *, ranks: int = 1, e: range | None = None) -> Any:
    """A figure of a directory: its layouts above, below them a bar of bytes for each layer, by kind. Headers only.

    >>> import fmoe.docs
    >>> len(checkpoint(fmoe.docs.example()).axes) > 1
    True
    """
    from fmoe.checkpoint import adapter_of
    from fmoe.checkpoint.look.sizes import kind_of, layer_of
    from fmoe.checkpoint.which import open_ours

    _check(ranks)
    source = open_ours(path, "draw")
    adapter = adapter_of(source)
    found, plot = panels(adapter), pyplot()
    tall = max(len(panel.tensors) for panel in found)
    figure = plot.figure(figsize=(4.6 * len(found), 4.6 + 1.9 * tall))
    grid = figure.add_gridspec(2, len(found), height_ratios=[1.1 + 1.9 * tall, 3])
    for i, panel in enumerate(found):
        axis = figure.add_subplot(grid[0, i])
        _panel(axis, panel, tall, adapter.moe_config.n_routed_experts, ranks, e)
    sizes: dict[str, dict[int, int]] = {}
    for name, spec in source.specs.items():
        if (layer := layer_of(name)) is not None:
            kind = sizes.setdefault(kind_of(name, {name} if ".experts." in name else ()), {})
            kind[layer] = kind.get(layer, 0) + spec.nbytes
    _bars(figure.add_subplot(grid[1, :]), sizes, f"{path}: {human(source.nbytes)}")
    _legend(figure, ranks, e)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def load(counts: "Tensor | Sequence[Tensor] | Mapping[str, Tensor]") -> Any:
    """A heat map: counts [layers, E] of tokens that each expert was given, relative to the mean of its layer.

    counts: a tensor [layers, E] or [E], a list of [E], or layer names -> [E], as `fmoe.routing.count` gives them.

    >>> import torch
    >>> figure = load(torch.tensor([[3, 1], [2, 2]]))
    >>> figure.axes[0].images[0].get_array().shape
    (2, 2)
    """
    names = list(counts) if isinstance(counts, Mapping) else []
    stack = list(counts.values()) if isinstance(counts, Mapping) else counts
    table = _table(stack)
    relative = table / table.mean(1, keepdim=True).clamp(min=1e-12)
    plot = pyplot()
    figure, axis = plot.subplots(figsize=(8, 1.4 + 0.28 * len(table)))
    shown = axis.imshow(relative.numpy(), aspect="auto", cmap="viridis", vmin=0)
    axis.set_xlabel("expert")
    axis.set_ylabel("" if names else "layer")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)
    if names:
        axis.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(shown, ax=axis, label="tokens / mean of the layer")
    axis.set_title(f"expert load: busiest {relative.max():.1f} times the mean, {int((table == 0).sum())} idle")
    figure.tight_layout()
    return figure


def _table(stack: Any) -> Tensor:
    """[layers, E] fp64 of what `load` takes."""
    at_once = isinstance(stack, Tensor) and stack.ndim == 2
    rows = [stack] if isinstance(stack, Tensor) else [torch.as_tensor(c) for c in stack]
    for t in rows:
        if t.is_meta or t.is_complex() or t.layout != torch.strided or t.ndim != 1 + at_once:
            found = "a nested tensor" if t.is_nested else f"{t.dtype} {list(t.shape)} on {t.device}"
            raise AdapterError(f"draw.load: counts has {found}, expected real numbers with data, [E] for each layer")
    if not rows or not rows[0].numel() or len({t.shape for t in rows}) > 1:
        raise AdapterError("draw.load: counts is empty, or of several lengths, expected [E] for each layer")
    return torch.cat([t.double().reshape(-1, t.shape[-1]).cpu() for t in rows])


def _check(ranks: int) -> None:
    if ranks < 1:
        raise AdapterError(f"draw: ranks is {brief(ranks)}, expected a positive int")


def _panel(axis: Any, panel: Panel, tall: int, n_experts: int, ranks: int, e: range | None) -> None:
    axis.set_title(panel.title, fontweight="bold")
    axis.set_xlim(0, 10)
    axis.set_ylim(0, 2 * tall)
    axis.axis("off")
    for i, drawn in enumerate(panel.tensors):
        _tensor(axis, drawn, 2 * (tall - i) - 1.1, n_experts, ranks, e)


def _tensor(axis: Any, drawn: Drawn, at: float, n_experts: int, ranks: int, e: range | None) -> None:
    """Rectangles for the first experts, one behind the other, or side by side where each is a tensor of its own."""
    stacked = drawn.per_expert or (bool(drawn.axes) and drawn.axes[0] == "e")
    shown = min(n_experts, SHOWN) if stacked else 1
    for k in range(shown):
        step = (0.95 if drawn.per_expert else 0.28) * k
        expert = k * n_experts // shown
        axis.add_patch(
            pyplot().Rectangle((0.3 + step, at - 0.45 + (0 if drawn.per_expert else 0.06 * k)), 0.8, 0.75,
                               facecolor=_colour(expert, n_experts, ranks, e), edgecolor="black", linewidth=0.7)
        )  # fmt: skip
    many = f" × {drawn.many:,}" if drawn.many > 1 else ""
    axis.text(0.3, at + 0.62, _short(drawn.name) + many, fontsize=7, family="monospace")
    text = f"[{' '.join(drawn.axes)}] = {list(drawn.shape)}\nstrides {list(drawn.strides)}"
    axis.text(6.2, at - 0.2, text, fontsize=7, va="center")


def _short(name: str) -> str:
    return name if len(name) <= 58 else "…" + name[-57:]


def _colour(expert: int, n_experts: int, ranks: int, e: range | None) -> Any:
    if e is not None:
        return "tab:orange" if expert in e else "lightgrey"
    return pyplot().get_cmap("tab10")(expert * ranks // n_experts % 10)


def _legend(figure: Any, ranks: int, e: range | None) -> None:
    """What the colours of experts say: the rank that holds them, or the range that was asked for."""
    said = {f"rank {r}": r * 1.0 for r in range(min(ranks, 10))} if ranks > 1 and e is None else {}
    marks = [pyplot().Rectangle((0, 0), 1, 1, facecolor=_colour(int(r), ranks, ranks, None)) for r in said.values()]
    names = [*said, *(["…"] if ranks > 10 else [])]
    if e is not None:
        marks, names = (
            [pyplot().Rectangle((0, 0), 1, 1, facecolor="tab:orange")],
            [f"experts {e.start} to {e.stop - 1}"],
        )
    if marks:
        figure.legend(marks, names, loc="upper center", ncols=11, fontsize=7, title="experts of which some are drawn")


def _bars(axis: Any, sizes: Mapping[str, Mapping[int, int]], title: str) -> None:
    layers = sorted({layer for kind in sizes.values() for layer in kind})
    bottom, (unit, size) = [0.0] * len(layers), _unit(sizes)
    for kind, mine in sorted(sizes.items(), key=lambda item: -sum(item[1].values())):
        heights = [mine.get(layer, 0) / size for layer in layers]
        axis.bar(layers, heights, bottom=bottom, label=kind, width=0.9)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axis.set_xlabel("layer")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel(unit)
    axis.set_title(title, fontsize=9)
    if layers:
        axis.legend(fontsize=7)


def _unit(sizes: Mapping[str, Mapping[int, int]]) -> tuple[str, float]:
    most = max((size for mine in sizes.values() for size in mine.values()), default=0)
    return next(((name, size) for name, size in (("GB", 1e9), ("MB", 1e6)) if most >= size), ("kB", 1e3))
