"""What is printed for people: tables that fold into the terminal's width, and plain lines into a pipe."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmoe.cli.app import count


def console() -> Console:
    """Standard output. Nothing wraps in a pipe or a file; colours go by NO_COLOR and the terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=10_000, color_system=None)


def rows(pairs: Iterable[tuple[str, str]], styles: Mapping[str, str] | None = None) -> None:
    """`label    text`, a line each. A label is printed once for its run of lines; long texts fold below themselves."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    before = ""
    for label, text in pairs:
        table.add_row("" if label == before else label, Text(text, style=(styles or {}).get(label, "")))
        before = label
    _print(table)


def grid(titles: Sequence[str], lines: Iterable[Sequence[Any]], numbers: Sequence[str] = ()) -> None:
    """A table under titles; columns named in `numbers` are set to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="right" if title in numbers else "left", overflow="fold")
    for line in lines:
        table.add_row(*(Text(str(cell)) for cell in line))
    _print(table)


def _print(table: Table) -> None:
    out = console()
    with out.capture() as printed:
        out.print(table)
    for line in printed.get().splitlines():
        print(line.rstrip())


def dashboard(found: Mapping[str, Any], every_rule: bool) -> None:
    """What `fmoe.inspect` found, as a page."""
    from fmoe.checkpoint.look.sizes import short
    from fmoe.types import human

    layout = "".join(f", {name}={label}" for name, label in found["layout"].items())
    dtypes = ", ".join(f"{n} {human(nbytes)}" for n, nbytes in found["dtypes"].items())
    size = f"{count(found['tensors'], 'tensor')} in {count(found['files'], 'file')}, {human(found['bytes'])}"
    told = [("family", f"{found['model_type']} ({found['format']}{layout})"), ("size", f"{size}: {dtypes}")]
    if total := found.get("parameters"):
        active = f", {short(total['active'])} active a token" if total["active"] is not None else ""
        told.append(("parameters", f"{short(total['total'])}{active}"))
    if experts := found["experts"]:
        shapes = ", ".join(f"{n} {shape}" for n, shape in experts["shapes"].items())
        told.append(("experts", f"{count(experts['layers'], 'layer')}, {human(experts['bytes'])}, natively {shapes}"))
    if config := found["moe_config"]:
        facts = f"E {config['n_routed_experts']}, K {config['n_activated_experts']}, {config['expert_activation']}"
        shared = f", {count(config['n_shared_experts'], 'shared expert')}" if config["n_shared_experts"] else ""
        told.append(("routing", f"{facts}, {config['score_func']}{shared}"))
    told.append(("quantised", found.get("quantised") or "no"))
    rows(told)
    if kinds := found.get("kinds"):
        print()
        lines = [(kind, short(s["parameters"]), human(s["bytes"]), _share(s, found)) for kind, s in kinds.items()]
        grid(["kind", "parameters", "bytes", "share"], lines, ["parameters", "bytes"])
        layers = found["layers"]
        folded = ", ".join(f"{f['layers']}: {human(f['bytes'])}" + " each" * (f["count"] > 1) for f in layers[:8])
        more = f" and {len(layers) - 8} more sizes" if len(layers) > 8 else ""
        print()
        rows([("layers", folded + more)] * bool(layers) + [("files", ", ".join(found.get("carried", [])) or "none")])
    used = found["rules"] if every_rule else found.get("rules_used", found["rules"])
    hidden = len(found["rules"]) - len(used)
    told = [("rules", line) for line in used]
    told += [("rules", f"({count(hidden, 'rule')} that match nothing here: --rules)")] if hidden > 0 else []
    told += [("note", text) for text in found["notes"]] + [("problem", text) for text in found["problems"]]
    rows(told, {"problem": "red", "note": "yellow"})


def _share(sizes: Mapping[str, int], found: Mapping[str, Any]) -> str:
    part = sizes["bytes"] / max(1, found["bytes"])
    return f"{'█' * round(20 * part):<20} {100 * part:.1f} %"
