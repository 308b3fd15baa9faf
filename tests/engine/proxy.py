"""A TCP proxy that can be cut: how tests take a database or a broker away without stopping it.

Owns two kinds of failure: `cut` (nobody answers, open connections break) and `swallow` (what is asked reaches the
server, and the connection breaks before the answer does).
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit, urlunsplit


class Proxy:
    """Forward a local port to the server of a URL, until it is told otherwise."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._server = (self._parts.hostname or "127.0.0.1", self._parts.port or 0)
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._servers: set[socket.socket] = set()
        self._swallow: Callable[[bytes], bool] | None = None
        self.swallowed = 0
        self._port = 0
        self._listener: socket.socket | None = None
        self._closed = False
        self.restore()
        threading.Thread(target=self._serve, name="proxy", daemon=True).start()

    @property
    def url(self) -> str:
        """The URL that leads through this proxy."""
        user = self._parts.netloc.rpartition("@")[0]
        netloc = f"{user}@127.0.0.1:{self._port}" if user else f"127.0.0.1:{self._port}"
        return urlunsplit(self._parts._replace(netloc=netloc))

    def cut(self) -> None:
        """Refuse connections, and break those that are open."""
        with self._lock:
            listener, self._listener = self._listener, None
            if listener is not None:
                self._selector.unregister(listener)
                listener.close()
            for end in list(self._peers):
                self._drop(end)

    def restore(self) -> None:
        """Answer again, on the same port."""
        with self._lock:
            self._swallow = None
            if self._listener is None:
                listener = socket.socket()
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", self._port))
                listener.listen(64)
                self._port = listener.getsockname()[1]
                self._selector.register(listener, selectors.EVENT_READ)
                self._listener = listener

    def swallow(self, asked: Callable[[bytes], bool]) -> None:
        """Deliver the next data for which `asked` is true, and break that connection once the server has answered."""
        with self._lock:
            self.swallowed = 0
            self._swallow = asked

    def close(self) -> None:
        self.cut()
        self._closed = True

    def _serve(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(0.05):
                with self._lock:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj in self._peers:
                        self._forward(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        assert self._listener is not None
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._server, timeout=2.0)
        except OSError:
            client.close()
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.settimeout(2.0)
            self._selector.register(end, selectors.EVENT_READ)
        self._peers[client], self._peers[server] = server, client
        self._servers.add(server)

    def _forward(self, end: socket.socket) -> None:
        peer = self._peers[end]
        try:
            data = end.recv(65536)
            if not data:
                raise ConnectionResetError
            peer.sendall(data)
        except OSError:
            self._drop(end)
            return
        if end not in self._servers and self._swallow is not None and self._swallow(data):
            self._swallow = None
            with contextlib.suppress(OSError):
                peer.settimeout(10.0)
                peer.recv(65536)  # the answer: the server has done what it was asked
            self.swallowed += 1
            self._drop(end)

    def _drop(self, end: socket.socket) -> None:
        peer = self._peers.pop(end, None)
        for each in (end, peer):
            if each is not None:
                self._peers.pop(each, None)
                self._servers.discard(each)
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(each)
                each.close()
