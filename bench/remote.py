"""Conversions from a server on this machine, with and without faults, and by several processes, against a local one.

    python bench/remote.py --gigabytes 0.1 --json bench/results/remote.json

bytes / owned: what the server sent of tensor files over what the conversion needs. memory: the peak of anonymous
memory of a process over what its imports took. over all ranks: what was read and written by all of them together.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers" / "loopback"))

import synthetic
from servers import Served, serving

CONVERT = """
import json, re, sys, threading, time
from pathlib import Path
import fmoe, fmoe.checkpoint
status = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1000
base, peak, ended = status(), [0], threading.Event()
def watch():
    while not ended.wait(0.005):
        peak[0] = max(peak[0], status())
threading.Thread(target=watch, daemon=True).start()
began = time.perf_counter()
how = {"e": range(*json.loads(sys.argv[3]))} if len(sys.argv) > 3 else {}
report = fmoe.convert(sys.argv[1], sys.argv[2], fsync=False, **how)
told = {"seconds": time.perf_counter() - began, "memory": max(0, peak[0] - base)}
print(json.dumps(told | {"read": report.read, "written": report.written}))
"""


def run(source: str, dst: Path, *more: str) -> dict[str, Any]:
    """A conversion in a process of its own."""
    found = subprocess.run([sys.executable, "-c", CONVERT, source, str(dst), *more], check=True, capture_output=True)
    told: dict[str, Any] = json.loads(found.stdout)
    return told


def ranks(source: Path, dst: Path, number: int) -> dict[str, Any]:
    import time

    began = time.perf_counter()
    call = [
        sys.executable,
        "-m",
        "fmoe",
        "convert",
        str(source),
        str(dst),
        "--ranks",
        str(number),
        "--json",
        "--no-fsync",
    ]
    found = subprocess.run(call, check=True, capture_output=True)
    told = json.loads(found.stdout)
    return {"seconds": time.perf_counter() - began, "read": told["read"], "written": told["written"]}


def same(a: Path, b: Path) -> bool:
    return subprocess.run(["diff", "-rq", str(a), str(b)], capture_output=True).returncode == 0


SERVERS: dict[str, dict[str, Any]] = {
    "a server": {},
    "a server that answers every 5th request with 503": {"fails": lambda n: n % 5 == 0},
    "a server that breaks off every 3rd answer": {"truncates": lambda n: n % 3 == 0},
}


def measure(folder: Path, gigabytes: float) -> list[dict[str, Any]]:
    source = folder / "source"
    synthetic.CONFIGS["qwen3_moe"] |= {"hidden_size": 512, "moe_intermediate_size": 256, "head_dim": 32}
    nbytes = synthetic.write(source, "qwen3_moe", gigabytes, 25_000_000)
    local = run(str(source), folder / "local")
    rows = [{"what": "local files", "bytes": nbytes, **local}]
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    for name, how in SERVERS.items():
        with serving(source, **how) as server:
            rows.append({"what": name, "bytes": nbytes, **_asked(server, folder, folder / "local", nbytes)})
    with serving(source) as server:
        owned = run(str(source), folder / "some", "[0, 16]")
        found = _asked(server, folder, folder / "some", owned["read"], "[0, 16]")
        rows.append({"what": "a server, experts 0:16 of 128", "bytes": owned["read"], **found})
    for number in (2, 4):
        dst = folder / f"ranks{number}"
        found = ranks(source, dst, number)
        rows.append(
            {"what": f"{number} processes, local files", "bytes": nbytes, "same": same(dst, folder / "local"), **found}
        )
    return [row | {"times local": row["seconds"] / local["seconds"]} for row in rows]


def _asked(server: Served, folder: Path, expected: Path, owned: int, *more: str) -> dict[str, Any]:
    subprocess.run(["rm", "-rf", str(folder / "out")], check=True)
    found = run(server.url, folder / "out", *more)
    return found | {
        "requests": len(server.requests),
        "over": server.data / owned,
        "same": same(folder / "out", expected),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--gigabytes", type=float, default=0.1)
    options.add_argument("--json", type=Path)
    how = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), how.gigabytes)
    for row in rows:
        print(row)
    if how.json:
        how.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
