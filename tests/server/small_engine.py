"""The real desk, engine and ledger over a device without a model, whose steps run when they are let.

The next token is a hash of all before it, read back through blocks and slots (`tests.core.fake_device`), so one
misplaced block shows as another token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from headway import _core
from headway.aio import AsyncLLM
from headway.config import EngineConfig
from headway.engine.engine import Engine
from headway.request import SamplingParams
from headway.sampling.grammar import GrammarCompiler
from headway.sampling.limits import RequestLimits
from headway.text import IncrementalDetokenizer, Tokenizer
from tests.core.fake_device import FakeDevice, hash_token
from tests.server.fake_engine import ASSETS, VOCAB_SIZE

BLOCK_SIZE = 4
MAX_STEP_TOKENS = 16
EOS = 2
next_token = hash_token(VOCAB_SIZE)


def expected_tokens(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What a request gets, with ignore_eos."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Gate:
    """Steps wait here. Open at first; closed, as many pass as `let` allows."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = True
        self._num_allowed = 0
        self.num_waiting = 0

    def pass_one(self) -> None:
        with self._changed:
            self.num_waiting += not (self._is_open or self._num_allowed)
            self._changed.wait_for(lambda: self._is_open or self._num_allowed > 0)
            self._num_allowed = max(0, self._num_allowed - 1)
            self.num_waiting = 0

    def close(self) -> None:
        with self._changed:
            self._is_open, self._num_allowed = False, 0

    def let(self, num_steps: int) -> None:
        with self._changed:
            self._num_allowed += num_steps
            self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()


class GatedRunner:
    """A `StepRunner` over the fake device. `on_step` is called before each step, on the engine's thread."""

    def __init__(self, config: _core.LedgerConfig, step_s: float) -> None:
        self.gate = Gate()
        self.num_steps = 0
        self.on_step: Callable[[], None] = lambda: None
        self._device = FakeDevice(config, next_token)
        self._step_s = step_s

    def launch(self, plan: _core.Plan) -> None:
        self._device.launch(plan)

    def wait(self, is_ready: Callable[[], bool]) -> None:
        self.gate.pass_one()
        if self._step_s:
            time.sleep(self._step_s)
        self.on_step()
        self._device.run_one()
        self._device.packets.clear()
        self.num_steps += 1

    def close(self) -> None:
        self.gate.open()


class AnyToken:
    """A grammar that allows everything, once `gate` is open."""

    def __init__(self, gate: threading.Event) -> None:
        self._gate = gate

    def advance(self, token: int) -> None: ...

    def mask(self) -> np.ndarray:
        self._gate.wait(30)
        return np.full(VOCAB_SIZE // 32, 2**32 - 1, np.uint32)


class AnyTokenCompiler(GrammarCompiler):
    def __init__(self, gate: threading.Event) -> None:
        self._gate = gate

    def start(self, form: object) -> Any:
        return AnyToken(self._gate)


class SmallEngine(AsyncLLM):
    """An `AsyncLLM` over the device above, with the shipped model's tokenizer."""

    def __init__(
        self,
        *,
        max_rows: int = 8,
        max_waiting: int | None = None,
        launch_depth: int = 0,
        step_s: float = 0.0,
    ) -> None:
        self.config = EngineConfig()
        self.mask_gate = threading.Event()
        ledger_config = _core.LedgerConfig(
            max_rows=max_rows,
            num_blocks=64 * max_rows,
            block_size=BLOCK_SIZE,
            num_slots=max_rows,
            max_model_len=256,
            max_step_tokens=MAX_STEP_TOKENS + max_rows,
            vocab_size=VOCAB_SIZE,
            max_logprobs=5,
            max_launch_depth=launch_depth,
        )
        self.runner = GatedRunner(ledger_config, step_s)
        self.ledger = _core.Ledger(ledger_config)
        tokenizer = Tokenizer.from_dir(ASSETS)
        engine = Engine(
            self.ledger,
            self.runner,
            _limits(),
            make_detokenizer=lambda prompt, params: IncrementalDetokenizer(tokenizer, prompt),
            grammars=AnyTokenCompiler(self.mask_gate),
        )
        parts: Any = SimpleNamespace(
            engine=engine,
            tokenizer=tokenizer,
            chat_template=None,
            memory=SimpleNamespace(max_rows=max_rows, max_model_len=256, slot_bytes=0),
            model_config=SimpleNamespace(family="none", vocab_size=VOCAB_SIZE),
            device="cpu",
            dtype="float32",
            launch_depth=launch_depth,
            defaults=SimpleNamespace(params=SamplingParams()),
        )
        self._start(parts, max_waiting)

    async def close(self) -> None:
        """Lets everything go on first: a failed test must not leave a thread behind."""
        self.runner.gate.open()
        self.mask_gate.set()
        await super().close()

    def check_empty(self) -> None:
        """Nobody is left, and all memory is free."""
        self.ledger.check_integrity()
        stats = self.ledger.stats()
        assert (stats.num_waiting, stats.num_running, stats.num_held) == (0, 0, 0)
        assert stats.blocks_free == stats.blocks_total
        assert stats.slots_free == stats.slots_total
        assert not self._desk._tickets


def _limits() -> RequestLimits:
    return RequestLimits(
        vocab_size=VOCAB_SIZE,
        max_model_len=256,
        max_logprobs=5,
        max_stop_ids=_core.MAX_STOP_IDS,
        max_logit_bias=_core.MAX_LOGIT_BIAS,
        max_bad_word_entries=_core.MAX_BAD_WORD_ENTRIES,
        eos_token_ids=(EOS,),
    )
