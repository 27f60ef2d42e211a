"""The search of a built site, asked in a headless Chromium: the site's own script and its own index."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# a page beside the site's own that gives its worker the index and the questions as the site's script does, and posts the replies
PAGE = """<!doctype html>
<script src="/search/search_index.js"></script>
<script src="/site/search-questions.js"></script>
<script>
const questions = QUESTIONS, found = [];
const worker = new Worker("/WORKER");
const send = () => fetch("/found", {method: "POST", body: JSON.stringify(found)});
worker.onmessage = ({data}) => {
  if (data.type === 3) found.push(data.data.items.map(group => group.map(part => part.location)));
  if (found.length === questions.length) return send();
  worker.postMessage({type: 2, data: questions[found.length]});
};
worker.postMessage({type: 0, data: {config: __index.config, docs: __index.docs, options: {suggest: false}}});
</script>
"""


class _Site(SimpleHTTPRequestHandler):
    """Server of a site and of the page that asks its search."""

    page = ""
    found: list[Any]
    is_done: threading.Event

    def do_GET(self) -> None:
        if self.path != "/ask":
            super().do_GET()
            return
        body = self.page.encode()
        self.send_response(200)
        self.send_header("content-type", "text/html; charset=utf-8")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.found.extend(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(204)
        self.end_headers()
        self.is_done.set()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def search(site: Path, questions: Sequence[str], *, browser: str, timeout_s: float = 120) -> list[list[str]]:
    """Return for each question the pages that the site's search shows, best first.

    Raises TimeoutError if the browser has not answered in time.
    """
    [worker] = (site / "assets/javascripts/workers").glob("search.*.js")
    page = PAGE.replace("QUESTIONS", json.dumps(list(questions)))
    page = page.replace("WORKER", worker.relative_to(site).as_posix())
    answered = threading.Event()
    handler = type("_Asked", (_Site,), {"page": page, "found": [], "is_done": answered})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        address = f"http://127.0.0.1:{server.server_port}/ask"
        process = subprocess.Popen(
            [*command, "--remote-debugging-port=0", address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            if not answered.wait(timeout_s):
                raise TimeoutError(f"no answer of the search within {timeout_s:g} s")
        finally:
            process.terminate()
            process.wait(30)
            server.shutdown()
            server.server_close()
    return [[group[0].partition("#")[0] for group in groups] for groups in handler.found]
