"""Types of the bookkeeping core (`csrc/core`, bound in `csrc/bind/core_module.cpp`).

Nothing here touches CUDA, torch or a tensor. Every call releases the GIL for its duration where it is long enough to
matter. Errors: `ValueError` subclasses raised from `headway.errors` types registered by `set_error_types`.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

MAX_STOP_IDS: Final[int]
MAX_LOGIT_BIAS: Final[int]
MAX_BAD_WORD_ENTRIES: Final[int]
PACKET_HEADER_BYTES: Final[int]
RESULT_HEADER_BYTES: Final[int]
ROW_SAMPLING_BYTES: Final[int]
RESULT_ROW_BYTES: Final[int]
STEP_ROW_BYTES: Final[int]
STATE_SNAPSHOT_BYTES: Final[int]
STATE_COPY_BYTES: Final[int]
ROW_REWIND_BYTES: Final[int]

# Why a request ended, as `Commit.finish_reasons` and `Ledger.finish` say it.
NOT_FINISHED: Final[int]
FINISH_STOP: Final[int]  # an end or stop token (the host reports stop strings with it too)
FINISH_LENGTH: Final[int]
FINISH_ABORT: Final[int]
FINISH_ERROR: Final[int]  # bad logits

class LedgerConfig:
    """Sizes of everything the ledger accounts for. Counts exclude the dummies at index 0, which it adds itself."""

    def __init__(
        self,
        *,
        max_rows: int,  # requests running at once
        num_blocks: int,  # KV blocks; 0 for a model without attention
        block_size: int,  # tokens a block
        num_slots: int,  # Mamba state slots; 0 for a model without Mamba layers
        max_model_len: int,  # tokens of one sequence
        max_step_tokens: int,  # tokens of one step
        vocab_size: int,
        max_logprobs: int,
        max_launch_depth: int = 0,  # steps in flight beyond the one the host waits for
        grant_ahead_blocks: int = 1,  # blocks granted before the boundary
        prompt_grid_tokens: int = 1,  # prompts are cut into steps at absolute multiples of it
        min_last_chunk_tokens: int = 1,  # of a prompt that is cut
        max_scored_tokens: int = 0,  # prompt tokens of a step whose logprobs are reported; 0: none may ask
        use_prefix_cache: bool = False,
        max_snapshots: int = 0,  # of the slots, those that cached states may hold
        max_waypoints: int = 0,  # of those, states on the way of prompts and outputs: they push out no others
        snapshot_stride_tokens: int = 0,  # between a prompt's waypoints, which lie closer near its ends; 0: none
        decode_snapshot_stride_tokens: int = 0,  # between an output's; 0: none
        weighs_snapshot_cost: bool = False,  # evict, of the oldest snapshots, the one that spares the fewest tokens
        caches_outputs: bool = True,  # False: a cached prompt has the bits of a computed one
        state_window: int = 0,  # tokens between rewrites of a Mamba state; 0: kept in place
        max_rewind: int = 0,  # positions that a row may go back; at least 1 with a window
        num_host_blocks: int = 0,  # of the prefix cache in host memory; 0 of a kind that the model has: no such tier
        num_host_slots: int = 0,
    ) -> None: ...
    max_rows: int
    num_blocks: int
    block_size: int
    num_slots: int
    max_model_len: int
    max_step_tokens: int
    vocab_size: int
    max_logprobs: int
    max_launch_depth: int
    grant_ahead_blocks: int
    prompt_grid_tokens: int
    min_last_chunk_tokens: int
    state_window: int
    max_rewind: int
    num_host_blocks: int
    num_host_slots: int
    max_scored_tokens: int
    @property
    def max_results(self) -> int:
        """Sampled rows and scored tokens of one step."""
    @property
    def mask_words(self) -> int:
        """32-bit words of a token mask: one bit a token of the vocabulary."""
    use_prefix_cache: bool
    max_snapshots: int
    max_waypoints: int
    snapshot_stride_tokens: int
    decode_snapshot_stride_tokens: int
    weighs_snapshot_cost: bool
    caches_outputs: bool
    @property
    def prefix_unit_tokens(self) -> int:
        """Prefixes are cached at multiples of it (and where a sequence ended); no shorter one is."""
    @property
    def max_packet_snapshots(self) -> int:
        """States that one step's prompt chunks may leave."""
    @property
    def max_packet_copies(self) -> int:
        """States that one step may copy."""
    @property
    def max_blocks_per_row(self) -> int:
        """Columns of the block table; at least 1."""
    @property
    def packet_ring_bytes(self) -> int: ...
    @property
    def result_ring_bytes(self) -> int: ...
    @property
    def result_entry_bytes(self) -> int:
        """One entry of the result ring, laid out for max_rows rows (the dummy has none)."""

class SamplingSpec:
    """What `RowSampling` holds (see `csrc/core/step_layout.h`), plus the lists that go with it."""

    def __init__(
        self,
        *,
        seed: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        min_tokens: int = 0,
        num_logprobs: int = -1,
        num_prompt_logprobs: int = -1,
        has_processed_logprobs: bool = False,  # of what is sampled from, not of the model's logits
        is_guided: bool = False,  # nothing is sampled before set_token_mask, at every position anew
        stop_ids: list[int] = ...,
        logit_bias: dict[int, float] = ...,
        bad_words: list[list[int]] = ...,  # token sequences that are never completed
        token_mask: npt.NDArray[np.uint32] = ...,  # [mask_words] what may be sampled; empty: anything
    ) -> None: ...

class Plan:
    """One step to launch. Attributes are constants of the step; the packet lives until the step is committed."""

    step: int
    num_rows: int  # R
    num_decode_rows: int
    num_sampled: int
    num_tokens: int  # T
    max_query_len: int  # tokens of the longest row of this step
    max_kv_len: int  # upper bound of the rows' KV length after this step
    num_snapshots: int  # states that prompt chunks leave beside the rows' own
    num_scored: int  # prompt tokens whose logprobs are reported
    num_admitted: int  # requests that got a row in this step, for the first time or again
    num_copies: int  # states to copy before the layers run
    packet_address: int  # 0: nothing new, no copy
    packet_bytes: int
    copies_offset: int  # where the packet has the copies
    result_address: int  # ring entry the step publishes to

class Commit:
    """What one retired step changed. Arrays share index i; void results (rows already finished) are left out."""

    step: int
    request_ids: npt.NDArray[np.int64]  # [n]
    tokens: npt.NDArray[np.int32]  # [n] -1 where finish_reasons is FINISH_ERROR
    finish_reasons: npt.NDArray[np.int32]  # [n] NOT_FINISHED while the request goes on
    stop_tokens: npt.NDArray[np.int32]  # [n] the stop id that ended the request, -1 if none
    cached_tokens: npt.NDArray[np.int32]  # [n] of the request's prompt, those found in the prefix cache
    logprobs: npt.NDArray[np.float32]  # [n]
    ranks: npt.NDArray[np.int32]  # [n]
    top_ids: npt.NDArray[np.int32]  # [n, max_logprobs] -1 where unused
    top_logprobs: npt.NDArray[np.float32]  # [n, max_logprobs]
    # Prompt tokens that were scored: m of them, in the order of their positions for each request.
    score_request_ids: npt.NDArray[np.int64]  # [m]
    score_tokens: npt.NDArray[np.int32]  # [m]
    score_logprobs: npt.NDArray[np.float32]  # [m]
    score_ranks: npt.NDArray[np.int32]  # [m]
    score_top_ids: npt.NDArray[np.int32]  # [m, max_logprobs] -1 where unused
    score_top_logprobs: npt.NDArray[np.float32]  # [m, max_logprobs]
    begin_ns: int
    end_ns: int

class Stats:
    num_waiting: int
    num_running: int
    num_paused: int
    num_held: int  # of the running and waiting ones, those that lack a token mask for their next position
    blocks_total: int
    blocks_free: int
    blocks_fenced: int
    slots_total: int
    slots_free: int
    slots_fenced: int
    steps_launched: int
    steps_committed: int
    num_evictions: int
    num_finished: int
    num_transfers: int  # between device and host memory, not finished

class PrefixStats:
    """What the prefix cache holds and did. Requests are counted at their first admission, unless they opted out.

    A lookup is a hit or a miss for one reason, the first that holds in the order given here.
    """

    num_lookups: int
    num_hits: int  # requests that start behind their first token
    num_prompt_tokens: int
    num_cached_tokens: int  # of those, not computed
    num_waits: int  # requests that let others pass until a running prompt had left their prefix
    num_too_short: int  # misses: the prompt is shorter than what can be cached
    num_pending: int  # a running prompt was about to leave some of it, too little to wait for
    num_without_snapshot: int  # KV is there, but no state
    num_other_salt: int  # it is there under another salt
    num_without_kv: int
    num_blocks: int  # that the cache holds, some with running requests
    num_evictable_blocks: int  # with nobody: as good as free
    num_snapshots: int
    num_waypoints: int  # of those, kept on the way
    num_snapshots_taken: int
    num_evicted_blocks: int
    num_evicted_snapshots: int  # those moved to host memory are not
    num_host_blocks: int  # of the host tier, as all below; zeros where there is none
    num_host_snapshots: int
    num_saved_blocks: int  # moved to host memory
    num_saved_snapshots: int
    num_loaded_blocks: int  # and brought back
    num_loaded_snapshots: int
    num_host_hits: int  # of the hits, those that start where only host memory had what they need

class Transfer:
    """Copies between device and host memory."""

    @property
    def is_out(self) -> bool: ...  # from the device to host memory
    @property
    def blocks(self) -> npt.NDArray[np.int32]: ...  # [n, 2] source, target
    @property
    def slots(self) -> npt.NDArray[np.int32]: ...  # [m, 2] likewise

class Ledger:
    """The host's truth: rows, blocks, slots, the plan of each step and the commit of its results.

    The rings' memory may be given (pinned, `packet_ring_bytes` and `result_ring_bytes` large, 64-byte aligned); with
    address 0 the ledger allocates plain memory.
    """

    def __init__(
        self, config: LedgerConfig, packet_ring_address: int = 0, result_ring_address: int = 0
    ) -> None: ...
    def add(
        self,
        prompt: npt.NDArray[np.int32],
        sampling: SamplingSpec,
        *,
        max_new_tokens: int,
        priority: int = 0,  # lower runs first, as in vLLM
        salt: bytes = b"",
        uses_cache: bool = True,
    ) -> int:
        """Queues a request and returns its id. Raises CapacityError if it can never fit, RequestError on bad ids.

        The prefix cache shows it only what requests of the same salt left, and nothing when `uses_cache` is false;
        it then leaves nothing either.
        """

    def plan(self) -> Plan | None:
        """Plans and accounts for the next step; None when nothing can run or max_launch_depth + 1 are in flight."""

    def is_ready(self) -> bool:
        """True when the oldest launched step's results are in the ring."""

    def commit(self) -> Commit | None:
        """Retires the oldest launched step; None when none is in flight or its results are not there yet.

        Raises IntegrityError when host and device disagree; the ledger is unusable afterwards.
        """

    def next_transfer(self) -> Transfer | None:
        """What to copy between device and host memory, beside the steps; None: nothing more.

        Copies out run in this order, and so do copies back; neither waits for the other. Asked for after each
        plan(), whether or not that planned a step.
        """

    def finish_transfer(self, is_out: bool) -> None:
        """The oldest that was begun, out or back, is done."""

    def abort(self, request_id: int) -> bool:
        """Ends a request wherever it is; False when it is unknown or already over."""

    def finish(self, request_id: int, num_output_tokens: int) -> bool:
        """The host's own stop (a stop string): keeps the first num_output_tokens outputs and ends the request."""

    def set_token_mask(self, request_id: int, num_tokens: int, mask: npt.NDArray[np.uint32]) -> bool:
        """What a guided request may sample after num_tokens tokens: bit v % 32 of word v / 32 stands for token v.

        False when it is over, not guided or has another length. Raises RequestError for a mask of another size or one
        that allows nothing.
        """

    def pause(self, request_id: int) -> bool:
        """Stops planning the request; it keeps its row, blocks and slot.

        Under pressure it gives way to requests of its priority or above, and is then recomputed after resume().
        """

    def resume(self, request_id: int) -> bool: ...
    def evict(self, request_id: int) -> bool:
        """Takes the request's memory back; it waits at the head of its priority and is recomputed."""

    def rewind(self, request_id: int, num_positions: int) -> bool:
        """Drops what is in flight of a request and its last num_positions committed outputs; it goes on from there.

        False when it is over. Raises RequestError, and then changes nothing, where its KV or state cannot go back so
        far: the first output stays, and state kept in place goes back by nothing that was launched.
        """

    def admitted_requests(self) -> list[int]:
        """Ids of the requests that got a row in the last plan() and still hold it."""

    def output_tokens(self, request_id: int) -> npt.NDArray[np.int32]:
        """[n] committed outputs. Those of a request that is over are kept until the next plan(); then RequestError."""
    @property
    def num_in_flight(self) -> int: ...
    @property
    def has_unfinished(self) -> bool: ...
    def stats(self) -> Stats: ...
    def free_slots(self) -> list[int]:
        """State slots that nobody holds and no launched step names, ascending."""

    def prefix_stats(self) -> PrefixStats: ...
    def reset_prefix_cache(self) -> None:
        """No later request finds what is cached now, or what running ones compute."""
    def check_integrity(self) -> None:
        """Raises IntegrityError naming the first broken invariant."""

    def check_mirror(self, mirror: tuple[int, ...]) -> None:
        """Raises IntegrityError naming the first field of the device's mirror that is not as the host has it.

        mirror: sizes and addresses in the order of DeviceMirror, of a copy in host memory. The device has run every
        launched step.
        """

def append_each(lists: list[list[int]], tokens: npt.NDArray[np.int32]) -> None:
    """lists[i].append(tokens[i]) for all i; tokens [n] int32.

    Raises ValueError or TypeError, changing nothing, where there are not as many lists as tokens.
    """

def run_checks(filter: str = "") -> list[tuple[str, bool, str]]:
    """Runs the C++ checks of `csrc/tests` whose name contains filter: (name, passed, message)."""

def check_names() -> list[str]: ...
def set_error_types(request_error: type, capacity_error: type, integrity_error: type) -> None:
    """Python exception types that the core raises; called once by `headway.errors`' importer."""
