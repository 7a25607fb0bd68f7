"""A page in headless Chromium that runs one ONNX file with onnxruntime-web.

Standard library and NumPy alone, as :mod:`runners` beside it. The page asks for work and waits
for the answer; each answer of this side makes it run the model once and post the output back.
"""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Browser"]

_PAGE = """<!doctype html><script type="module">
import * as ort from "/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
const post = (path, body, head) => fetch(path, { method: "POST", body, headers: head ?? {} });
try {
  ort.env.wasm.numThreads = 1;
  const bytes = async (path) => (await fetch(path)).arrayBuffer();
  const session = await ort.InferenceSession.create(await bytes("/model"));
  const shape = await (await fetch("/shape")).json();
  const images = new ort.Tensor("float32", new Float32Array(await bytes("/images")), shape);
  while ((await fetch("/next")).status === 200) {
    const results = await session.run({ [session.inputNames[0]]: images });
    const { data, dims } = results[session.outputNames[0]];
    await post("/output", data, { "X-Dims": JSON.stringify(dims) });
  }
} catch (error) {
  await post("/failed", String(error?.stack ?? error));
}
</script>"""

_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_TIME_LIMIT = 300.0
"""Seconds for one output."""


class Browser:
    """Chromium with a page that runs a model.

    Args:
        modules: The folder that has ``node_modules/onnxruntime-web``.
        model: An ONNX file.
        images: Shape (N, C, H, W), float32.

    Raises:
        RuntimeError: If there is no Chromium; at a run, if the page fails.
    """

    def __init__(self, modules: Path, model: Path, images: np.ndarray) -> None:
        command = next(filter(None, map(shutil.which, _COMMANDS)), None)
        if command is None:
            raise RuntimeError(f"no browser: install Chromium ({', '.join(_COMMANDS)})")
        self._served = {
            "/": ("text/html", _PAGE.encode()),
            "/model": ("application/octet-stream", model.read_bytes()),
            "/shape": ("application/json", json.dumps(images.shape).encode()),
            "/images": ("application/octet-stream", images.tobytes()),
        }
        self._wanted: queue.Queue[None] = queue.Queue()
        self._answers: queue.Queue[np.ndarray | str] = queue.Queue()
        handler = partial(_Handler, self, directory=str(modules))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        address = f"http://127.0.0.1:{self._server.server_port}/"
        self._process = subprocess.Popen(
            [command, *options, f"--user-data-dir={self._profile.name}", address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def run(self) -> np.ndarray:
        """The first output, from the browser."""
        self._wanted.put(None)
        try:
            answer = self._answers.get(timeout=_TIME_LIMIT)
        except queue.Empty:
            raise RuntimeError(f"the page gave no output in {_TIME_LIMIT:.0f} s") from None
        if isinstance(answer, str):
            raise RuntimeError(f"the page: {answer[-800:]}")
        return answer

    def close(self) -> None:
        """End the browser and the server."""
        self._process.terminate()
        self._process.wait()
        self._server.shutdown()
        self._profile.cleanup()


class _Handler(SimpleHTTPRequestHandler):
    """Serves the page, the model and ``node_modules``, and takes outputs."""

    def __init__(self, browser: Browser, *args: Any, directory: str) -> None:
        self._browser = browser
        super().__init__(*args, directory=directory)

    def do_GET(self) -> None:
        if self.path == "/next":
            self._browser._wanted.get()
            self._answer("text/plain", b"")
        elif self.path in self._browser._served:
            self._answer(*self._browser._served[self.path])
        else:
            super().do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/output":
            dims = json.loads(self.headers["X-Dims"])
            self._browser._answers.put(np.frombuffer(body, np.float32).reshape(dims))
        else:
            self._browser._answers.put(body.decode(errors="replace"))
        self._answer("text/plain", b"")

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing: the script's output is read by a program."""
