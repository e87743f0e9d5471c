"""A safetensors header with something wrong in its meaning; and the values, dtypes and names that are wrong."""

import json
from random import Random
from typing import Any

Pairs = list[tuple[str, Any]]

# what a value may turn into
NUMBERS = [0, 1, 2, 3, 7, 8, -1, -8, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**64 + 8, 10**30]
NUMBERS += [10**400]
VALUES = [*NUMBERS, 2.0, 1e400, -0.0, 0.5, True, False, None, "", "8", [], [0], {}, {"a": 1}, "x" * 5000, [[[]]]]
DTYPES = "F32 F16 BF16 I16 U16 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ I8 U8 BOOL F64 I64 C64 F4 F6_E2M3 F6_E3M2".split()
DTYPES += ["F33", "f32", "float32", "", "bf16"]
STRINGS = ["", "x", "\n", "\x00", "a\x1b[31mred", "../../x", "/etc/passwd", "a/b", "a\\b", "é", "e\u0301", "\u202egnp"]
STRINGS += ["..", ".", "model.safetensors", "pytorch_model.bin", "\ud800", "__metadata__", "{e}", "[a]", "%s", "\u2028"]
STRINGS += ["x" * 70_000]
NAMES = ["model.layers.0.mlp.experts.{}.gate_proj.weight", "model.layers.{}.mlp.gate.weight", "model.layers.{}.x"]
PLACES = ["00", "01", "-1", "٣", "²", "99", "9" * 30, "1e3", "0x1", " 1", ""]


def name_of(rng: Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(STRINGS)
    return rng.choice(NAMES).format(rng.choice([*PLACES, str(rng.randrange(5))]))


def value_of(rng: Random, old: Any) -> Any:
    if type(old) is int and rng.random() < 0.5:
        return old + rng.choice([-8, -4, -2, -1, 1, 2, 4, 8])
    return rng.choice(VALUES + STRINGS)  # type: ignore[operator]


def entry(rng: Random, pairs: Pairs, data: int) -> None:
    """One thing wrong with the description of one tensor."""
    i = rng.randrange(len(pairs))
    name, old = pairs[i]
    if not _plain(old):
        pairs[i] = (name, value_of(rng, old))
        return
    new = json.loads(json.dumps(old))
    kind = rng.randrange(12)
    if kind == 0:
        new["dtype"] = rng.choice(DTYPES)
    elif kind in (1, 2):
        part = new[rng.choice(["shape", "data_offsets"])]
        at = rng.randrange(len(part) + 1)
        part[at : at + 1] = [value_of(rng, part[at] if at < len(part) else 0)]
    elif kind == 3:
        new["shape"] = rng.choice(
            [[], [0], new["shape"][::-1], [*new["shape"], 1], [1] * 70, [0, *[2**40] * 3], [2**31] * 3]
        )
    elif kind == 4:
        start, stop = new["data_offsets"]
        new["data_offsets"] = rng.choice(
            [[stop, start], [start, start], [start + 4, stop + 4], [start, data], [data, data]]
        )
    elif kind == 5:
        new[rng.choice([*new, "extra"])] = value_of(rng, None)
    elif kind == 6:
        del new[rng.choice([*new])]
    elif kind == 7:
        other = rng.randrange(len(pairs))
        field = rng.choice([*new])
        if isinstance(pairs[other][1], dict) and field in pairs[other][1]:
            new[field], mine = pairs[other][1][field], new[field]
            if rng.random() < 0.7:
                pairs[other] = (pairs[other][0], pairs[other][1] | {field: mine})
    elif kind == 8:
        name = name_of(rng)
    elif kind == 9:
        pairs.append((rng.choice([name, name_of(rng)]), new))
    elif kind == 10:
        pairs.pop(i)
        return
    elif kind == 11:
        other = rng.randrange(len(pairs))
        pairs[i], pairs[other] = (pairs[other][0], old), (name, pairs[other][1])
        return
    pairs[i] = (name, new)


def _plain(entry: Any) -> bool:
    """Has nobody damaged it before?"""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return False
    offsets = entry["data_offsets"]
    return isinstance(entry["shape"], list) and isinstance(offsets, list) and list(map(type, offsets)) == [int, int]


def header(rng: Random, content: bytes) -> bytes:
    """A safetensors file with something wrong in its header's meaning, and perhaps its length made right again."""
    length = int.from_bytes(content[:8], "little")
    try:
        pairs = json.loads(content[8 : 8 + length], object_pairs_hook=lambda p: p)
        pairs = [(n, dict(v) if isinstance(v, list) else v) for n, v in pairs]
    except (ValueError, TypeError, RecursionError):
        return content
    data = content[8 + length :]
    kind = rng.randrange(8)
    if kind == 0:
        said = [
            None,
            {},
            {"a": "b"},
            {"a": 1},
            {"a": None},
            [],
            [["a", "b"]],
            "a",
            1,
            {"a": {"b": "c"}},
            {"\n": "\x00"},
        ]
        pairs = [(n, v) for n, v in pairs if n != "__metadata__"] + [("__metadata__", rng.choice(said))]
    elif kind == 1:
        rng.shuffle(pairs)
    elif pairs:
        entry(rng, pairs, len(data))
    text = b"{" + b",".join(_text(n) + b":" + _text(v) for n, v in pairs) + b"}"
    return len(text).to_bytes(8, "little") + text + data


def _text(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=value in ("\ud800",)).encode(errors="surrogatepass")
