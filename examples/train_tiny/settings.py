"""The shape of the tiny model and the knobs of its training. Knows no tensors and no files."""

from __future__ import annotations

from dataclasses import dataclass

PAD, BOS, EOS, TURN_START, TURN_END = "<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, TURN_START, TURN_END)  # ids 0..4, in this order
VOCAB_SIZE = 2048


@dataclass(frozen=True)
class TinyShape:
    """A Nemotron-H stack: M = Mamba-2, * = attention, - = MLP, E = MoE; letters as in docs/shapes.md."""

    pattern: str = "MEM*M-MEM*M-"
    mtp_pattern: str = "*E"
    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 256
    max_position: int = 8192
    norm_eps: float = 1e-5
    mamba_heads: int = 8
    mamba_head_dim: int = 64
    mamba_groups: int = 2
    state_size: int = 64
    conv_width: int = 4
    chunk_size: int = 64
    attention_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp_size: int = 768
    num_experts: int = 8
    experts_per_token: int = 2
    expert_size: int = 128
    shared_expert_size: int = 256
    routed_scale: float = 2.5

    @property
    def d_inner(self) -> int:
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.mamba_groups * self.state_size

    @property
    def in_proj_dim(self) -> int:
        """Columns of in_proj: z, x, B, C, dt."""
        return self.d_inner + self.conv_dim + self.mamba_heads


@dataclass(frozen=True)
class TrainSettings:
    """One training run. It ends at `seconds` of wall time or after `epochs`, whichever is first."""

    seconds: float = 240.0
    epochs: float = 20.0
    context: int = 4096
    batch_tokens: int = 65536
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    mtp_weight: float = 0.2
    warmup_steps: int = 60
    router_bias_step: float = 1e-3
    log_every: int = 50
    dev_every: int = 250
    seed: int = 20
    compile: bool = False
