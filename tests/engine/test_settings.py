"""Settings and sampling parameters: one declaration each, refusals that name parameter, value and limit."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.config import EngineConfig, render_settings
from headway.errors import ConfigError, ModelLoadError, RequestError
from headway.fields import specs
from headway.request import SamplingParams, one_per_prompt, prompt_list, prompt_parts
from headway.sampling.defaults import read_generation_defaults
from headway.sampling.seeds import SeedSource, completion_seed

ROOT = Path(__file__).parents[2]
NAN = float("nan")


def test_the_settings_page_is_rendered_from_the_declaration() -> None:
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == render_settings()


@pytest.mark.parametrize("owner", [EngineConfig, SamplingParams])
def test_every_field_is_declared_with_help(owner: type) -> None:
    declared = specs(owner)
    assert list(declared) == [f.name for f in dataclasses.fields(owner)]
    assert all(spec.help for spec in declared.values())


@pytest.mark.parametrize("owner", [EngineConfig, SamplingParams])
def test_numbers_refuse_nan_and_both_ends(owner: type) -> None:
    error = ConfigError if owner is EngineConfig else RequestError
    for name, spec in specs(owner).items():
        if spec.kind == "float":
            with pytest.raises(error, match=name):
                owner(**{name: NAN})
        if spec.low is not None:
            with pytest.raises(error, match=name):
                owner(**{name: spec.low if spec.is_low_open else spec.low - 1})
        if spec.high is not None:
            with pytest.raises(error, match=name):
                owner(**{name: spec.high + 1})
        with pytest.raises(error, match=name):
            owner(**{name: object()})


@pytest.mark.parametrize(
    ("keywords", "parameter"),
    [
        ({"stop": [""]}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"stop": "x", "detokenize": False}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"logit_bias": {1: NAN}}, "logit_bias"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 101}}, "logit_bias"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"n": True}, "n"),
        ({"min_tokens": 17}, "min_tokens"),
    ],
)
def test_sampling_refusals(keywords: dict[str, object], parameter: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**keywords)
    assert caught.value.parameter == parameter


def test_unknown_names_get_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="snapshot_memory_bytes says it, in bytes"):
        EngineConfig(mamba_cache_gb=4)
    with pytest.raises(RequestError, match="did you mean max_tokens") as caught:
        SamplingParams(max_new_tokens=5)
    assert caught.value.parameter == "max_new_tokens"
    with pytest.raises(ConfigError, match="did you mean max_model_len"):
        EngineConfig(max_len=5)


def test_params_are_values() -> None:
    params = SamplingParams(stop="x", n=2, logit_bias={3: 1.0})
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, n=3).n == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 4


def test_greedy_and_tiny_temperatures() -> None:
    assert SamplingParams(temperature=1e-6).effective_temperature == 0.0
    assert SamplingParams(temperature=1e-3).effective_temperature == 0.01
    assert SamplingParams(temperature=0.5).effective_temperature == 0.5


def test_steps_must_hold_a_token_of_every_row() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        EngineConfig(max_num_seqs=64, max_num_batched_tokens=32)


def test_prompt_forms() -> None:
    assert prompt_list("a") == ["a"]
    assert prompt_list([1, 2]) == [[1, 2]]
    assert prompt_list([[1, 2], "a"]) == [[1, 2], "a"]
    assert prompt_list({"prompt": "a"}) == [{"prompt": "a"}]
    assert prompt_list([]) == []
    assert prompt_list(torch.tensor([1, 2])) == prompt_list(np.array([[1, 2]])) == [[1, 2]]  # type: ignore[arg-type]
    for bad in (b"ab", torch.tensor(3)):
        with pytest.raises(RequestError):
            prompt_list(bad)  # type: ignore[arg-type]
    with pytest.raises(RequestError):
        prompt_parts({"prompt": 5, "prompt_token_ids": [1]})  # type: ignore[arg-type]
    with pytest.raises(RequestError):
        prompt_list(3)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="one per prompt"):
        one_per_prompt("sampling_params", [SamplingParams()] * 2, 3)


def test_seeds_repeat_and_spread() -> None:
    first, again = SeedSource(7), SeedSource(7)
    assert [first.draw() for _ in range(3)] == [again.draw() for _ in range(3)]
    seeds = {completion_seed(seed, index) for seed in range(50) for index in range(20)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert completion_seed(2**64 - 1, 0) == 2**64 - 1


def write_generation_config(folder: Path, content: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")


def test_checkpoint_defaults_are_applied_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_generation_config(
        tmp_path, {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 99, "eos_token_id": [1, 2]}
    )
    with caplog.at_level(logging.INFO, logger="headway"):
        defaults = read_generation_defaults(tmp_path, is_applied=True)
    assert (defaults.params.temperature, defaults.params.top_p, defaults.params.max_tokens) == (0.6, 0.95, 99)
    assert defaults.eos_token_ids == (1, 2)
    assert len(caplog.records) == 1
    assert "temperature=0.6" in caplog.text
    assert "--generation-config none" in caplog.text


def test_defaults_can_be_declined_but_not_the_end_token(tmp_path: Path) -> None:
    write_generation_config(tmp_path, {"temperature": 0.6, "eos_token_id": 3})
    defaults = read_generation_defaults(tmp_path, is_applied=False)
    assert defaults.params == SamplingParams()
    assert defaults.eos_token_ids == (3,)


@pytest.mark.parametrize("content", [[1], {"temperature": "hot"}, {"top_p": 7}, {"eos_token_id": "a"}])
def test_malformed_defaults_name_the_file(tmp_path: Path, content: object) -> None:
    write_generation_config(tmp_path, content)
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        read_generation_defaults(tmp_path, is_applied=True)
