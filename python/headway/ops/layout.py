"""The plain-data records of csrc/core/step_layout.h as numpy dtypes, field for field."""

from __future__ import annotations

from typing import Final

import numpy as np

MAX_STOP_IDS: Final = 64
MAX_LOGIT_BIAS: Final = 512
MAX_BAD_WORD_ENTRIES: Final = 1024
HAS_TOKEN_MASK: Final = 1
PROCESSED_LOGPROBS: Final = 2

ROW_SAMPLING: Final = np.dtype(
    [
        ("seed", np.uint64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("prompt_len", np.int32),
        ("min_total_len", np.int32),
        ("max_total_len", np.int32),
        ("num_stop_ids", np.int32),
        ("num_logit_bias", np.int32),
        ("num_logprobs", np.int32),
        ("num_prompt_logprobs", np.int32),
        ("num_bad_words", np.int32),
        ("num_bad_word_tokens", np.int32),
        ("flags", np.int32),
        ("reserved", np.int32),
    ]
)

PACKET_HEADER: Final = np.dtype(
    [
        ("step", np.int64),
        ("num_rows", np.int32),
        ("num_decode_rows", np.int32),
        ("num_sampled", np.int32),
        ("num_tokens", np.int32),
        ("num_inits", np.int32),
        ("num_words", np.int32),
        ("num_grants", np.int32),
        ("num_prompt_tokens", np.int32),
        ("num_snapshots", np.int32),
        ("num_copies", np.int32),
        ("num_rewinds", np.int32),
        ("num_masks", np.int32),
        ("num_scored", np.int32),
        ("inits_offset", np.uint32),
        ("words_offset", np.uint32),
        ("grants_offset", np.uint32),
        ("rows_offset", np.uint32),
        ("tokens_offset", np.uint32),
        ("snapshots_offset", np.uint32),
        ("copies_offset", np.uint32),
        ("rewinds_offset", np.uint32),
        ("mask_rows_offset", np.uint32),
        ("mask_bits_offset", np.uint32),
        ("scores_offset", np.uint32),
        ("num_bytes", np.uint32),
        ("reserved", np.int32),
    ]
)

ROW_INIT: Final = np.dtype(
    [
        ("row", np.int32),
        ("slot", np.int32),
        ("words_begin", np.int32),
        ("reserved", np.int32),
        ("sampling", ROW_SAMPLING),
    ]
)

BLOCK_GRANT: Final = np.dtype([("row", np.int32), ("index", np.int32), ("block", np.int32)])

STEP_ROW: Final = np.dtype(
    [
        ("row", np.int32),
        ("start", np.int32),
        ("num_tokens", np.int32),
        ("prompt_begin", np.int32),
        ("read_slot", np.int32),
        ("num_history", np.int32),
    ]
)

STATE_SNAPSHOT: Final = np.dtype(
    [("row_index", np.int32), ("position", np.int32), ("slot", np.int32), ("reserved", np.int32)]
)

STATE_COPY: Final = np.dtype(
    [("src_slot", np.int32), ("dst_slot", np.int32), ("position", np.int32), ("reserved", np.int32)]
)

ROW_REWIND: Final = np.dtype(
    [("row", np.int32), ("num_computed", np.int32), ("last_token", np.int32), ("reserved", np.int32)]
)

SCORED_TOKEN: Final = np.dtype(
    [("token_index", np.int32), ("row", np.int32), ("target", np.int32), ("reserved", np.int32)]
)

RESULT_ROW: Final = np.dtype(
    [
        ("row", np.int32),
        ("token", np.int32),
        ("logprob", np.float32),
        ("rank", np.int32),
        ("is_stopped", np.int32),
        ("is_bad", np.int32),
    ]
)

RESULT_HEADER: Final = np.dtype(
    [
        ("step", np.int64),
        ("begin_ns", np.int64),
        ("end_ns", np.int64),
        ("num_sampled", np.int32),
        ("num_scored", np.int32),
        ("reserved", np.int32, (8,)),
    ]
)

STEP_COUNTER: Final = np.dtype(
    [("step", np.int64), ("begin_ns", np.int64), ("num_live", np.int32), ("num_sampled", np.int32)]
)
