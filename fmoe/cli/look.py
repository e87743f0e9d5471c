"""Commands that only look: inspect, plan, families."""

import json
from typing import Any

import typer

from fmoe.cli.app import Experts, Json, Source, app, count, ranges
from fmoe.cli.progress import waiting


@app.command("inspect")
def inspect_(path: Source, as_json: Json = False) -> None:
    """Family, layout, experts, dtypes, sizes and problems; no tensor is read. Exit code 1 if there are problems."""
    with waiting("reading headers", as_json):
        from fmoe import checkpoint

        found = checkpoint.inspect(path)
    if as_json:
        print(json.dumps(found))
    else:
        _show(found)
    raise typer.Exit(1 if found["problems"] else 0)


@app.command()
def plan(path: Source, experts: Experts = None, as_json: Json = False) -> None:
    """What a conversion would copy where, proved bijective; no tensor is read.

    fmoe plan DIR --experts 0:16
    """
    with waiting("planning", as_json):
        from fmoe import checkpoint

        source = checkpoint.open_checkpoint(path)
        adapter = checkpoint.adapter_of(source)
        made = checkpoint.plan_from(source, adapter.inverse if source.native else adapter, **ranges(experts))
    if as_json:
        targets = {
            n: {"shape": list(s.shape), "dtype": str(s.dtype).removeprefix("torch.")} for n, s in made.targets.items()
        }
        print(json.dumps({"sources": len(made.sources), "bytes": made.nbytes, "bijective": True, "targets": targets}))
    else:
        print(made)


@app.command()
def families(as_json: Json = False) -> None:
    """Every known model type: where its experts lie, what it reads quantised, what was verified against what."""
    from fmoe.families import FAMILIES, VERIFIED

    facts = {
        name: {
            "layout": kind.layout,
            "quantised": kind.quantised,
            "verified": VERIFIED[kind.verified],
            "source": kind.source,
        }
        for name, kind in sorted(FAMILIES.items())
    }
    if as_json:
        print(json.dumps(facts))
        return
    for name, told in facts.items():
        print(f"{name:<24}{told['layout']}\n{'':<24}quantised: {told['quantised']}; verified: {told['verified']}")


def _show(found: dict[str, Any]) -> None:
    from fmoe.types import human

    experts, config, size = found["experts"], found["moe_config"], human(found["bytes"])
    dtypes = ", ".join(f"{n} {human(nbytes)}" for n, nbytes in found["dtypes"].items())
    layout = "".join(f", {name}={label}" for name, label in found["layout"].items())
    rows = [("family", f"{found['model_type']} ({found['format']}{layout})")]
    rows += [("size", f"{count(found['tensors'], 'tensor')} in {count(found['files'], 'file')}, {size}: {dtypes}")]
    if experts:
        shapes = ", ".join(f"{n} {shape}" for n, shape in experts["shapes"].items())
        rows += [("experts", f"{count(experts['layers'], 'layer')}, {human(experts['bytes'])}, natively {shapes}")]
    if config:
        facts = f"E {config['n_routed_experts']}, K {config['n_activated_experts']}, {config['expert_activation']}"
        rows += [("routing", f"{facts}, {config['score_func']}")]
    rows += [("rules", line) for line in found["rules"]]
    rows += [("note", text) for text in found["notes"]] + [("problem", text) for text in found["problems"]]
    for before, (label, text) in zip([("", ""), *rows], rows, strict=False):
        print(f"{label if label != before[0] else '':<9}{text}")
