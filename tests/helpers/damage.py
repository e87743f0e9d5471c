"""The ways in which a checkpoint is damaged: seeded, and aware of what a header, an index and a config are.

files, done = damaged(random.Random(7), bases()["qwen3_moe"])
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from damaged_headers import NUMBERS, VALUES, _text, header, name_of, value_of
from safetensors.torch import save_file
from tiny import CONFIG, INDEX, NATIVE, Files

TOKENS = [*"{}[],:", '"', "\\", "\x00", "\ufeff", '"\\ud800"', '"\\u0000"', "[" * 3000, '{"a":' * 1500, "9" * 5000]
TOKENS += "NaN Infinity -Infinity -0 01 1e2 1E400 +1 .5 'a' null true /**/".split()
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|[{}\[\],:]|\w+')


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
