"""Recorded steps as trace-event JSON, which ui.perfetto.dev and chrome://tracing open.

One process a recording; in it a CPU lane with the stages of each step, a GPU lane with the steps, an arrow from each
launch to its step, and counters of what is queued and of how idle the GPU was.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headway.engine.timeline import NO_STEP, STAGES, Column, DeviceClock, Steps, Timeline

CPU_LANE, GPU_LANE = 1, 2
Event = dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """Steps of one engine, and what to call them."""

    name: str
    timeline: Timeline


def write_timeline(path: Path, recordings: Sequence[Recording], title: str) -> None:
    path.write_text(trace_json(recordings, title), encoding="utf-8")


def trace_json(recordings: Sequence[Recording], title: str) -> str:
    """One JSON object and a newline."""
    events = [
        event
        for process, recording in enumerate(recordings, start=1)
        for event in _events(process, recording, title)
    ]
    figures = {r.name: r.timeline.steady().figures().asdict() for r in recordings}
    text = json.dumps(
        {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"title": title, "steady": figures}}
    )
    return text + "\n"


def _events(process: int, recording: Recording, title: str) -> Iterator[Event]:
    timeline = recording.timeline
    origin_ns = int(timeline.spans.begin_ns[0])
    yield _name(process, 0, "process_name", f"{recording.name}: {title}")
    lanes = [_name(process, CPU_LANE, "thread_name", "CPU"), *_host_spans(timeline)]
    if timeline.clock is not None:
        lanes += [_name(process, GPU_LANE, "thread_name", "GPU")]
        lanes += _device_spans(timeline.steps, timeline.clock)
        lanes += _counters(timeline, timeline.clock)
    for event in lanes:
        if "ts" in event:
            event["ts"] = _us(event["ts"] - origin_ns)
        if "id" in event:
            event["id"] = f"{process}.{event['id']}"  # arrows of two processes must not meet
        yield {"pid": process, **event}


def _name(process: int, lane: int, kind: str, name: str) -> Event:
    return {"ph": "M", "pid": process, "tid": lane, "name": kind, "args": {"name": name}}


def _host_spans(timeline: Timeline) -> Iterator[Event]:
    spans = timeline.spans
    for stage, step, begin_ns, end_ns in _rows(spans.stage, spans.step, spans.begin_ns, spans.end_ns):
        args = {"step": step} if step != NO_STEP else {"step": "nothing to launch"}
        yield _span(CPU_LANE, STAGES[stage], begin_ns, end_ns, args)


def _device_spans(steps: Steps, clock: DeviceClock) -> Iterator[Event]:
    begins_ns, ends_ns = clock.to_host(steps.begin_ns), clock.to_host(steps.end_ns)
    sizes = _rows(steps.step, steps.num_rows, steps.num_decode_rows, steps.num_tokens)
    times = _rows(begins_ns, ends_ns, steps.launch_begin_ns)
    for (step, num_rows, num_decode, num_tokens), (begin_ns, end_ns, launch_ns) in zip(
        sizes, times, strict=True
    ):
        kind = "decode" if num_rows == num_decode else "mixed" if num_decode else "prefill"
        yield _span(GPU_LANE, kind, begin_ns, end_ns, {"step": step, "rows": num_rows, "tokens": num_tokens})
        arrow = {"cat": "launch", "name": "launch", "id": step}
        yield {"ph": "s", "tid": CPU_LANE, "ts": launch_ns, **arrow}
        yield {"ph": "f", "bp": "e", "tid": GPU_LANE, "ts": begin_ns, **arrow}


def _counters(timeline: Timeline, clock: DeviceClock) -> Iterator[Event]:
    steps = timeline.steps
    begins_ns, ends_ns = clock.to_host(steps.begin_ns), clock.to_host(steps.end_ns)
    changes = [(moment, 1) for moment in steps.launch_begin_ns.tolist()]
    changes += [(moment, -1) for moment in ends_ns.tolist()]
    changes.sort()
    depths = itertools.accumulate(change for _, change in changes)
    for (moment, _), depth in zip(changes, depths, strict=True):
        yield {"ph": "C", "name": "queue depth", "ts": moment, "args": {"steps": depth}}
    gaps_us = timeline.gaps_us()
    percents = 100 * gaps_us / (gaps_us + (steps.end_ns - steps.begin_ns)[1:] / 1e3)
    for moment, percent in zip(begins_ns[1:].tolist(), np.round(percents, 2).tolist(), strict=True):
        yield {"ph": "C", "name": "GPU idle share", "ts": moment, "args": {"%": percent}}


def _span(lane: int, name: str, begin_ns: int, end_ns: int, args: dict[str, Any]) -> Event:
    return {
        "ph": "X",
        "tid": lane,
        "name": name,
        "ts": begin_ns,
        "dur": _us(end_ns - begin_ns),
        "args": args,
    }


def _rows(*columns: Column) -> Iterator[tuple[int, ...]]:
    return zip(*(column.tolist() for column in columns), strict=True)


def _us(nanoseconds: int) -> float:
    return round(nanoseconds / 1e3, 3)
