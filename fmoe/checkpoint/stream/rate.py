"""A good neighbour: so many bytes in a second, and no more, over all threads."""

import threading
import time
from collections.abc import Callable


class Rate:
    """take(n) returns when n bytes more may pass: never ahead of `bandwidth` bytes a second since the first."""

    def __init__(self, bandwidth: int, sleep: Callable[[float], None] = time.sleep):
        self.bandwidth, self.sleep = bandwidth, sleep
        self._free, self._lock = 0.0, threading.Lock()

    def take(self, nbytes: int) -> None:
        with self._lock:
            now = time.monotonic()
            begin = max(self._free, now)
            self._free = begin + nbytes / self.bandwidth
        if self._free > now:
            self.sleep(self._free - now)
