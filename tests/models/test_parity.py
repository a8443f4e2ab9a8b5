"""Every family against transformers and against the fp64 oracle: the same weights, the same logits, the same text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from headway.models.hybrid import HybridModel
from headway.models.loader import LoadedParams, load_params
from tests.models.checkpoints import CASES, VOCAB, save_model
from tests.models.driver import generate
from tests.models.oracle import oracle_logits

NUM_NEW = 64
PROMPT_LENGTHS = (7, 1, 29, 18)
# relative to the largest logit; fp32 rounding leaves both within 1e-6 of the oracle
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Pair:
    """The same checkpoint in transformers and in Headway."""

    reference: Any
    loaded: LoadedParams
    model: HybridModel
    prompts: list[list[int]]
    texts: list[list[int]]  # transformers' greedy continuations


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param.name)
    reference = save_model(request.param, folder)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    texts = [_continue(reference, prompt) for prompt in prompts]
    loaded = load_params(folder, dtype="float32")
    model = HybridModel(loaded.config, dict(loaded.params))
    return Pair(reference, loaded, model, prompts, texts)


def _continue(reference: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("chunk", [None, 5], ids=["whole", "chunked"])
@pytest.mark.parametrize("is_batched", [False, True], ids=["alone", "batched"])
def test_greedy_text_equals_transformers(pair: Pair, is_batched: bool, chunk: int | None) -> None:
    groups = [pair.prompts] if is_batched else [[prompt] for prompt in pair.prompts]
    results = [result for group in groups for result in generate(pair.model, group, NUM_NEW, chunk=chunk)]
    assert [result.tokens for result in results] == pair.texts


def test_logits_equal_transformers_and_oracle(pair: Pair) -> None:
    results = generate(pair.model, pair.prompts, 8)
    for prompt, text, result in zip(pair.prompts, pair.texts, results, strict=True):
        tokens = prompt + text[:7]
        with torch.no_grad():
            reference = pair.reference(torch.tensor([tokens])).logits[0]
        judge = oracle_logits(pair.loaded.config, pair.loaded.params, tokens)
        assert _relative_error(result.logits, judge) < TOLERANCE
        assert _relative_error(result.logits, reference) < TOLERANCE
