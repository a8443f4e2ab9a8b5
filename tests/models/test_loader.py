"""From files to weights: packing, sharding, dtypes, random weights, and errors that name what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headway.errors import ConfigError, ModelLoadError
from headway.models.caches import ModelCaches, cache_bytes
from headway.models.hybrid import model_specs, weight_bytes
from headway.models.loader import load_model, load_params
from headway.models.registry import config_from_dict, read_model_config
from headway.ops.state_log import IN_PLACE, StateWindow
from tests.models.checkpoints import VOCAB, case_named, save_model
from tests.models.driver import Driver, generate

SHAPES = Path(__file__).parents[2] / "bench" / "models"
PROMPT = [5, 17, 99, 3, 42]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(case_named("nemotron_h"), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors by name (dots written as __); None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def logits_of(folder: Path, **options: Any) -> torch.Tensor:
    return generate(load_model(folder, dtype="float32", **options).model, [PROMPT], 2)[0].logits


def test_shards_load_like_one_file(saved: Path, tmp_path: Path) -> None:
    save_model(case_named("nemotron_h"), tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits_of(tmp_path), logits_of(saved))


def test_progress_reaches_the_size_of_the_weights(saved: Path) -> None:
    seen: list[tuple[int, int]] = []
    loaded = load_model(saved, dtype="float32", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (weight_bytes(loaded.config, torch.float32),) * 2
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["nemotron_h", "granite_moe", "qwen3_moe", "mamba2"])
def test_weight_bytes_are_those_of_the_loaded_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(case_named(name), tmp_path)
    loaded = load_params(tmp_path, dtype=dtype)
    actual = sum(tensor.numel() * tensor.itemsize for tensor in loaded.params.values())
    assert weight_bytes(loaded.config, dtype) == actual
    assert loaded.params["embedding"].dtype == dtype


def test_bfloat16_stays_close_to_float32(saved: Path) -> None:
    exact = logits_of(saved)
    rounded = generate(load_model(saved, dtype="bfloat16").model, [PROMPT], 2)[0].logits
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_dtype_auto_is_the_checkpoints(saved: Path) -> None:
    assert load_model(saved).model.dtype == torch.float32


def test_recurrent_parameters_stay_in_float32(saved: Path) -> None:
    params = load_params(saved, dtype="bfloat16").params
    kept = {name.split(".")[-1] for name, tensor in params.items() if tensor.dtype == torch.float32}
    assert kept == {"A", "D", "dt_bias", "router", "score_bias"}


def test_weights_of_multi_token_prediction_are_left_out(folder: Path) -> None:
    expected = logits_of(folder)
    edit_tensors(folder, mtp__layers__0__enorm__weight=torch.ones(48))
    assert torch.equal(logits_of(folder), expected)


def test_newer_prefix_of_the_trunk_is_understood(folder: Path) -> None:
    expected = logits_of(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("backbone.", "model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    assert torch.equal(logits_of(folder), expected)


def test_tied_head_that_is_stored_twice_loads(tmp_path: Path) -> None:
    save_model(case_named("qwen3"), tmp_path)
    expected = logits_of(tmp_path)
    edit_tensors(tmp_path, lm_head__weight=torch.zeros(VOCAB, 48))
    assert torch.equal(logits_of(tmp_path), expected)


def test_missing_tensor_is_named_with_its_shape(folder: Path) -> None:
    edit_tensors(folder, backbone__layers__0__mixer__D=None)
    with pytest.raises(ModelLoadError, match=r"lacks tensors: backbone\.layers\.0\.mixer\.D \[4\]"):
        load_model(folder)


def test_missing_head_says_how_to_tie_it(folder: Path) -> None:
    edit_tensors(folder, lm_head__weight=None)
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight .*tie_word_embeddings: true"):
        load_model(folder)


def test_renamed_tensor_is_found_by_its_likeness(folder: Path) -> None:
    edit_tensors(folder, backbone__norm_f__weight=None, backbone__norm_g__weight=torch.ones(48))
    with pytest.raises(ModelLoadError, match=r"norm_f\.weight.*closest present: backbone\.norm_g\.weight"):
        load_model(folder)


def test_extra_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, backbone__layers__0__mixer__lora=torch.ones(2))
    with pytest.raises(
        ModelLoadError, match=r"NemotronHForCausalLM does not: backbone\.layers\.0\.mixer\.lora"
    ):
        load_model(folder)


def test_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    edit_tensors(folder, backbone__layers__1__mixer__q_proj__weight=torch.ones(48, 64))
    with pytest.raises(ModelLoadError, match=r"q_proj\.weight is \[48, 64\], expected \[64, 48\]"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_tensor_that_needs_scales_is_refused(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, backbone__layers__1__mixer__q_proj__weight=torch.ones(64, 48, dtype=dtype))
    with pytest.raises(ModelLoadError, match=r"q_proj\.weight is (I8|F8_E4M3)"):
        load_model(folder)


def test_long_lists_of_wrong_tensors_are_cut(folder: Path) -> None:
    edit_config(folder, hidden_size=56)
    with pytest.raises(ModelLoadError, match=r"and \d+ more"):
        load_model(folder)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/model.safetensors", "model.bin"])
def test_shard_outside_the_folder_is_refused(folder: Path, shard: str) -> None:
    index = {"weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="not a safetensors file of the folder"):
        load_model(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"model-00002\.safetensors', which is missing"):
        load_model(folder)


def test_damaged_file_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is not a readable safetensors file"):
        load_model(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pickled weights only.*safe_serialization"):
        load_model(folder)


def test_folder_without_weights_points_to_dummy_ones(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="load_format 'dummy'"):
        load_model(folder)


def test_remote_code_is_never_run(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    load_model(folder)


@pytest.mark.parametrize(
    ("option", "value"), [("load_format", "pickle"), ("dtype", "int8"), ("dtype", torch.int8)]
)
def test_wrong_option_is_named(saved: Path, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{option} must be .*int8|{option} must be .*'pickle'"):
        load_model(saved, **{option: value})  # type: ignore[arg-type]


def test_dummy_weights_need_only_the_configuration_and_repeat(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**case_named("nemotron_h").settings, "model_type": "nemotron_h"})
    )
    first, again = (logits_of(tmp_path, load_format="dummy") for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, logits_of(tmp_path, load_format="dummy", seed=1))


@pytest.mark.parametrize(
    "name", ["nemotron-nano-9b-v2", "nemotron-3-nano-30b-a3b", "granite-4.0-h-tiny", "mamba2-2.7b"]
)
def test_dummy_activations_stay_of_order_one_at_full_depth(name: str, tmp_path: Path) -> None:
    """The published depth and pattern at a narrow width, in bfloat16."""
    values = json.loads((SHAPES / f"{name}.json").read_text())
    narrow = {
        "vocab_size": 512,
        "hidden_size": 96,
        "mamba_num_heads": 8,
        "mamba_n_heads": 12,
        "mamba_d_head": 16,
        "num_heads": 12,
        "head_dim": 16,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "mamba_d_state": 16,
        "state_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64,
        "shared_intermediate_size": 64,
        "n_routed_experts": 16,
        "num_local_experts": 16,
    }
    values |= {key: value for key, value in narrow.items() if key in values}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = load_model(tmp_path, dtype="bfloat16", load_format="dummy").model
    driver = Driver(model)
    (logits,) = driver.step([(driver.add_row(), list(range(40)))])
    assert torch.isfinite(logits).all()
    assert 0.1 < logits.std() * model.config.logits_divisor < 20
    assert model._scratch[40].residual.float().std() < 50


def test_cache_bytes_are_those_of_the_allocated_caches() -> None:
    config = config_from_dict({**case_named("nemotron_h").settings, "model_type": "nemotron_h"})
    for dtype, window, ssm_dtype in (
        (torch.float32, IN_PLACE, torch.float32),
        (torch.bfloat16, IN_PLACE, torch.float16),
        (torch.bfloat16, StateWindow(16, 3), torch.float32),
        (torch.bfloat16, StateWindow(16, 3), torch.float16),
    ):
        sizes = cache_bytes(config, 16, dtype, window, ssm_dtype)
        caches = ModelCaches.allocate(config, 5, 16, 3, dtype, "cpu", window, ssm_dtype)
        assert len(caches.state_log) == (config.count("mamba") if window.num_tokens else 0)
        assert caches.num_bytes == 5 * sizes.per_block + 3 * sizes.per_slot
        assert all(state.dtype == ssm_dtype and not state.any() for state in caches.ssm_state)
        assert all(
            tensor.dtype == dtype and not tensor.any() for tensor in (*caches.conv_state, *caches.keys)
        )


@pytest.mark.parametrize(
    ("name", "billions", "slot_bytes", "token_bytes"),
    [
        ("nemotron-nano-9b-v2", 8.888, 143_548_416, 16384),
        ("nemotron-3-nano-30b-a3b", 31.578, 49_082_368, 6144),
        ("mamba2-2.7b", 2.703, 169_836_544, 0),
    ],
)
def test_published_shapes_have_their_published_sizes(
    name: str, billions: float, slot_bytes: int, token_bytes: int
) -> None:
    config = read_model_config(SHAPES / f"{name}.json")
    num_params = sum(spec.numel for spec in model_specs(config).values())
    assert num_params / 1e9 == pytest.approx(billions, abs=1e-3)
    sizes = cache_bytes(config, 16, torch.bfloat16)
    assert (sizes.per_slot, sizes.per_block) == (slot_bytes, 16 * token_bytes)
