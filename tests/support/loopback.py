"""A server of plain files on the loopback, which counts, stalls and pauses."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DEAD = "http://127.0.0.1:9/"  # the discard port, where nobody listens


class Loopback(ThreadingHTTPServer):
    """Serves bytes by their paths on 127.0.0.1, counts requests, and can stall on purpose.

    With `stall_after` set, each answer stops after so many bytes of its body (and at 0 before its
    first header) until `go_on` is set. With `pause` set, it comes in eight parts, so many seconds
    apart.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = files
        self.requests: Counter[str] = Counter()
        self.stall_after: int | None = None
        self.pause = 0.0
        self.stalled, self.go_on = threading.Event(), threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up, or are killed, are part of the tests


class _Answer(BaseHTTPRequestHandler):
    server: Loopback

    def do_GET(self) -> None:
        server = self.server
        server.requests[self.path] += 1
        body = server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        if server.stall_after == 0:
            self._stall()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.stall_after is not None:
            self.wfile.write(body[: server.stall_after])
            self._stall()
            body = body[server.stall_after :]
        size = -(-len(body) // 8) if server.pause else len(body)
        for start in range(0, len(body), size or 1):
            time.sleep(server.pause)
            self.wfile.write(body[start : start + size])

    def _stall(self) -> None:
        self.server.stalled.set()
        self.server.go_on.wait()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def loopback(files: dict[str, bytes]) -> Iterator[Loopback]:
    """A `Loopback` server with these files."""
    with Loopback(files) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()


Serve = Callable[[dict[str, bytes]], Loopback]
