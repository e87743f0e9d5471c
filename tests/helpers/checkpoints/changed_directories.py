"""Changes to a checkpoint's directory: a file put, replaced, mapped or rewritten."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def put(name: str, content: bytes | str) -> Change:
    return lambda path: (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def fields(name: str, **new: Any) -> Change:
    return lambda path: (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | new))


OUTSIDE = r"is a link to '[^']*', outside of its directory: put the file itself there"
