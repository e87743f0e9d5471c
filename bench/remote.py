"""Conversions from a server on this machine, with and without faults, and by several processes, against a local one.

    python bench/remote.py --gigabytes 0.5 --json bench/results/remote.json

All of them wait for the disk. bytes / owned: what the server sent of tensor files over what the conversion needs.
memory: the peak of anonymous memory of a process over what its imports took. source: what the server alone would take
at its rate. not hidden: what a conversion takes beyond that, over what it takes from local files: 0 where reading and
the disk overlap wholly, 1 where one waits for the other. The slow servers send 200 and 50 MB/s over all connections.
Every server here is a process in Python on the same cores: what it costs itself is in the row without a rate. The
median of some rounds.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
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
report = fmoe.convert(sys.argv[1], sys.argv[2], **how)
told = {"seconds": time.perf_counter() - began, "memory": max(0, peak[0] - base)}
print(json.dumps(told | {"read": report.read, "written": report.written}))
"""


def run(source: str, dst: Path, *more: str) -> dict[str, Any]:
    """A conversion in a process of its own."""
    found = subprocess.run([sys.executable, "-c", CONVERT, source, str(dst), *more], check=True, capture_output=True)
    told: dict[str, Any] = json.loads(found.stdout)
    return told


def ranks(source: Path, dst: Path, number: int) -> dict[str, Any]:
    began = time.perf_counter()
    call = [sys.executable, "-m", "fmoe", "convert", str(source), str(dst), "--ranks", str(number), "--json"]
    found = subprocess.run(call, check=True, capture_output=True)
    told = json.loads(found.stdout)
    return {"seconds": time.perf_counter() - began, "read": told["read"], "written": told["written"]}


def same(a: Path, b: Path) -> bool:
    return subprocess.run(["diff", "-rq", str(a), str(b)], capture_output=True).returncode == 0


SLOW = 200e6
SERVERS: dict[str, dict[str, Any]] = {
    "a server": {},
    "a server that answers every 5th request with 503": {"fails": lambda n: n % 5 == 0},
    "a server that breaks off every 3rd answer": {"truncates": lambda n: n % 3 == 0},
    "a server of 200 MB/s": {"rate": SLOW},
    "a server of 50 MB/s": {"rate": 50e6},
    "a server of 200 MB/s, every 5th request 503, every 3rd broken off": {
        "rate": SLOW,
        "fails": lambda n: n % 5 == 0,
        "truncates": lambda n: n % 3 == 0,
    },
}


def measure(folder: Path, gigabytes: float, rounds: int) -> list[dict[str, Any]]:
    source = folder / "source"
    synthetic.CONFIGS["qwen3_moe"] |= {"hidden_size": 512, "moe_intermediate_size": 256, "head_dim": 32}
    nbytes = synthetic.write(source, "qwen3_moe", gigabytes, 25_000_000)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    run(str(source), folder / "local")
    locals_ = [run(str(source), _none(folder / "again")) for _ in range(rounds)]
    local = _median(locals_)
    rows = [{"what": "local files", "bytes": nbytes, **local}]
    for name, how in SERVERS.items():
        rate = how.get("rate", 0.0)
        found = []
        for _ in range(rounds):
            with serving(source, **how) as server:
                found.append(_asked(server, folder, folder / "local", nbytes))
        row = {"what": name, "bytes": nbytes, **_median(found), "same": all(f["same"] for f in found)}
        if rate:
            alone = row["over"] * nbytes / rate
            row |= {"source": alone, "not hidden": (row["seconds"] - alone) / local["seconds"]}
        rows.append(row)
    with serving(source) as server:
        owned = run(str(source), folder / "some", "[0, 16]")
        found = [_asked(server, folder, folder / "some", owned["read"], "[0, 16]")]
        rows.append({"what": "a server, experts 0:16 of 128", "bytes": owned["read"], **found[0]})
    for number in (2, 4):
        dst = folder / f"ranks{number}"
        told = ranks(source, dst, number)
        row = {"what": f"{number} processes, local files (with their start)", "bytes": nbytes}
        rows.append(row | {"same": same(dst, folder / "local"), **told})
    return [row | {"times local": row["seconds"] / local["seconds"]} for row in rows]


def _asked(server: Served, folder: Path, expected: Path, owned: int, *more: str) -> dict[str, Any]:
    found = run(server.url, _none(folder / "out"), *more)
    requests, over = len(server.requests), server.data / owned
    return found | {"requests": requests, "over": over, "same": same(folder / "out", expected)}


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row whose seconds are in the middle."""
    return sorted(rows, key=lambda row: row["seconds"])[len(rows) // 2] | {"rounds": len(rows)}


def _none(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--gigabytes", type=float, default=0.5)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--json", type=Path)
    how = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), how.gigabytes, how.rounds)
    for row in rows:
        print(row)
    if how.json:
        how.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
