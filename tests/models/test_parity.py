"""Every family against transformers and against the fp64 oracle: the same weights, the same logits, the same text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from headway.models.hybrid import HybridModel
from headway.models.invariance import why_variant
from headway.models.loader import LoadedParams, load_model, load_params
from tests.models.checkpoints import CASES, VOCAB, save_model, transformers
from tests.models.driver import generate
from tests.models.expert_log import ExpertLog
from tests.models.oracle import Choices, oracle_logits

NUM_NEW = 64
PROMPT_LENGTHS = (7, 1, 29, 18)
# relative to the largest logit; fp32 rounding leaves both within 1e-6 of the oracle
TOLERANCE = 1e-5
# relative to the mean logit, in the mean; the judge follows the experts that bfloat16 chose among near ties
BFLOAT16_TOLERANCE = 0.05


@dataclass(frozen=True)
class Pair:
    """The same checkpoint in transformers and in Headway."""

    folder: Path
    reference: Any
    loaded: LoadedParams
    prompts: list[list[int]]
    texts: list[list[int]]  # transformers' greedy continuations

    def oracle(self, tokens: list[int], choices: Choices | None = None) -> torch.Tensor:
        return oracle_logits(self.loaded.config, self.loaded.params, tokens, choices)

    def model(self) -> HybridModel:
        return HybridModel(self.loaded.config, dict(self.loaded.params))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param.name)
    reference = save_model(request.param, folder)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    texts = [continue_text(reference, prompt) for prompt in prompts]
    return Pair(folder, reference, load_params(folder, dtype="float32"), prompts, texts)


def continue_text(reference: Any, prompt: list[int]) -> list[int]:
    """Greedy and nothing else, whatever the checkpoint's generation_config.json suggests."""
    ids = torch.tensor([prompt])
    output = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=None,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def mean_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).abs().mean() / expected.double().abs().mean())


@pytest.mark.parametrize("chunk", [None, 5], ids=["whole", "chunked"])
@pytest.mark.parametrize("is_batched", [False, True], ids=["alone", "batched"])
def test_greedy_text_equals_transformers(pair: Pair, is_batched: bool, chunk: int | None) -> None:
    groups = [pair.prompts] if is_batched else [[prompt] for prompt in pair.prompts]
    model = pair.model()
    results = [result for group in groups for result in generate(model, group, NUM_NEW, chunk=chunk)]
    assert [result.tokens for result in results] == pair.texts


def test_logits_equal_transformers_and_oracle(pair: Pair) -> None:
    results = generate(pair.model(), pair.prompts, 8)
    for prompt, text, result in zip(pair.prompts, pair.texts, results, strict=True):
        assert result.tokens == text[:8]
        tokens = prompt + text[:7]
        with torch.no_grad():
            reference = pair.reference(torch.tensor([tokens])).logits[0]
        assert relative_error(result.logits, pair.oracle(tokens)) < TOLERANCE
        assert relative_error(result.logits, reference) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_device_and_dtype_stays_with_the_oracle(pair: Pair, device: str, dtype: torch.dtype) -> None:
    check_against_oracle(pair, load_model(pair.folder, dtype=dtype, device=device).model)


@pytest.mark.gpu
def test_batch_invariant_kernels_stay_with_the_oracle(pair: Pair) -> None:
    if lack := why_variant(pair.loaded.config, "cuda", torch.bfloat16):
        pytest.skip(lack)
    loaded = load_model(pair.folder, dtype=torch.bfloat16, device="cuda", is_batch_invariant=True)
    check_against_oracle(pair, loaded.model)


def check_against_oracle(pair: Pair, model: HybridModel) -> None:
    log = ExpertLog(model)
    for chunk in (None, 5):
        results = generate(model, pair.prompts, 4, chunk=chunk)
        for row, (prompt, result) in enumerate(zip(pair.prompts, results, strict=True), start=1):
            tokens, logits = prompt + result.tokens[:3], result.logits.cpu()
            if model.dtype == torch.float32:
                assert relative_error(logits, pair.oracle(tokens)) < TOLERANCE
            else:
                judge = pair.oracle(tokens, log.of_row(row, len(tokens)))
                assert mean_error(logits, judge) < BFLOAT16_TOLERANCE


def test_embedded_model_writes_the_same_text_as_transformers(tiny_model_dir: Path) -> None:
    """Weights that are trained, not drawn."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    reference.generation_config = transformers.GenerationConfig()  # the checkpoint's has a repetition penalty
    loaded = load_params(tiny_model_dir, dtype="float32")
    tokenizer = Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))
    prompt = tokenizer.encode("def read_json(path):\n    with open(").ids
    (result,) = generate(HybridModel(loaded.config, dict(loaded.params)), [prompt], NUM_NEW, chunk=5)
    assert result.tokens == continue_text(reference, prompt)
    judge = oracle_logits(loaded.config, loaded.params, prompt)
    assert relative_error(result.logits[: len(prompt)], judge) < TOLERANCE
