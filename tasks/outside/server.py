"""Owns the HTTP of the outside world: paths, status codes, and how a fault feels to a caller."""

from __future__ import annotations

import json
import select
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tasks.outside import bank
from tasks.outside.book import Book
from tasks.outside.faults import Fault, Faults
from tasks.outside.rules import RULES, Refusal

VERBS = {"PUT": "do", "DELETE": "undo", "GET": "find"}


class Server(ThreadingHTTPServer):
    """The outside world on a port of 127.0.0.1; with port 0 on a free one."""

    daemon_threads = True
    block_on_close = False  # a caller whose answer is held back would keep us here

    def __init__(self, log: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.book = Book(log)
        self.faults = Faults()

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Server:
        """Serve in a thread until the block ends."""
        threading.Thread(target=self.serve_forever, args=(0.01,), name="outside", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()
        self.book.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_PUT(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: the book has everything that happened."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path = [unquote(part) for part in url.path.strip("/").split("/")]
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        match [self.command, *path]:
            case ["PUT", "faults", name]:
                self.server.faults.set(name, Fault(**body))
                self._answer(200, {})
            case ["DELETE", "faults"]:
                self.server.faults.clear()
                self._answer(200, {})
            case ["GET", "feeds", account]:
                query = {name: int(values[0]) for name, values in parse_qs(url.query).items()}
                self._meet("feeds", "page", account, {}, lambda: bank.page(account, query["cursor"], query["limit"]))
            case ["GET", kind] if kind in RULES:
                self._answer(200, {"records": [record.as_json() for record in self.server.book.of(kind)]})
            case [method, kind, key] if kind in RULES:
                self._meet(kind, VERBS[method], key, body, lambda: self._turn(method, kind, key, body))
            case _:
                self._answer(404, {"reason": "path", "sentence": f"There is no {url.path} here."})

    def _turn(self, method: str, kind: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
        book = self.server.book
        if method == "PUT":
            return book.do(kind, key, body)
        if method == "DELETE":
            book.undo(kind, key)
        record = book.find(kind, key)
        return {"key": key, "state": "unknown"} if record is None else record.as_json()

    def _meet(self, kind: str, verb: str, key: str, body: dict[str, Any], act: Any) -> None:
        """Act and answer, with the faults that this request meets."""
        known = self.server.book.find(kind, key)
        faults = self.server.faults.met_by(kind, verb, key, json.dumps(body or (known.body if known else {})))
        by_what = {fault.what: fault for fault in faults}
        if "slow" in by_what:
            time.sleep(by_what["slow"].seconds)  # and the caller may have gone when it happens
        if "error" in by_what:
            return self._answer(500, {"reason": "error", "sentence": "Something went wrong here."})
        try:
            status, answer = 200, act()
        except Refusal as no:
            status, answer = no.status, {"reason": no.reason, "sentence": no.sentence}
        if "forgets" in by_what:
            self.server.book.forget(kind, key)
        if "lost" in by_what:
            select.select([self.connection], [], [], by_what["lost"].seconds)  # readable when the caller hangs up
            self.close_connection = True
            return None
        return self._answer(status, answer)

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:  # the caller gave up meanwhile; what happened has happened
            self.close_connection = True
