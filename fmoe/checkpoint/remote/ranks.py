"""Several processes, of one machine or many, that carry out one piece of work: who does what, and who is still there.

torch.distributed says who they are and gathers what they tell. While they work they only let each other know that they
live, in a store of their own: whoever falls silent, or says that it failed, ends all the others.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from fmoe.checkpoint.remote.trouble import Unreadable
from fmoe.types import AdapterError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BEAT, SILENT, GRACE = 0.5, 30.0, 15.0
"""Seconds from one sign of life to the next; after which a rank counts as dead; and that others have to end then."""


class Ranks:
    """rank, world: as torch.distributed has them. first: whether this one makes the files and publishes them."""

    def __init__(self, group: "ProcessGroup"):
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        self.first = self.rank == 0
        self.lost = ""
        self.mine, self.all = 0, 0  # bytes done
        self._ended = threading.Event()

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, to everybody."""
        found: list[Any] = [None] * self.world
        self._call(lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    def tell(self, value: Any = None) -> Any:
        """The first rank's value, to everybody."""
        found = [value]
        self._call(lambda: dist.broadcast_object_list(found, src=dist.get_global_rank(self.group, 0), group=self.group))
        return found[0]

    def check(self) -> None:
        """Raises Unreadable where another rank has ended."""
        if self.lost:
            raise Unreadable(f"{self.lost}: run the same command again to go on")

    def done(self, nbytes: int) -> int:
        """This rank has done so many; how many all have, as far as is known."""
        self.check()
        self.mine = nbytes
        return max(self.all, nbytes)

    def _call(self, call: Any) -> None:
        self.check()
        try:
            call()
        except RuntimeError:
            for _ in range(20):  # whoever failed may have said why
                if not self.lost:
                    time.sleep(0.1)
            self.lost = self.lost or "another rank has ended"
            self.check()

    def _meet(self) -> Any:
        """The store that this work has for itself."""
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        long = timedelta(seconds=60)
        store = dist.TCPStore(host, 0, is_master=True, timeout=long, wait_for_workers=False) if self.first else None
        port = self.tell(store.port if store else None)
        return store or dist.TCPStore(host, port, is_master=False, timeout=long, wait_for_workers=False)

    def _watch(self, store: Any) -> None:
        beat, seen = 0, {r: ("", time.monotonic()) for r in range(self.world) if r != self.rank}
        since = 0.0
        while not self._ended.wait(BEAT):
            try:
                beat += 1
                store.set(f"beat {self.rank}", f"{beat} {self.mine}")
                self._look(store, seen)
            except RuntimeError:
                self.lost = self.lost or "the first rank has ended"
            if self.lost:
                since = since or time.monotonic()
                if time.monotonic() - since > GRACE and not self._ended.is_set():
                    print(f"fmoe: {self.lost}: run the same command again to go on", file=sys.stderr, flush=True)
                    os._exit(1)

    def _look(self, store: Any, seen: dict[int, tuple[str, float]]) -> None:
        done = self.mine
        for r, (last, when) in seen.items():
            now = store.get(f"beat {r}").decode() if store.check([f"beat {r}"]) else ""
            if now != last:
                seen[r] = (now, time.monotonic())
            elif time.monotonic() - when > SILENT:
                self.lost = self.lost or f"rank {r} is silent"
            done += int(now.split()[1]) if now else 0
        self.all = done
        if store.check(["failed"]):
            self.lost = self.lost or store.get("failed").decode()


@contextmanager
def together(group: "ProcessGroup") -> Iterator[Ranks]:
    """The ranks of a group, watched. What this one raises ends the others."""
    ranks = Ranks(group)
    store = ranks._meet()
    watch = threading.Thread(target=ranks._watch, args=(store,), daemon=True)
    watch.start()
    try:
        yield ranks
    except BaseException as error:
        if not ranks.lost:
            why = str(error) if isinstance(error, AdapterError | OSError) else type(error).__name__
            try:
                store.set("failed", f"rank {ranks.rank}: {why}")
                time.sleep(4 * BEAT)  # the first rank's store ends with it
            except RuntimeError:
                pass
        raise
    finally:
        ranks._ended.set()
        watch.join()


def share(sizes: list[int], ranks: int) -> list[range]:
    """Work in order, cut into one run for every rank, of about as many bytes each.

    >>> share([4, 4, 4, 4, 8, 8], 2)
    [range(0, 4), range(4, 6)]
    """
    total, cuts, done = sum(sizes), [0], 0
    for i, size in enumerate(sizes):
        while len(cuts) < ranks and done + size / 2 > total * len(cuts) / ranks:
            cuts.append(i)
        done += size
    cuts += [len(sizes)] * (ranks + 1 - len(cuts))
    return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
