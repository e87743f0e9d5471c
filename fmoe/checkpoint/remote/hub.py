"""A model of the Hugging Face hub at one commit, through huggingface_hub: its cache, token, endpoint, offline."""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fmoe.checkpoint.remote.trouble import Trouble, shown
from fmoe.checkpoint.remote.web import Facts, Ranges, facts
from fmoe.types import AdapterError

_MODEL = re.compile(r"([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]*))?(?:/(.+))?")
_XET = re.compile(r"HTTP status \w+ error \((\d{3})\b")


class Hub:
    """hf://org/name[@revision][/folder]; a revision may be refs/pr/N, any other with a slash is written with %2F."""

    listed = True

    def __init__(self, url: str):
        self.hub = _library()
        self.shown, parts = shown(url), urlsplit(url)
        found = _MODEL.fullmatch(parts.netloc + parts.path.rstrip("/"))
        if not found:
            raise AdapterError(f"{self.shown}: expected hf://org/name, with @revision if not main")
        self.repo, self.revision = found[1], unquote(found[2] or "") or None
        self.folder = f"{found[3]}/" if found[3] else ""
        self.files: dict[str, Ranges] = {}
        self.commit, self.sizes = "", dict[str, Facts | None]()

    def snapshot(self) -> Path | None:
        """The folder of the cache, where the hub may not be asked."""
        if not self.hub.constants.is_offline_mode():
            return None
        try:
            found = self.hub.snapshot_download(self.repo, revision=self.revision, local_files_only=True)
        except Exception:
            raise AdapterError(f"{self.shown} is not in the cache, and HF_HUB_OFFLINE is set") from None
        return Path(found) / self.folder

    def names(self) -> list[str]:
        self._look()
        return sorted(self.sizes)

    def facts(self, file: str) -> Facts | None:
        self._look()
        if file in self.sizes and self.sizes[file] is None:
            self.sizes[file] = self._facts(file)
        return self.sizes.get(file)

    def read(self, file: str, view: memoryview, at: int) -> None:
        if cached := self._cached(file):
            with open(cached, "rb", buffering=0) as data:
                if os.preadv(data.fileno(), [view], at) == len(view):
                    return
        if file not in self.files:
            found = self.facts(file)
            self.files.setdefault(file, Ranges(found.size if found else 0))
        self.files[file].read(self._url(file), self._headers(), view, at)

    def _look(self) -> None:
        if self.commit:
            return
        try:
            found = self.hub.HfApi().model_info(self.repo, revision=self.revision, files_metadata=True)
        except Exception as error:
            raise trouble_of(error) from None
        self.commit = str(found.sha or self.revision or "main")
        for entry in found.siblings or ():
            if entry.rfilename.startswith(self.folder):
                tag = getattr(entry.lfs, "sha256", None) or entry.blob_id
                known = Facts(entry.size, str(tag)) if entry.size is not None and tag else None
                self.sizes[entry.rfilename[len(self.folder) :]] = known

    def _facts(self, file: str) -> Facts:
        try:
            found = self.hub.get_hf_file_metadata(self._url(file))
        except Exception as error:
            raise trouble_of(error) from None
        if found.size is None:
            return facts(self._url(file), self._headers())
        return Facts(int(found.size), str(found.etag or ""))

    def _url(self, file: str) -> str:
        return str(self.hub.hf_hub_url(self.repo, self.folder + file, revision=self.commit))

    def _headers(self) -> dict[str, str]:
        return dict(self.hub.utils.build_hf_headers())

    def _cached(self, file: str) -> str | None:
        found = self.hub.try_to_load_from_cache(self.repo, self.folder + file, revision=self.commit)
        return found if isinstance(found, str) else None


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.utils
    except ImportError:
        raise AdapterError("hf:// needs huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def trouble_of(error: Exception) -> Trouble:
    """What huggingface_hub raised, or hf_xet below it, which tells a status in words alone."""
    from fmoe.checkpoint.remote.trouble import status

    answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    code = getattr(answer, "status_code", None)
    code = int(told[1]) if (told := _XET.search(str(error))) else code
    if isinstance(code, int):
        return status(code)
    refused = isinstance(error, PermissionError) or type(error).__name__ in (
        "HFValidationError",
        "OfflineModeIsEnabled",
        "LocalTokenNotFoundError",
    )
    return Trouble(type(error).__name__, again=not refused)
