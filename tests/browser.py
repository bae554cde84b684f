"""A headless Chromium that tests drive by its own protocol, over a pipe: nothing listens, nothing is installed."""

import base64
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any


class Browser:
    """One page. Use as a context."""

    def __init__(self, program: str, folder: Path, width: int = 1000, height: int = 900) -> None:
        from_us, self.write_end = os.pipe()
        self.read_end, to_us = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        options += [f"--window-size={width},{height}"]
        options += [
            f"--user-data-dir={folder / 'chromium'}",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "about:blank",
        ]

        def as_3_and_4() -> None:
            os.dup2(from_us, 103)
            os.dup2(to_us, 104)
            os.dup2(103, 3)
            os.dup2(104, 4)

        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [program, *options], preexec_fn=as_3_and_4, close_fds=False, stdin=quiet, stdout=quiet, stderr=quiet
        )
        os.close(from_us)
        os.close(to_us)
        self.buffer, self.count, self.session, self.told = b"", 0, "", []

    def __enter__(self) -> "Browser":
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)
        os.close(self.write_end)
        os.close(self.read_end)

    def call(self, method: str, **params: Any) -> Any:
        """One command of the protocol. Raises: RuntimeError if the browser refuses it."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.told.append(answer)

    def _next(self) -> Any:
        while b"\0" not in self.buffer:
            piece = os.read(self.read_end, 1 << 16)
            if not piece:
                raise RuntimeError("the browser has ended")
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete' && location.href != 'about:blank'")

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page. Raises: RuntimeError for what it throws."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", "the page threw"))
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 20.0) -> None:
        """Until an expression is true. Raises: TimeoutError."""
        end = time.monotonic() + seconds
        while not self.evaluate(script):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{script} did not become true; the page shows {self.evaluate('document.body.innerText')!r}"
                )
            time.sleep(0.05)

    def set_file(self, selector: str, path: str) -> None:
        """Choose a file in an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[path])

    def screenshot(self, path: str) -> None:
        """The page as a PNG."""
        Path(path).write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        )

    def errors(self) -> list[str]:
        """What the page complained about so far."""
        thrown = [
            t["params"]["exceptionDetails"]["text"] for t in self.told if t.get("method") == "Runtime.exceptionThrown"
        ]
        entries = [t["params"]["entry"] for t in self.told if t.get("method") == "Log.entryAdded"]
        return thrown + [e["text"] for e in entries if e["level"] == "error" and "favicon" not in e.get("url", "")]
