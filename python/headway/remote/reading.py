"""What has come for one request and was not read yet. A slow reader finds fewer and larger outputs."""

from __future__ import annotations

import asyncio

from headway.errors import HeadwayError
from headway.remote.messages import Output
from headway.remote.output_text import OutputText
from headway.remote.records import joined, to_engine_output
from headway.server.client import EngineOutput, EngineRequest

MAX_TOKENS_A_TURN = 1024  # of a whole answer's text; then the loop goes round: others wait too
MAX_PARTS = 64  # kept apart; more are joined, so that what waits weighs little beyond its own tokens


class Reading:
    """One request's outputs on their way to its reader, on one event loop.

    Attributes:
        number: what the engine knows the request by.
        text: what makes its text here; None where the engine does.
        has_ended: the engine has nothing more for it.
        is_over: its reader has all of it.
    """

    def __init__(self, number: int, request: EngineRequest, text: OutputText | None) -> None:
        self.number = number
        self.request_id = request.request_id
        self.text = text
        self.has_ended = False
        self.is_over = False
        self._num_open = request.params.n
        self._error: HeadwayError | None = None
        self._parts: dict[int, list[Output]] = {}  # by completion
        self._held_ids: dict[int, list[int]] = {}  # by completion: tokens without text so far
        self._usage = (0, 0, 0)  # tokens of the prompt, of all outputs, of the prompt found cached
        self._waiter: asyncio.Future[None] | None = None  # of the reader, where it waits

    def grow(self, token_ids: list[int]) -> None:
        """Tokens of the only completion, which goes on."""
        num_prompt_tokens, num_output_tokens, num_cached_tokens = self._usage
        num_output_tokens += len(token_ids)
        self.add(
            Output(self.number, 0, "", token_ids, num_prompt_tokens, num_output_tokens, num_cached_tokens)
        )

    def add(self, output: Output) -> None:
        self._usage = (output.num_prompt_tokens, output.num_output_tokens, output.num_cached_tokens)
        parts = self._parts.setdefault(output.index, [])
        parts.append(output)
        if len(parts) >= MAX_PARTS:
            parts[:] = [joined(parts)]
        if output.finish_reason is not None:
            self._num_open -= 1
            self.has_ended = self._num_open == 0
        self._wake()

    def fail(self, error: HeadwayError) -> None:
        """Its reader gets what has come and then the error, unless all had come."""
        if not self.has_ended:
            self.has_ended = True
            self._error = error
            self._wake()

    async def take(self) -> list[EngineOutput]:
        """Waits for news; may be empty. Sets `is_over` with the last of them; raises what ended the request early."""
        if not self._parts:
            if self._error is None:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            if not self._parts:
                raise self._taken_error()
        parts, self._parts = self._parts, {}
        self.is_over = self.has_ended and self._error is None
        if self.text is None:
            return [to_engine_output(self.request_id, joined(found)) for found in parts.values()]
        outputs = []
        for found in parts.values():
            output = to_engine_output(self.request_id, joined(found))
            token_ids = output.token_ids
            if len(token_ids) > MAX_TOKENS_A_TURN:
                token_ids = await self._begin_text(self.text, output)
            if self._end_text(self.text, output, token_ids):
                outputs.append(output)
        return outputs

    async def _begin_text(self, text: OutputText, output: EngineOutput) -> list[int]:
        """Adds the text of all but the last tokens, in turns. Returns those that are left."""
        begin = 0
        while len(output.token_ids) - begin > MAX_TOKENS_A_TURN:
            output.text += text.extend(output.index, output.token_ids[begin : begin + MAX_TOKENS_A_TURN])
            begin += MAX_TOKENS_A_TURN
            await asyncio.sleep(0)
        return output.token_ids[begin:]

    def _end_text(self, text: OutputText, output: EngineOutput, token_ids: list[int]) -> bool:
        """Adds the text of its last tokens. False while there is none to show, such as half a character: the tokens
        wait with it.
        """
        index, reason = output.index, output.finish_reason
        if reason is not None:
            output.text += text.end(index, token_ids, reason)
        else:
            output.text += text.extend(index, token_ids)
        if self._held_ids:
            output.token_ids = self._held_ids.pop(index, []) + output.token_ids
        if output.text or reason is not None:
            return True
        self._held_ids[index] = output.token_ids
        return False

    def _taken_error(self) -> HeadwayError:
        """Kept no longer: with its traceback it would keep every frame up to the reader's, in a cycle."""
        error, self._error = self._error, None
        assert error is not None
        return error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
