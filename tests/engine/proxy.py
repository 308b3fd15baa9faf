"""A TCP proxy that misbehaves when it is told to: how tests take a server away, or its answers, without stopping it.

Owns these failures: `cut` (nobody answers, open connections break), `reset` (open connections break, new ones are
welcome), `hang` (half-open: connections stay, and nothing passes), `mute` (the same for those that are open, while new
ones are welcome), `lose` (packets vanish below TCP), `delay` (everything comes late), and `swallow` (what is asked
reaches the server, and the connection breaks before the answer does).
"""

from __future__ import annotations

import contextlib
import ctypes
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from urllib.parse import urlsplit, urlunsplit

from tests.ports import free_port

_RST = struct.pack("ii", 1, 0)  # closing with this tells the peer at once, and rudely
_SO_ATTACH_FILTER = 26  # Linux; Python has no name for it


class Proxy:
    """Forward a local port to the server of a URL, until it is told otherwise."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._server = (self._parts.hostname or "127.0.0.1", self._parts.port or 0)
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._servers: set[socket.socket] = set()
        self._mute: set[socket.socket] = set()
        self._late: deque[tuple[float, socket.socket, bytes]] = deque()
        self._delay_s = 0.0
        self._hangs = False
        self._loss = 0.0
        self._swallow: Callable[[bytes], bool] | None = None
        self._swallow_times = 0
        self.swallowed = 0
        self._port = free_port()
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

    def lead_to(self, url: str) -> None:
        """Forward connections that are opened from now on to another server."""
        parts = urlsplit(url)
        with self._lock:
            self._server = (parts.hostname or "127.0.0.1", parts.port or 0)

    def cut(self) -> None:
        """Refuse connections, and break those that are open."""
        with self._lock:
            listener, self._listener = self._listener, None
            if listener is not None:
                self._selector.unregister(listener)
                listener.close()
            self._drop_all()

    def reset(self) -> int:
        """Break the connections that are open, in the way of a peer that crashed; returns how many there were."""
        with self._lock:
            count = len(self._servers)
            for end in list(self._peers):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
            self._drop_all()
        return count

    def hang(self) -> None:
        """Let nothing pass any more, and tell nobody: connections stay open, and new ones are let in."""
        with self._lock:
            self._hangs = True

    def mute(self) -> int:
        """Let nothing pass any more over the connections that are open; returns how many there were.

        What is sent over them is taken and acknowledged, and never answered.
        """
        with self._lock:
            self._mute |= set(self._peers)
            return len(self._servers)

    def lose(self, share: float) -> None:
        """Let the kernel drop so much, from 0 to 1, of all packets that come here, acknowledgements too; tell nobody.

        Other than with `hang`, nobody at either end can tell this proxy from one that has lost its power.
        """
        with self._lock:
            self._loss = share
            for end in self._peers:
                _lose(end, share)

    def delay(self, seconds: float) -> None:
        """Let everything pass, so much later."""
        with self._lock:
            self._delay_s = seconds

    def restore(self) -> None:
        """Answer again, on the same port; what hung is broken, as a router does that has forgotten it."""
        with self._lock:
            if self._hangs or self._loss:
                self._drop_all()
            self._swallow, self._hangs, self._loss, self._delay_s = None, False, 0.0, 0.0
            if self._listener is None:
                listener = socket.socket()
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", self._port))
                listener.listen(64)
                self._selector.register(listener, selectors.EVENT_READ)
                self._listener = listener

    def swallow(self, asked: Callable[[bytes], bool], times: int = 1) -> None:
        """Deliver data for which `asked` is true, and break that connection once the server has answered."""
        with self._lock:
            self.swallowed = 0
            self._swallow, self._swallow_times = asked, times

    def close(self) -> None:
        self.cut()
        self._closed = True

    def _serve(self) -> None:
        while not self._closed:
            ready = self._selector.select(0.002 if self._late else 0.05)
            with self._lock:
                self._send_late()
                if self._hangs:
                    ready = [item for item in ready if item[0].fileobj is self._listener]
                    time.sleep(0.0 if ready else 0.02)
                for key, _ in ready:
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
            if self._loss:
                _lose(end, self._loss)
            self._selector.register(end, selectors.EVENT_READ)
        self._peers[client], self._peers[server] = server, client
        self._servers.add(server)

    def _forward(self, end: socket.socket) -> None:
        peer = self._peers[end]
        try:
            data = end.recv(65536)
            if not data:
                raise ConnectionResetError
            if end in self._mute:
                return
            if self._delay_s:
                self._late.append((time.monotonic() + self._delay_s, peer, data))
                return
            peer.sendall(data)
        except OSError:
            self._drop(end)
            return
        if end not in self._servers and self._swallow is not None and self._swallow(data):
            self._swallow_answer(end, peer)

    def _swallow_answer(self, end: socket.socket, peer: socket.socket) -> None:
        self.swallowed += 1
        if self.swallowed >= self._swallow_times:
            self._swallow = None
        with contextlib.suppress(OSError):
            peer.settimeout(10.0)
            peer.recv(65536)  # the answer: the server has done what it was asked
        self._drop(end)

    def _send_late(self) -> None:
        while self._late and self._late[0][0] <= time.monotonic():
            _, peer, data = self._late.popleft()
            if peer in self._peers:
                try:
                    peer.sendall(data)
                except OSError:
                    self._drop(peer)

    def _drop_all(self) -> None:
        for end in list(self._peers):
            self._drop(end)

    def _drop(self, end: socket.socket) -> None:
        peer = self._peers.pop(end, None)
        for each in (end, peer):
            if each is not None:
                self._peers.pop(each, None)
                self._servers.discard(each)
                self._mute.discard(each)
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(each)
                each.close()


def _lose(end: socket.socket, share: float) -> None:
    """Let a filter in the kernel drop packets before TCP sees them, each by a throw of the dice."""
    instructions = [
        (0x20, 0, 0, 0xFFFFF000 + 56),  # load a random number
        (0x35, 1, 0, min(int(share * 2**32), 2**32 - 1)),  # skip the next instruction if it is as large as this
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFFFFFF),  # take all of it
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
    end.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(instructions), ctypes.addressof(program))
    )
