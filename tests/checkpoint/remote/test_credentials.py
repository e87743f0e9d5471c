"""What an address says of who asks reaches its server and nobody else; and what a server answers is what was asked."""

import base64
import json
from threading import Thread

import pytest
import torch
from command import demo, runner
from servers import Served, _Handler, _Server, serving

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.remote import trouble
from fmoe.checkpoint.remote.hub import Hub

BASIC = f"Basic {base64.b64encode(b'me:s3cret@x').decode()}"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(trouble, "PAUSE", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


def test_a_user_of_an_address_is_told_to_its_server_and_to_no_other(tmp_path):
    source = demo() / "hf"
    with serving(source) as cdn, serving(source, hub="any", cdn=cdn.url) as server:  # which redirects
        url = server.url.replace("http://", "http://me:s3cret%40x@") + "/org/name/resolve/main/#s3cret"
        got, expected = fmoe.load(url), fmoe.load(source)
        assert all(torch.equal(got[n], t) for n, t in expected.items()) and cdn.data > 0
        assert {h.get("Authorization") for h in server.headers} == {BASIC}
        assert not any("Authorization" in h for h in cdn.headers)


WHERE = ["http://me:s3cret@HOST", "http://HOST?token=s3cret", "http://HOST/?a=1&sig=s3cret#s3cret"]


@pytest.mark.parametrize("where", WHERE)
def test_no_result_and_no_message_of_any_command_has_a_secret(where, tmp_path, monkeypatch, capsys):
    run = runner(monkeypatch, capsys)
    with serving(demo() / "hf") as server:
        url = where.replace("HOST", server.url.removeprefix("http://"))
        for call in (["inspect", url], ["plan", url], ["verify", url], ["convert", url, tmp_path / "out"]):
            for more in ([], ["--json"]):
                code, out, err = run(*call, *more, *(["--force"] if call[0] == "convert" else []))
                assert code == 0 and "s3cret" not in out + err, call[0]
        assert json.loads(run("inspect", url, "--json")[1])["path"] == server.url
        server.fails, server.status = (lambda n: True), 403
        for call in (["inspect", url], ["convert", url, tmp_path / "other"]):
            code, out, err = run(*call, "--json")
            assert code == 1 and "status 403" in out and "s3cret" not in out + err


def test_an_address_of_the_hub_shows_no_user_and_no_query_and_names_any_revision():
    pytest.importorskip("huggingface_hub")
    for url, told in {
        "hf://org/name": ("org/name", None, ""),
        "hf://org/name@": ("org/name", None, ""),
        "hf://org/name@v1.0/sub/folder/": ("org/name", "v1.0", "sub/folder/"),
        "hf://org/name@refs/pr/7": ("org/name", "refs/pr/7", ""),
        "hf://org/name@refs/pr/7/sub": ("org/name", "refs/pr/7", "sub/"),
        "hf://org/name@my%2Fbranch?token=s3cret": ("org/name", "my/branch", ""),
    }.items():
        hub = Hub(url)
        assert (hub.repo, hub.revision, hub.folder) == told and "s3cret" not in hub.shown
    for url in ("hf://org", "hf://me:s3cret@org/name", "hf://org/@main"):
        with pytest.raises(AdapterError, match="expected hf://org/name") as error:
            Hub(url)
        assert "s3cret" not in str(error.value)


class _Shifted(_Handler):
    """A server that answers ranges of weights with the bytes after them, and says so."""

    def _range(self) -> tuple[int, int]:
        first, end = super()._range()
        return (first + 8, end + 8) if first and self.path.endswith(".safetensors") else (first, end)


def test_an_answer_of_another_range_is_not_taken_for_the_one_that_was_asked_for():
    served = Served(demo() / "hf")
    server = _Server(("127.0.0.1", 0), type("Handler", (_Shifted,), {"served": served}))
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        with pytest.raises(
            AdapterError, match=r"safetensors bytes .*: the answer is of another range, 8 times in a row"
        ):
            fmoe.load(f"http://127.0.0.1:{server.server_address[1]}", e=range(1, 2))
    finally:
        server.shutdown()
        server.server_close()
