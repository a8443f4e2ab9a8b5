"""The server's end of a link as messages: many in a frame each way, and the loop's other work in between."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from headway.remote.link import Link
from headway.remote.messages import (
    MAX_SERVER_FRAME_BYTES,
    EngineMessage,
    Grown,
    ProtocolError,
    Seen,
    ServerMessage,
    engine_messages,
    to_frames,
)

MAX_HEARD_A_TURN = 16


class Conversation:
    """Tells the engine which frames were read: once all of a frame was heard.

    Args:
        on_message: called on the loop with what the engine says, in its order.
        on_nonsense: called instead for a frame that is no message.
        on_too_large: called for a message that could not be sent.
    """

    def __init__(
        self,
        link: Link,
        on_message: Callable[[EngineMessage], None],
        on_nonsense: Callable[[ProtocolError], None],
        on_too_large: Callable[[ServerMessage], None],
    ) -> None:
        self._link = link
        self._on_message = on_message
        self._on_nonsense = on_nonsense
        self._on_too_large = on_too_large
        self._outbox: list[ServerMessage] = []
        self._inbox: deque[EngineMessage | Seen] = deque()
        self._num_frames = 0
        self._has_sign_of_life = False
        self._has_ended = False

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._link.attach(loop, self._on_frame)

    def say(self, message: ServerMessage) -> None:
        """With all else that is said in this turn of the loop, in one frame."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self.flush)
        self._outbox.append(message)

    def flush(self) -> None:
        """Sends now what was said."""
        if not self._outbox or self._has_ended:
            return
        messages, self._outbox = self._outbox, []
        frames, too_large = to_frames(messages, MAX_SERVER_FRAME_BYTES)
        for message in too_large:
            self._on_too_large(message)
        for frame in frames:
            self._link.send(frame)

    def take_sign_of_life(self) -> bool:
        """Whether a frame has come since the last call."""
        found, self._has_sign_of_life = self._has_sign_of_life, False
        return found

    def hear_all(self) -> None:
        """All that has come so far, at once."""
        self._link.drain()
        while self._inbox:
            self._hear(self._inbox.popleft())

    def end(self) -> None:
        """Nothing more is said or heard."""
        self._has_ended = True
        self._outbox.clear()
        self._inbox.clear()

    def _on_frame(self, frame: bytes) -> None:
        if self._has_ended:
            return
        try:
            messages = engine_messages(frame)
        except ProtocolError as error:
            self._on_nonsense(error)
            return
        self._has_sign_of_life = True
        self._num_frames += 1
        is_hearing = bool(self._inbox)
        self._inbox += [*messages, Seen(self._num_frames)]
        if not is_hearing:
            self._hear_some()

    def _hear_some(self) -> None:
        """A frame may have news for hundreds of readers: the loop takes up other things between some and the next."""
        num_heard = 0
        while self._inbox and num_heard < MAX_HEARD_A_TURN:
            message = self._inbox.popleft()
            num_heard += len(message.growths) if isinstance(message, Grown) else 1
            self._hear(message)
        if self._inbox:
            asyncio.get_running_loop().call_soon(self._hear_some)

    def _hear(self, message: EngineMessage | Seen) -> None:
        if isinstance(message, Seen):
            self.say(message)
        else:
            self._on_message(message)
