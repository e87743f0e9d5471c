"""How much anonymous memory a call of fmoe takes, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

WATCHED = """
import json, sys, threading, time
import fmoe
def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
jobs = json.loads(sys.argv[1])
for call, _, _ in jobs:
    getattr(fmoe, call)  # `import fmoe` alone imports no torch
found, first = [], anonymous()
for call, paths, how in jobs:
    done, most = threading.Event(), 0
    def watch():
        global most
        while not done.is_set():
            most = max(most, anonymous())
            time.sleep(0.002)
    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = getattr(fmoe, call)(*paths, **how)
    done.set()
    watcher.join()
    found.append((max(most, anonymous()) - first) / 10**6)
print(json.dumps(found))
"""


def grown(*jobs: tuple[object, ...]) -> list[float]:
    """MB of anonymous memory that a process takes at most in each job, beyond what it has after import.

    A job: (a function of fmoe, paths and then what it is told).
    """
    told = [(call, [str(p) for p in rest if isinstance(p, Path)], *(r for r in rest if isinstance(r, dict)))
            for call, *rest in jobs]  # fmt: skip
    command = [sys.executable, "-c", WATCHED, json.dumps([(*job, {})[:3] for job in told])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
