"""A served model answers over HTTP as it does in Python, within its limits, and its page works in a real browser."""

import base64
import importlib.util
import io
import json
import re
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mmkt_ray.errors import DataError
from mmkt_ray.kinds.modalities import MODALITY_KINDS

MISSING = [name for name in ("fastapi", "uvicorn", "python_multipart") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"the extra `serve` is not installed: {MISSING}"),
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Colours:
    """A stand-in for a loaded model with its interface, which answers by the mean colour and by the text's first
    word."""

    modalities = {"image": "image", "text": "text"}  # noqa: RUF012  (as of Model)
    kinds = {m: MODALITY_KINDS[m]() for m in ("image", "text")}  # noqa: RUF012
    tasks = ("colour", "tags")
    classes = {"colour": ["blue", "green", "red"], "tags": ["long", "short"]}  # noqa: RUF012

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s, self.seen = pause_s, []

    def predict_arrow(self, rows, *, read_files):
        assert read_files is False, "a request must not name files of this machine"
        time.sleep(self.pause_s)
        self.seen += rows
        return pa.Table.from_pylist([self.answer(row) for row in rows])

    def answer(self, row):
        proba, unreadable = None, None
        if row["image"] is not None:
            try:
                mean = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")).mean((0, 1))[::-1] + 1
                proba = (mean / mean.sum()).tolist()
            except OSError:
                unreadable = "image: cannot decode"
        short = None if row["text"] is None else [0.25, 0.75] if len(row["text"]) < 10 else [0.75, 0.25]
        missing = [m for m in ("image", "text") if row[m] is None]
        return {
            "colour_pred": None if proba is None else self.classes["colour"][int(np.argmax(proba))],
            "colour_proba": proba,
            "tags_pred": None if short is None else [self.classes["tags"][int(np.argmax(short))]],
            "tags_proba": short,
            "missing": missing,
            "unreadable": unreadable,
        }


def png(colour=(220, 30, 30), side=16):
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, "png")
    return out.getvalue()


@pytest.fixture
def start():
    """Starts a server on a free port of this machine: (model, limits) -> its address."""
    import uvicorn

    from mmkt_ray.serve.app import create_app
    from mmkt_ray.serve.limits import ServerLimits

    servers = []

    def run(model=None, **limits):
        app = create_app(model or Colours(), "runs/<b>colours</b>", ServerLimits(**limits))
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield run
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def ask(url, body=None, content_type="application/json", headers=None):
    """(status, text) of a request by the standard library's own client."""
    request = urllib.request.Request(url, body, {"content-type": content_type} | (headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def multipart(fields):
    """name -> text or (file name, bytes) as a form: (body, content type)."""
    boundary, body = "x0boundary0x", b""
    for name, value in fields.items():
        is_file = isinstance(value, tuple)
        about = f'; filename="{value[0]}"\r\ncontent-type: application/octet-stream' if is_file else ""
        content = value[1] if is_file else value.encode()
        body += (
            f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"{about}\r\n\r\n'.encode() + content + b"\r\n"
        )
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def encoded(data):
    return base64.b64encode(data).decode()


def test_json_rows_are_answered_in_order_with_the_top_classes(start):
    url = start()
    as_uri = "data:image/png;base64," + encoded(png((0, 0, 255)))
    wrapped = base64.encodebytes(png()).decode()  # in lines, as `base64` of the command line writes it
    rows = [{"image": wrapped}, {"text": "a very long text"}, {"image": as_uri}]
    status, text = ask(f"{url}/predict?top=2", json.dumps({"rows": rows}).encode())
    assert status == 200
    red, words, blue = json.loads(text)["rows"]
    assert red["predictions"]["colour"]["prediction"] == "red"
    assert red["predictions"]["colour"]["top"][0]["class"] == "red"
    assert len(red["predictions"]["colour"]["top"]) == 2
    assert red["predictions"]["tags"] == {"prediction": None}
    assert words["predictions"]["tags"] == {
        "prediction": ["long"],
        "top": [{"class": "long", "probability": 0.75}, {"class": "short", "probability": 0.25}],
    }
    assert words["missing"] == ["image"]
    assert blue["predictions"]["colour"]["prediction"] == "blue"


def test_a_form_with_an_upload_is_one_row(start):
    url = start()
    body, kind = multipart({"image": ("a.png", png((10, 250, 10))), "text": "short"})
    status, text = ask(f"{url}/predict", body, kind)
    assert status == 200
    (row,) = json.loads(text)["rows"]
    assert row["predictions"]["colour"]["prediction"] == "green"
    assert row["predictions"]["tags"]["prediction"] == ["short"]
    assert row["missing"] == []


def test_an_image_that_is_none_is_told_and_not_an_error(start):
    status, text = ask(f"{start()}/predict", json.dumps({"image": encoded(b"no image"), "text": "x"}).encode())
    assert status == 200
    assert json.loads(text)["rows"][0]["unreadable"] == "image: cannot decode"


@pytest.mark.parametrize(
    ("body", "kind", "status", "told"),
    [
        (b"{", "application/json", 422, "no JSON"),
        (b"[" * 100_000, "application/json", 422, "no JSON"),
        (b'{"rows": []}', "application/json", 422, "1 to 256 rows"),
        (json.dumps({"rows": [{}] * 257}).encode(), "application/json", 422, "257"),
        (b'{"rows": ["a"]}', "application/json", 422, "row 0 must be an object"),
        (b'{"imag": "x"}', "application/json", 422, "did you mean 'image'"),
        (b'{"image": "***"}', "application/json", 422, "no base64"),
        (b'{"image": 3}', "application/json", 422, "must be a file in base64"),
        ('{"image": "\u00e9"}'.encode(), "application/json", 422, "no base64"),
        (b'{"\\ud800": "x"}', "application/json", 422, "reads no '\\\\ud800'"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "application/json"),
        (*multipart({"image": "text"}), 422, "must be an uploaded file"),
        (*multipart({"sound": "text"}), 422, "reads no 'sound'"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x", 422, ""),
        (b"", "multipart/form-data", 422, ""),
    ],
)
def test_wrong_requests_get_a_sentence(start, body, kind, status, told):
    got, text = ask(f"{start()}/predict", body, kind)
    assert (got, told in text) == (status, True), text


def test_a_body_over_the_limit_is_refused_by_its_length_and_by_what_comes(start):
    url, model = None, Colours()
    url = start(model, body_bytes=2000)
    status, text = ask(f"{url}/predict", b" " * 3000)
    assert (status, "larger than 2000 bytes" in text) == (413, True)
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:  # no length stated
        head = f"POST /predict HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        connection.sendall(head.encode() + b"transfer-encoding: chunked\r\n\r\n" + b"1000\r\n" + b" " * 4096 + b"\r\n")
        assert b" 413 " in connection.recv(200)
    assert model.seen == []


def test_an_answer_that_takes_too_long_is_given_up_and_the_server_goes_on(start):
    url = start(Colours(pause_s=1.0), timeout_s=0.2)
    status, text = ask(f"{url}/predict", b'{"text": "x"}')
    assert (status, "within 0.2 s" in text) == (504, True)
    assert ask(f"{url}/health")[0] == 200


def test_requests_under_another_name_are_refused(start):
    """A page elsewhere could else reach the server under a name that it makes point here."""
    assert ask(f"{start()}/health", headers={"host": "evil.example"})[0] == 400


def test_health_and_openapi_tell_what_the_model_reads(start):
    url = start()
    health = json.loads(ask(f"{url}/health")[1])
    assert health["modalities"] == {"image": "image", "text": "text"}
    assert health["tasks"] == {"colour": 3, "tags": 2}
    described = json.loads(ask(f"{url}/openapi.json")[1])
    content = described["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    row = content["application/json"]["schema"]["anyOf"][1]
    assert set(row["properties"]) == {"image", "text"}


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_elsewhere_and_escape_names(start, path):
    status, text = ask(start() + path)
    assert status == 200
    assert "<b>colours" not in text
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text)


def test_a_number_that_json_lacks_becomes_null():
    from mmkt_ray.serve.requests import finite

    assert finite(float("nan")) is None
    assert finite(2.5) == 2.5


def test_a_text_upload_of_a_form_is_read_as_text():
    from mmkt_ray.serve.requests import row_from_form

    assert row_from_form([("text", b"caf\xc3\xa9"), ("image", b"")], Colours.kinds) == {"image": None, "text": "café"}
    with pytest.raises(DataError, match="reads no"):
        row_from_form([("odd", "x")], Colours.kinds)
    with pytest.raises(DataError, match="'text' twice"):
        row_from_form([("text", "a"), ("text", "b")], Colours.kinds)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_real_browser(start, tmp_path):
    """Types a text, gives an image, presses the button: by the browser's own protocol, over a pipe."""
    from tests.browser import Browser

    url, picture = start(), tmp_path / "red.png"
    picture.write_bytes(png())
    with Browser(CHROMIUM, tmp_path) as browser:
        browser.open(url)
        browser.set_file("input[type=file]", str(picture))
        browser.evaluate("document.querySelector('textarea').value = 'short'")
        browser.evaluate("document.querySelector('button[type=submit]').click()")
        browser.wait("document.querySelectorAll('#result table').length == 2")
        shown = browser.evaluate("document.querySelector('#result').innerText")
        assert "colour: red" in shown
        assert "tags: short" in shown
        assert browser.evaluate("document.querySelectorAll('.drop img').length") == 1
        unlabelled = "[...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length).length"
        assert browser.evaluate(unlabelled) == 0
        assert browser.errors() == []


def test_the_command_serves_until_it_is_stopped(tmp_path, monkeypatch):
    """`mmkt serve` on a port that is taken says so; without its packages it names the extra."""
    from mmkt_ray.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 2
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(tmp_path)]) == 2


def test_only_loopback_is_bound_to_names():
    from mmkt_ray.serve.server import allowed_hosts, model_name

    assert "localhost" in allowed_hosts("127.0.0.1")
    assert allowed_hosts("0.0.0.0") is None
    assert model_name("/x/runs/openmoji/models/concat/") == "openmoji/concat"
    assert model_name("models") == "models"


