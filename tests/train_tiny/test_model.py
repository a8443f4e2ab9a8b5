"""The training model: its scan against a plain loop, no token sees a later one, and what it exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.train_tiny.checkpoint import export_weights, load_checkpoint, save_checkpoint
from examples.train_tiny.evaluate import token_nats
from examples.train_tiny.model import TinyModel
from examples.train_tiny.settings import TinyShape
from examples.train_tiny.ssd import ssd

SMALL = replace(TinyShape(), pattern="ME*-M", hidden_size=64, mamba_heads=4, mamba_head_dim=32, chunk_size=16)


def _loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence as it is defined, a token at a time."""
    batch, num_tokens, num_heads, head_dim = x.shape
    B, C = (t.repeat_interleave(num_heads // B.shape[2], 2) for t in (B, C))
    state = x.new_zeros(batch, num_heads, head_dim, B.shape[-1])
    out = []
    for t in range(num_tokens):
        added = torch.einsum("bhp,bhn->bhpn", x[:, t] * dt[:, t, :, None], B[:, t])
        state = state * (dt[:, t] * A).exp()[..., None, None] + added
        out.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return torch.stack(out, 1)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("chunk_size", [4, 16, 64])
def test_scan_is_the_recurrence(num_tokens: int, chunk_size: int) -> None:
    batch, num_heads, head_dim, num_groups, state_size = 2, 4, 3, 2, 5
    x = torch.randn(batch, num_tokens, num_heads, head_dim, dtype=torch.float64)
    dt = torch.rand(batch, num_tokens, num_heads, dtype=torch.float64)
    A = -4 * torch.rand(num_heads, dtype=torch.float64)
    B, C = torch.randn(2, batch, num_tokens, num_groups, state_size, dtype=torch.float64)
    torch.testing.assert_close(ssd(x, dt, A, B, C, chunk_size), _loop(x, dt, A, B, C))


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 40])
def test_no_token_sees_a_later_one(cut: int) -> None:
    model = TinyModel(SMALL).eval()
    tokens = torch.randint(5, SMALL.vocab_size, (1, 50))
    changed = tokens.clone()
    changed[:, cut:] = (tokens[:, cut:] + 1) % SMALL.vocab_size
    with torch.no_grad():
        before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=0, atol=1e-5)
    assert (after[:, cut:] - before[:, cut:]).abs().max() > 1e-2


@pytest.mark.parametrize("length", [2, 31, 32, 33, 100])
def test_every_token_is_scored_once(length: int) -> None:
    """One window as long as the stream is the definition; shorter windows agree on what both see from the start."""
    model = TinyModel(SMALL).eval()
    stream = torch.randint(5, SMALL.vocab_size, (length,))
    with torch.no_grad():
        logp = model.logits(stream[None, :-1])[0].log_softmax(-1)
    expected = -logp.gather(1, stream[1:, None])[:, 0].double()
    torch.testing.assert_close(token_nats(model, stream, 128, 64)[1:], expected, rtol=1e-5, atol=1e-5)
    windowed = token_nats(model, stream, 32, 16, batch=2)
    torch.testing.assert_close(windowed[1:33], expected[:32], rtol=1e-5, atol=1e-5)
    assert (windowed[1:] > 0).all()


def test_export_keeps_every_weight(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = TinyModel(SMALL)
    save_checkpoint(model, tiny_model_dir, tmp_path)
    again = export_weights(load_checkpoint(tmp_path, SMALL))
    for name, weight in export_weights(model).items():
        assert torch.equal(again[name], weight), name


def test_transformers_computes_the_same(tmp_path: Path, tiny_model_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_checkpoint(TinyModel(SMALL), tiny_model_dir, tmp_path)
    judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(5, SMALL.vocab_size, (2, 40))
    with torch.no_grad():
        expected, logits = (
            judge(tokens, use_cache=False).logits,
            load_checkpoint(tmp_path, SMALL).logits(tokens),
        )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
