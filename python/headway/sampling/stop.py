"""Stop strings over streamed text: nothing that might still become part of a stop string is let out."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until one of `stops` appears in it.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, stops: Sequence[str], *, is_included: bool) -> None:
        self._stops = tuple(stops)
        self._is_included = is_included
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Takes new text, returns what can be shown. After a match nothing more comes out."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = self._first_match(text)
        if found is not None:
            begin, self.matched = found
            self._held = ""
            return text[: begin + len(self.matched)] if self._is_included else text[:begin]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What is still held when the text ends without a match."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """Leftmost match; of several that begin there, the shortest."""
        found = [(text.find(stop), len(stop), stop) for stop in self._stops if stop in text]
        if not found:
            return None
        begin, _, stop = min(found)
        return begin, stop

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
