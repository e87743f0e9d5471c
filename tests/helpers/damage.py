"""The ways in which a checkpoint is damaged: seeded, and aware of what a header, an index and a config are.

files, done = damaged(random.Random(7), bases()["qwen3_moe"])
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import CONFIG, INDEX, NATIVE, Files

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
TOKENS = [*"{}[],:", '"', "\\", "\x00", "\ufeff", '"\\ud800"', '"\\u0000"', "[" * 3000, '{"a":' * 1500, "9" * 5000]
TOKENS += "NaN Infinity -Infinity -0 01 1e2 1E400 +1 .5 'a' null true /**/".split()
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|[{}\[\],:]|\w+')


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


def tokens(rng: Random, text: bytes) -> bytes:
    """JSON with a token taken away, doubled, exchanged or put in."""
    found = list(TOKEN.finditer(text.decode(errors="replace")))
    if not found:
        return text
    whole, hit = text.decode(errors="replace"), rng.choice(found)
    put = rng.choice(
        [
            rng.choice(TOKENS),
            hit[0] * 2,
            "",
            rng.choice(found)[0],
            f" {hit[0]}\n",
            _text(value_of(rng, 0)).decode(errors="replace"),
        ]
    )
    return (whole[: hit.start()] + put + whole[hit.end() :]).encode(errors="surrogatepass")


def document(rng: Random, content: bytes) -> bytes:
    """An index, a config or fmoe.json with one value, or one key, changed somewhere in it."""
    try:
        root = json.loads(content)
    except (ValueError, RecursionError):
        return content
    at, path = root, []
    while isinstance(at, dict | list) and at and (not path or rng.random() < 0.7):
        path.append((at, rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))))
        at = at[path[-1][1]]
    if not path:
        return _text(rng.choice(VALUES))
    holder, key = path[-1]
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[name_of(rng)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):  # the same key a second time, before the first
        text = json.dumps(root)
        quoted = json.dumps(key) + ":"
        return text.replace(quoted, f"{quoted} {json.dumps(value_of(rng, at))}, {quoted}", 1).encode()
    else:
        holder[key] = value_of(rng, at)
    return _text(root) if b"\xed" not in _text(root) else json.dumps(root).encode()


def raw(rng: Random, content: bytes) -> bytes:
    """Bytes flipped, cut off, put in, or a length that is another."""
    if not content:
        return b"x"
    edge = min(len(content), rng.choice([len(content), 600, 9]))
    at = rng.randrange(edge)
    kind = rng.randrange(7)
    if kind == 0:
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at + 1 :]
    if kind == 2:
        return content[:at]
    if kind == 3:
        return content + rng.choice([b"\0", b"\0" * 64, b"x", content])
    if kind == 4:
        return content[:at] + content[at + rng.randrange(1, 9) :]
    if kind == 5:
        length = int.from_bytes(content[:8], "little") + rng.choice([-8, -1, 1, 8, 2**20, 2**40])
        return (length % 2**64).to_bytes(8, "little") + content[8:]
    return abs(rng.choice([*NUMBERS[:17], 100_000_001])).to_bytes(16, "little")[:8] + content[8:]


def _pickle(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path)


THINGS: list[bytes | Callable[[Path], object]] = [
    b"",
    b"\0" * 512,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"<!DOCTYPE html>",
    b"GGUF\x03\0\0\0",
    _pickle,
    lambda path: os.mkfifo(path),
    lambda path: path.mkdir(),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("/etc/passwd"),
    lambda path: path.symlink_to(CONFIG),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: save_file({"x": torch.ones(1)}, path),
]


def thing(rng: Random, files: Files) -> None:
    """A file gone, another in its place, one more."""
    name = rng.choice(list(files))
    kind = rng.randrange(5)
    if kind == 0:
        del files[name]
    elif kind == 1:
        files[name] = rng.choice(THINGS)
    elif kind == 2:
        other = rng.choice(list(files))
        files[name], files[other] = files[other], files[name]
    elif kind == 3:
        files[rng.choice(["extra.safetensors", "model-00003-of-00003.safetensors", "a\nb.safetensors"])] = files[name]
    else:
        added = ["extra.safetensors", "pytorch_model.bin", "x.json", INDEX, NATIVE]
        files[rng.choice(added)] = rng.choice(THINGS)


def damaged(rng: Random, files: Files) -> tuple[Files, list[str]]:
    """files with one to three things wrong, and what was done. Now and then nothing is wrong after all."""
    files, done = dict(files), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not (names := list(files)):
            break
        name = rng.choices(names, [8 if n.endswith(".safetensors") else 3 for n in names])[0]
        content = files[name]
        if rng.random() < 0.12 or callable(content):
            thing(rng, files)
            done.append("thing")
            continue
        binary = name.endswith(".safetensors")
        ways = [header, header, header, header, head_tokens, raw] if binary else [document, document, tokens, raw]
        way = rng.choice(ways)
        files[name] = way(rng, content)
        done.append(f"{way.__name__.strip('_')} of {name}")
    return files, done


def head_tokens(rng: Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    text = tokens(rng, content[8 : 8 + length])
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
