"""Commands that only look: inspect, plan, families, systems."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fmoe.cli.app import DIRECTORY, Experts, From, Given, Json, Own, Source, Trust, app, of_source, own, ranges
from fmoe.cli.progress import waiting
from fmoe.cli.show import dashboard, grid, rows

STATS = ["min", "max", "mean", "nan", "inf"]


@app.command("inspect")
def inspect_(
    path: Annotated[str, typer.Argument(metavar="DIR", help=f"{DIRECTORY}; or one safetensors file")],
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a tensor's name, or a glob: tensors")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="of NAME: min, max, mean, NaN and Inf; reads them")] = False,
    from_: From = None,
    config: Given = None,
    trust_pickle: Trust = False,
    adapter: Own = None,
    rules: Annotated[bool, typer.Option("--rules", help="also the rules that match nothing here")] = False,
    as_json: Json = False,
) -> None:
    """Family, layout, experts, sizes and problems; no tensor is read. Exit code 1 if there are problems.

    fmoe inspect DIR                              the whole checkpoint
    fmoe inspect DIR '*.experts.0.*' --stats      these tensors: where they lie, and their numbers
    fmoe inspect model-00001-of-00002.safetensors what one file holds
    """
    with waiting("reading headers", as_json):
        from fmoe import checkpoint
        from fmoe.checkpoint.look.stats import tensors

        listed = name is not None or (path.endswith(".safetensors") and Path(path).is_file())
        lines = list(tensors(path, name or "*", stats=stats)) if listed else []
        found = {} if listed else checkpoint.inspect(path, **of_source(from_, config, trust_pickle), **own(adapter))
    if as_json:
        print(json.dumps({"path": str(path), "tensors": lines} if listed else found))
    elif listed:
        titles = list(lines[0])
        grid(titles, [[_cell(line[title]) for title in titles] for line in lines], ["offset", "bytes", *STATS])
    else:
        dashboard(found, rules)
    raise typer.Exit(1 if found.get("problems") else 0)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


@app.command()
def plan(
    path: Source,
    experts: Experts = None,
    adapter: Own = None,
    from_: From = None,
    config: Given = None,
    trust_pickle: Trust = False,
    as_json: Json = False,
) -> None:
    """What a conversion would copy where, proved bijective; no tensor is read.

    fmoe plan DIR --experts 0:16
    """
    with waiting("planning", as_json):
        from fmoe import checkpoint
        from fmoe.checkpoint.sides import forth
        from fmoe.checkpoint.which import open_source

        source = open_source(path, config, adapter is not None, trust_pickle, from_)
        made = checkpoint.plan_from(source, forth(source, from_, **own(adapter))[1], **ranges(experts))
    if as_json:
        targets = {
            n: {"shape": list(s.shape), "dtype": str(s.dtype).removeprefix("torch.")} for n, s in made.targets.items()
        }
        found = {"sources": len(made.sources), "bytes": made.nbytes, "bijective": True, "targets": targets}
        print(json.dumps(found | ({"notes": list(made.notes)} if made.notes else {})))
    else:
        print(made)


@app.command()
def families(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="one model type, with its rules")] = None,
    as_json: Json = False,
) -> None:
    """Every known model type: where its experts lie, what it reads quantised, what was verified against what.

    fmoe families
    fmoe families qwen3_moe    its rules, layouts, config fields and sources
    """
    from fmoe.families import FAMILIES, VERIFIED, family

    kinds = {name: family(name)} if name else dict(sorted(FAMILIES.items()))
    facts: dict[str, dict[str, Any]] = {
        model_type: {
            "layout": kind.layout,
            "quantised": kind.quantised,
            "verified": VERIFIED[kind.verified],
            "source": kind.source,
        }
        for model_type, kind in kinds.items()
    }
    if name:
        choices = {c: list(o) for stage in kinds[name].rules.stages for c, o in stage.choices().items()}
        more = {"model_types": list(kinds[name].model_types), "choices": choices, "fields": dict(kinds[name].fields)}
        facts[name] |= more | {"rules": str(kinds[name].rules).split("\n")}
    if as_json:
        print(json.dumps(facts))
    elif name:
        rows([(label, _told(value)) for label, values in facts[name].items() for value in _each(values)])
    else:
        titles = ["model type", "gate and up on disk", "quantised", "verified"]
        grid(titles, [[n, f["layout"], f["quantised"], f["verified"]] for n, f in facts.items()])


@app.command("systems")
def systems_(as_json: Json = False) -> None:
    """Every other system whose names are known: its families, its container, what was verified against what."""
    from fmoe.families import FAMILIES
    from fmoe.systems import SYSTEMS

    facts: dict[str, dict[str, Any]] = {
        name: {
            "families": sorted(FAMILIES if system.native else system.tables),
            "choices": {n: list(options) for n, options in system.choices.items()},
            "container": system.container,
            "verified": system.verified,
            "source": system.source,
        }
        for name, system in SYSTEMS.items()
    }
    if as_json:
        print(json.dumps(facts))
        return
    for name, told in facts.items():
        known = "every family" if SYSTEMS[name].native else ", ".join(told["families"])
        choices = "".join(f"; {n}={' | '.join(map(str, o)) or 'N'}" for n, o in told["choices"].items())
        print(f"{name:<18}{known}; {told['container']}{choices}")
        print(f"{'':<18}verified: {told['verified']}; {told['source']}")


def _each(values: Any) -> list[Any]:
    return values if isinstance(values, list) else list(values.items()) if isinstance(values, dict) else [values]


def _told(value: Any) -> str:
    return (
        f"{value[0]}: {' | '.join(value[1]) if isinstance(value[1], list) else value[1]}"
        if isinstance(value, tuple)
        else str(value)
    )
