"""Which bytes of files this machine holds in memory, and so has read: `forget(path)`, do something, `held(path)`."""

import ctypes
import gc
import mmap
import os
import time
from pathlib import Path

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def forget(path: Path) -> bool:
    """The file's pages leave memory; whether they did (some file systems are memory themselves)."""
    gc.collect()  # what is mapped stays
    for _ in range(20):
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not held(path):
            return True
        time.sleep(0.1)
    return False


def held(path: Path) -> int:
    """How many bytes of the file lie in memory."""
    size = path.stat().st_size
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * -(-size // PAGE))()
        first = ctypes.c_char.from_buffer(mapped)
        try:
            if _libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages):
                raise OSError(ctypes.get_errno(), "mincore")
            return sum(page & 1 for page in pages) * PAGE
        finally:
            del first
