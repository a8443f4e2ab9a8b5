"""Text of outputs, made by the server: the engine's process passes token ids on and has no time for more."""

from __future__ import annotations

from collections.abc import Sequence

from headway.server.client import EngineRequest
from headway.text import IncrementalDetokenizer, Tokenizer


class OutputText:
    """Turns the token ids of one request's completions into text as they come."""

    def __init__(self, tokenizer: Tokenizer, request: EngineRequest) -> None:
        params = request.params
        self._hides_stop_token = not params.include_stop_str_in_output
        self._detokenizers = [
            IncrementalDetokenizer(
                tokenizer,
                request.prompt_token_ids,
                params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
            for _ in range(params.n)
        ]

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, request: EngineRequest) -> OutputText | None:
        """None where the engine makes the text: it looks for stop strings in it, for what follows one must not be
        computed on, and it names tokens beside their log-probabilities.
        """
        params = request.params
        wants_text = tokenizer is not None and params.detokenize and not params.stop_strings
        if not wants_text or params.logprobs is not None or params.prompt_logprobs is not None:
            return None
        assert tokenizer is not None
        return cls(tokenizer, request)

    def extend(self, index: int, token_ids: Sequence[int]) -> str:
        """Text that tokens of a completion add."""
        return self._detokenizers[index].extend(token_ids)

    def end(self, index: int, token_ids: Sequence[int], finish_reason: str) -> str:
        """`extend` for a completion's last tokens, and all that is held."""
        if finish_reason == "stop" and self._hides_stop_token:
            token_ids = token_ids[:-1]  # without stop strings nothing but a stop token ends like this
        return self.extend(index, token_ids) + self._detokenizers[index].finish()
