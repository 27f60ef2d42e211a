"""A plain file server behind a bad radio: every second answer breaks off in the middle.

`python lossy.py FOLDER` says its address in a line. Nobody trusts it:
what it serves is signed, and a download goes on where it broke off.
"""

from __future__ import annotations

import itertools
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def handler(folder: Path) -> type[BaseHTTPRequestHandler]:
    """Answers GET with files below `folder`, by ranges."""
    numbers = itertools.count()

    class Lossy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            file = (folder / self.path.lstrip("/")).resolve()
            if not (file.is_relative_to(folder) and file.is_file()):
                self.send_error(404)
                return
            content, said = file.read_bytes(), self.headers.get("Range", "")
            start = int(said.removeprefix("bytes=").removesuffix("-")) if said else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            rest = content[start:]
            self.wfile.write(rest[: len(rest) // 2 if next(numbers) % 2 else len(rest)])
            self.close_connection = True

        def log_message(self, *said: object) -> None:
            """Nothing: the device says what broke off."""

    return Lossy


def main(folder: str) -> None:
    """Serve until it is ended."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(Path(folder).resolve()))
    sys.stdout.write(f"http://127.0.0.1:{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
