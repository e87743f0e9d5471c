"""What render.py shows: a row of SECTIONS for each file of results, with its caption, columns and what is drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """columns: title -> value of a row. bar: (title of the value, its label, a function that names its panel)."""

    file: str
    caption: str
    columns: dict[str, Callable[[Row], Any]]
    rows: Callable[[Any], list[Row]] = list
    bar: tuple[str, str, Callable[[Row], str]] | None = None


_CONVERT: dict[str, Callable[[Row], Any]] = {
    "checkpoint": lambda r: f"{r['family']}, {r['bytes'] / 1e9:.1f} GB",
    "what": lambda r: r["what"],
    "seconds": lambda r: r.get("seconds", r.get("error", "-")),
    "times cp": lambda r: r.get("times cp", "-"),
    "memory MB": lambda r: f"{r['memory'] / 1e6:.0f}" if "memory" in r else "-",
    "read GB": lambda r: f"{r['read'] / 1e9:.2f}" if "read" in r else "-",
    "rounds": lambda r: r.get("rounds", "-"),
}
_PANEL = lambda r: f"{r['family']}, {r['bytes'] / 1e9:.1f} GB"
SECTIONS = (
    Section(
        "experts.json",
        "Experts on a CPU: time of fmoe, and of its products alone, over the best of Transformers' own.",
        {name: (lambda r, name=name: r[name]) for name in ("T", "E", "K", "I", "dtype", "order")}
        | {
            "forward": lambda r: r["forward"],
            "products": lambda r: r["forward_products"],
            "against": lambda r: r["forward_best"],
            "forward + backward": lambda r: r["both"],
            "products ": lambda r: r["both_products"],
            "against ": lambda r: r["both_best"],
        },
    ),
    Section(
        "experts_model.json",
        'A tiny Qwen3-MoE (256 wide, 32 experts, 4 a token, fp32, one thread): time of experts_implementation="fmoe"'
        " over that of grouped_mm.",
        {name: (lambda r, name=name: r[name]) for name in ("model", "what", "ratio")},
    ),
    Section(
        "experts_codes.json",
        "Experts in codes, 32 of them, 1024 wide, I = 512, 2 a token, bf16: time over that of decoding all first, and"
        " over that of experts decoded before; MB at most held above the arguments in a step, and MB of weights read.",
        {
            "format": lambda r: r["format"],
            "T": lambda r: r["T"],
            "used": lambda r: r["used"],
            "forward / decoding first": lambda r: r["forward"],
            "both / decoding first": lambda r: r["both"],
            "forward / decoded": lambda r: r["forward_plain"],
            "both / decoded": lambda r: r["both_plain"],
            "memory": lambda r: f"{r['memory_codes'] / 1e6:.1f}",
            "decoding first": lambda r: f"{r['memory_first'] / 1e6:.1f}",
            "read": lambda r: f"{r['read_codes'] / 1e6:.1f}",
            "decoding first ": lambda r: f"{r['read_first'] / 1e6:.1f}",
        },
    ),
    Section(
        "convert.json",
        "Conversion on a disk. `durable` waits for the disk, and is compared with a durable `cp`.",
        _CONVERT,
        bar=("times cp", "what", _PANEL),
    ),
    Section(
        "convert_memory.json",
        "Conversion between files in memory: what the processor costs.",
        _CONVERT,
        bar=("times cp", "what", _PANEL),
    ),
    Section("convert_transposed.json", "Transposition there and back, five rounds.", _CONVERT),
    Section(
        "systems.json",
        "Directories of other systems, Qwen3-30B-A3B with three layers, 3.8 GB between files in memory, nothing else "
        "running: seconds against those of cp in turns; memory and bytes are exact.",
        {
            "what": lambda r: r["what"],
            "seconds": lambda r: r["seconds"],
            "times cp": lambda r: r["times cp"],
            "processor s": lambda r: r["cpu"],
            "memory MB": lambda r: f"{r['memory'] / 1e6:.0f}",
            "read GB": lambda r: f"{r['read'] / 1e9:.2f}",
            "read / needed": lambda r: f"{r['read'] / r['needed']:.3f}",
            "rounds": lambda r: r["rounds"],
        },
    ),
    Section(
        "sync.json",
        "A trainer's weights into an engine's memory, vLLM's names, a layer of Qwen3-30B-A3B: fmoe.sync and two loops.",
        {
            "what": lambda r: r["what"],
            "GB": lambda r: r["bytes"] / 1e9,
            "copies": lambda r: r["copies"],
            "copied / model": lambda r: r["copied"] / r["bytes"],
            "peak MB": lambda r: f"{r['memory'] / 1e6:.0f}",
            "processor s": lambda r: r["cpu"],
            "rounds": lambda r: r["rounds"],
        },
    ),
    Section(
        "codecs.json",
        "Decoding a value format, one core against one core that copies what is decoded.",
        {
            "format": lambda r: r["format"],
            "decode / copy": lambda r: r["ratio"],
            "least": lambda r: r["ratio_least"],
            "most": lambda r: r["ratio_most"],
            "decode GB/s": lambda r: r["decode_gbs"],
            "encode GB/s": lambda r: r.get("encode_gbs", "-"),
        },
        rows=lambda found: [{"format": name} | row for name, row in found["formats"].items()],
        bar=("decode / copy", "format", lambda r: "one core"),
    ),
    Section(
        "aot_codes.json",
        "What compilers make of the product that decodes its tiles, for sm_90: none ever run. Turned: the gradient of"
        " rows.",
        {
            "codes": lambda r: r["kind"] + " turned" * r["turned"],
            "class": lambda r: r["class"],
            "tiles": lambda r: r["tiles"],
            "triton": lambda r: r["triton"],
            "registers": lambda r: r["registers"],
            "spilled bytes": lambda r: r["spills"],
            "shared bytes": lambda r: r["shared"],
            "main loop": lambda r: r["loop"],
        },
    ),
    Section(
        "remote.json",
        "Conversions from a web server on the same two busy cores, and by several processes; all wait for the disk.",
        {
            "what": lambda r: r["what"],
            "MB": lambda r: f"{r['bytes'] / 1e6:.0f}",
            "seconds": lambda r: r["seconds"],
            "times local": lambda r: r["times local"],
            "source alone": lambda r: r.get("source", "-"),
            "not hidden": lambda r: r.get("not hidden", "-"),
            "requests": lambda r: r.get("requests", "-"),
            "bytes / owned": lambda r: f"{r.get('over', r['read'] / r['bytes']):.3f}",
            "memory MB": lambda r: f"{r['memory'] / 1e6:.0f}" if "memory" in r else "-",
            "same files": lambda r: {True: "yes", False: "NO"}.get(r.get("same"), "-"),
        },
    ),
    Section(
        "cached.json",
        "What stays in the page cache, as parts of the files: held, and on the list of pages in use.",
        {
            "what": lambda r: r["what"],
            "MB": lambda r: f"{r['bytes'] / 1e6:.0f}",
            **{n: (lambda r, n=n: r[n]) for n in ("source held", "source active", "target held", "target active")},
        },
    ),
    Section(
        "plan.json",
        "`fmoe plan` of a model of 1 T parameters: processor seconds of whole processes, and bytes a tensor.",
        {
            "parameters": lambda r: f"{r['parameters'] / 1e12:.2f} T",
            "tensors": lambda r: f"{r['tensors']:,}",
            "plan": lambda r: r["plan"],
            "import torch": lambda r: r["import torch"],
            "times": lambda r: r["times"],
            "least": lambda r: r["least"],
            "bytes a tensor": lambda r: f"{r['bytes a tensor']:.0f}",
            "at most": lambda r: f"{r['at most']:.0f}",
            "rounds": lambda r: r["rounds"],
        },
    ),
    Section(
        "aot.json",
        "What compilers make of the large and the odd tiles, and of some swept, for sm_90: instructions of a thread.",
        {
            "kernel": lambda r: r["kernel"] + (" odd" if "odd" in r["variant"] else "" if r["hot"] else " swept"),
            "tiles": lambda r: r["config"],
            "triton": lambda r: r["triton"],
            "commit": lambda r: r.get("was", "now"),
            "registers": lambda r: r["registers"],
            "spilled bytes": lambda r: r["spills"],
            "shared bytes": lambda r: r["shared"],
            "main loop": lambda r: r["loop"],
            "epilogue": lambda r: r["epilogue"],
            "exponentials": lambda r: r["exponentials"],
            "programs at once": lambda r: r["ctas"],
        },
    ),
)
