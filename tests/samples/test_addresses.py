"""Manifest cells that are addresses: fetched where that is allowed, refused where they lead inside,
never lost unseen."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from mmkt_ray.config.samples_config import SourceConfig
from mmkt_ray.errors import ConfigError
from mmkt_ray.samples import addresses
from mmkt_ray.samples.addresses import Fetcher, find_addresses, is_public, without_secrets
from tests.shapes import png

pytestmark = pytest.mark.slow
COLUMNS = {"sample_id": "id", "image": "image", "label": "label"}


class Handler(BaseHTTPRequestHandler):
    """Answers by path; counts what was asked, and how many at once."""

    asked: ClassVar[Counter[str]] = Counter()
    at_once, most_at_once, lock = 0, 0, threading.Lock()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        with self.lock:
            self.asked[path] += 1
            Handler.at_once += 1
            Handler.most_at_once = max(Handler.most_at_once, Handler.at_once)
        try:
            self.answer(path)
        finally:
            with self.lock:
                Handler.at_once -= 1

    def answer(self, path: str) -> None:
        body, status, headers = b"", 200, {}
        if path.startswith("/image"):
            body = png("red", int(path[6:] or 0), 8)
        elif path == "/busy" and self.asked[path] < 3:
            status, headers = 503, {"Retry-After": "0"}
        elif path == "/busy":
            body = b"at last"
        elif path == "/down":
            status = 500
        elif path == "/slow":
            time.sleep(1.0)
        elif path == "/moved":
            status, headers = 302, {"Location": "/image3"}
        elif path == "/circle":
            status, headers = 302, {"Location": "/circle"}
        elif path == "/inside":
            status, headers = 302, {"Location": "http://169.254.169.254/latest/meta-data"}
        elif path == "/file":
            status, headers = 302, {"Location": "file:///etc/passwd"}
        elif path == "/large":
            body = bytes(5000)
        elif path == "/packed":
            body, headers = gzip.compress(bytes(10**6)), {"Content-Encoding": "gzip"}
        elif path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
            return
        else:
            status = 404
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if path != "/endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(addresses, "FIRST_PAUSE_S", 0.01)
    Handler.asked, Handler.at_once, Handler.most_at_once = Counter(), 0, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def source(**more: object) -> SourceConfig:
    options = {"allow_http": True, "allow_private_addresses": True, **more}
    return SourceConfig.model_validate({"reader": "manifest", "path": "a.csv", "columns": COLUMNS, **options})


def fetch(address: str, **more: object) -> str:
    """What is there, or why not."""
    with Fetcher(source(**more)) as fetcher:
        (found,) = fetcher.fetch([address]).values()
    return str(found) if isinstance(found, ValueError) else found.decode("latin-1")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/nothing", "HTTP 404"),
        ("/down", "HTTP 500, after 3 tries"),
        ("/cut", "after 3 tries"),
        ("/circle", "more than 5 redirects"),
        ("/file", "it leads to 'file:///etc/passwd', which is no http"),
        ("/large", "more than 4,000 bytes"),
        ("/slow", "no answer within 0.3 s, after 3 tries"),
    ],
)
def test_each_failure_says_why(server: str, path: str, why: str):
    """Catches a broken answer that is taken for an image, a fetch without end,
    and a reason that nobody can act on."""
    limits = {"max_bytes": 4000, "timeout_s": 0.3, "num_retries": 2}
    found = fetch(server + path, http=limits)
    assert found.startswith(f"cannot fetch '{server}{path}': ")
    assert why in found
    assert Handler.asked[path] == (3 if "3 tries" in why else 6 if path == "/circle" else 1)


def test_what_passes_is_tried_again(server: str):
    """Catches a row that is lost as a server was busy for a moment."""
    assert fetch(f"{server}/busy") == "at last"
    assert Handler.asked["/busy"] == 3


def test_a_packed_answer_is_not_unpacked(server: str):
    """Catches memory filled by an answer of a few bytes."""
    assert len(fetch(f"{server}/packed", http={"max_bytes": 2000})) < 2000


def test_what_leads_inside_is_refused(server: str, monkeypatch: pytest.MonkeyPatch):
    """Catches rows that make the cluster ask its own network: by number, by name, by redirect, in every spelling."""
    port = server.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "0.0.0.0"):
        found = fetch(f"http://{host}:{port}/image1", allow_private_addresses=False)
        assert "not on the public internet" in found or "no valid address" in found, host
    assert not Handler.asked
    real = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda number: number == "127.0.0.1" or real(number))
    assert fetch(f"{server}/image1", allow_private_addresses=False).startswith("\x89PNG")
    assert "169.254.169.254, which is not on the public" in fetch(f"{server}/inside", allow_private_addresses=False)


def test_a_name_that_changes_its_number_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Catches a check of one look-up and a connection by another: the numbers that are checked are connected to."""
    answers = []

    def look_up(*_: object, **__: object) -> list:
        answers.append(1)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8" if len(answers) > 1 else "10.0.0.7", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert "10.0.0.7, which is not on the public" in fetch("http://moved.example/x", allow_private_addresses=False)
    assert len(answers) == 1


def test_which_numbers_are_public():
    """Catches an IPv4 address of the local network that is written as IPv6."""
    public = ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"]
    inside = [
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "127.8.8.8",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
    ]
    inside += ["fe80::1%eth0", "::1", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:0a00:0001::"]
    assert [number for number in public + inside if is_public(number)] == public


def test_secrets_in_an_address_are_not_told():
    """Catches a signed address, or a password, in rejects.parquet."""
    assert without_secrets("https://me:word@store.example/a.png?Signature=abc") == "https://store.example/a.png"
    assert "holds a name or a password" in fetch("http://me:word@127.0.0.1/x")
    assert "cannot fetch" in fetch("http://[broken/x")


def test_addresses_are_found_in_lists_too():
    """Catches a column of several images whose addresses are taken for paths."""
    assert find_addresses(["a.png", "HTTP://x/1", None, ["https://x/2", "HTTP://x/1"], 3]) == [
        "HTTP://x/1",
        "https://x/2",
    ]


# --- through the manifest reader --------------------


def rows(server: str) -> list[dict]:
    paths = [*(f"{server}/image{i}" for i in range(20)), f"{server}/nothing", "here.png", "", f"{server}/moved"]
    return [{"id": f"r{i}", "image": path, "label": "a"} for i, path in enumerate(paths)]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_manifest_of_addresses(server: str, make_config, read_all, tmp_path, suffix: str):
    """Catches rows in another order than the manifest's, one at a time, lost rows,
    and files that are no longer read."""
    (tmp_path / "here.png").write_bytes(png("blue", 0, 8))
    if suffix == "csv":
        lines = ["id,image,label", *(f"{r['id']},{r['image']},{r['label']}" for r in rows(server))]
    else:
        lines = [json.dumps(r) for r in rows(server)]
    (tmp_path / f"a.{suffix}").write_text("\n".join(lines) + "\n")
    given = {"reader": "manifest", "path": f"a.{suffix}", "columns": COLUMNS, "allow_http": True}
    config = make_config(tmp_path, given | {"allow_private_addresses": True, "http": {"concurrency": 8}})
    table, rejects = read_all(config)
    images = dict(zip(table["sample_id"].to_pylist(), table["image"].to_pylist(), strict=True))
    assert list(images)[:20] == [f"r{i}" for i in range(20)]
    assert [images[f"r{i}"] for i in range(20)] == [png("red", i, 8) for i in range(20)]
    assert images["r21"] == png("blue", 0, 8)
    assert images["r23"] == png("red", 3, 8)
    assert any("HTTP 404" in reject.reason for reject in rejects)
    assert 1 < Handler.most_at_once <= 8


def test_addresses_are_off_by_default(server: str, make_config, read_all, tmp_path):
    """Catches a manifest that makes a run ask servers without anybody having allowed it."""
    (tmp_path / "a.csv").write_text(f"id,image,label\nr1,{server}/image1,a\n")
    for outside in (False, True):
        given = {"reader": "manifest", "path": "a.csv", "columns": COLUMNS, "allow_outside": outside}
        _, rejects = read_all(make_config(tmp_path, given))
        assert "set allow_http: true" in rejects[0].reason
    assert not Handler.asked
    with pytest.raises(ConfigError, match="allow_http goes with reader: manifest"):
        make_config(tmp_path, given | {"reader": "parquet", "allow_http": True})


def test_sources_without_addresses_keep_their_fingerprint():
    """Catches every store being made anew, as its config has keys that it did not have."""
    plain = SourceConfig(reader="manifest", path="a.csv", columns=COLUMNS).model_dump()
    assert not {"allow_http", "allow_private_addresses", "http"} & plain.keys()
    assert SourceConfig.model_validate(source().model_dump()) == source()
