import errno
import hashlib
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pooch.core
import pytest

from refusallab import published as module
from refusallab.errors import RefusalLabError
from refusallab.published import FILES, published

INSTRUCTIONS = ["Placeholder one.", "Placeholder two, ünïcode.", "Placeholder one."]


class Server(ThreadingHTTPServer):
    requests = 0


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local copy of the published repository with one invented file, and an empty cache."""
    root = tmp_path / "served"
    (root / "splits").mkdir(parents=True)
    body = json.dumps([{"instruction": text, "category": None} for text in INSTRUCTIONS]).encode()
    (root / "splits" / "harmful_val.json").write_bytes(body)
    server = Server(("127.0.0.1", 0), partial(Handler, directory=root))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "BASE_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    entry = ("splits/harmful_val.json", hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(FILES, ("harmful", "val"), entry)
    yield server
    server.shutdown()
    server.server_close()


def error_of(*key):
    with pytest.raises(RefusalLabError) as caught:
        published(*key)
    message = str(caught.value)
    assert "\n" not in message
    return message


def cached_files():
    return [path for path in module.CACHE.rglob("*") if path.is_file()]


def test_downloads_once_then_reads_the_cache(server):
    assert published("harmful", "val") == INSTRUCTIONS
    assert published("harmful", "val") == INSTRUCTIONS
    assert server.requests == 1


def test_cached_file_needs_no_network(server):
    published("harmful", "val")
    server.shutdown()
    server.server_close()
    assert published("harmful", "val") == INSTRUCTIONS


def test_damaged_cache_is_downloaded_again(server):
    published("harmful", "val")
    (module.CACHE / "splits" / "harmful_val.json").write_text("[]")
    assert published("harmful", "val") == INSTRUCTIONS
    assert server.requests == 2


def test_wrong_checksum_is_refused_and_not_kept(server, monkeypatch):
    monkeypatch.setitem(FILES, ("harmful", "val"), ("splits/harmful_val.json", "0" * 64))
    message = error_of("harmful", "val")
    assert "another checksum" in message and "run this again" in message
    assert cached_files() == []


def test_no_network(server):
    server.shutdown()
    server.server_close()
    message = error_of("harmful", "val")
    assert "no connection" in message and "check the network" in message


def test_file_gone_from_the_server(server, monkeypatch):
    monkeypatch.setitem(FILES, ("harmful", "val"), ("splits/gone.json", "0" * 64))
    assert "status 404" in error_of("harmful", "val")


def test_full_disk(server, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pooch.core.shutil, "move", full)
    message = error_of("harmful", "val")
    assert "No space left on device" in message and "free some space" in message
    assert str(module.CACHE) in message
    assert cached_files() == []


def test_cache_that_is_not_a_folder(server):
    module.CACHE.write_text("in the way")
    assert "could not be saved" in error_of("harmful", "val")


@pytest.mark.parametrize("key", [("harmful", "dev"), ("rude", "test"), ("harmbench", "train")])
def test_unknown_set_lists_the_known_ones(key):
    message = error_of(*key)
    assert all(f"{name}/{split}" in message for name, split in FILES)


def test_every_set_is_pinned():
    assert "/9d852fae1a9121c78b29142de733cb1340770cc3/" in module.BASE_URL
    paths, checksums = zip(*FILES.values(), strict=True)
    assert len(set(paths)) == len(set(checksums)) == len(FILES) == 8
    assert all(len(bytes.fromhex(sha)) == 32 for sha in checksums)
