"""One end of the socket between a server and its engine's process: whole frames in order, within a cap.

Knows what a frame may weigh and no more of it. Over a Unix socket alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import zmq

MAX_FRAMES_A_TURN = 32  # then the loop goes round: others wait too


class Link:
    """The engine's end has one peer. The server's end has a door that anybody of the same user may knock at while the
    engine starts: `peer` is the one to listen to, once it is known.

    Attributes:
        num_strangers: frames that came from somebody else.
    """

    def __init__(self, socket: zmq.Socket[bytes], *, has_door: bool) -> None:
        self._socket = socket
        self._descriptor = cast(int, socket.get(zmq.FD))
        self._has_door = has_door
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_frame: Callable[[bytes], None] = lambda frame: None
        self.peer: bytes | None = None
        self.num_strangers = 0

    @classmethod
    def bound(cls, context: zmq.Context[zmq.Socket[bytes]], address: str, max_frame_bytes: int) -> Link:
        """The server's. A frame above max_frame_bytes costs its sender the connection."""
        socket = _socket(context, zmq.ROUTER, max_frame_bytes)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.bind(address)
        return cls(socket, has_door=True)

    @classmethod
    def connected(cls, context: zmq.Context[zmq.Socket[bytes]], address: str, max_frame_bytes: int) -> Link:
        """The engine's."""
        socket = _socket(context, zmq.DEALER, max_frame_bytes)
        socket.connect(address)
        return cls(socket, has_door=False)

    def receive(self) -> tuple[bytes, bytes] | None:
        """Who and what, of the next frame; None while there is none. Never waits."""
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            sender = parts[0] if self._has_door else b""
            if len(parts) == 1 + self._has_door and self.peer in (None, sender):
                return sender, parts[-1]
            self.num_strangers += 1

    def wait(self, timeout_s: float) -> bool:
        """Whether something came within the time."""
        return bool(self._socket.poll(round(1e3 * timeout_s)))

    def send(self, frame: bytes) -> None:
        """Never waits. A frame for a peer that has gone is dropped."""
        try:
            if self._has_door:
                assert self.peer is not None
                self._socket.send_multipart([self.peer, frame], zmq.NOBLOCK)
            else:
                self._socket.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
        # Sending may take the notice that something came: the descriptor is edge-triggered.
        if self._loop is not None and cast(int, self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._read)

    def attach(self, loop: asyncio.AbstractEventLoop, on_frame: Callable[[bytes], None]) -> None:
        """From now on frames go to on_frame, on the loop."""
        self._loop, self._on_frame = loop, on_frame
        loop.add_reader(self._descriptor, self._read)
        loop.call_soon(self._read)

    def drain(self) -> None:
        """Hands over all that has come so far."""
        while (found := self.receive()) is not None:
            self._on_frame(found[1])

    def close(self, linger_s: float = 0.0) -> None:
        """Legal twice. Frames on their way have so long to leave."""
        if self._socket.closed:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)
        self._loop = None
        self._socket.close(linger=round(1e3 * linger_s))

    def _read(self) -> None:
        for _ in range(MAX_FRAMES_A_TURN):
            if self._socket.closed or (found := self.receive()) is None:
                return
            self._on_frame(found[1])
        if self._loop is not None:
            self._loop.call_soon(self._read)


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, max_frame_bytes: int) -> zmq.Socket[bytes]:
    """Sending never blocks: how much may be on its way is counted by those who send."""
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.set(zmq.MAXMSGSIZE, max_frame_bytes)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.LINGER, 0)
    return socket
