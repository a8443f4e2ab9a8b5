"""`headway bench latency --plot`: steady decode steps of each recording on one scale, and how idle the GPU was."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from headway.engine.perfetto import Recording
from headway.engine.timeline import STAGES, Column, Timeline
from headway.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_SHOWN = 5  # steps of the slowest recording; the others show as much time
LEGEND = {"collect": "collect (waiting for the GPU)"}
# After Okabe and Ito: told apart by colour-blind eyes too, and in print.
STAGE_COLOURS = dict(zip(STAGES, ("#E69F00", "#D55E00", "#D9D9D9", "#009E73", "#CC79A7"), strict=True))
STEP_COLOURS = ("#0072B2", "#56B4E9")  # in turn: a border shows even where there is no gap
CPU_LANE, GPU_LANE = (1.1, 0.8), (0.1, 0.8)  # y and height


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib", hint="pip install 'headway[bench]'")


def draw(path: Path, recordings: Sequence[Recording], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.6 + 1.9 * len(recordings)), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(len(recordings), 2, width_ratios=(5, 1))
    steady = [Recording(recording.name, recording.timeline.steady()) for recording in recordings]
    shown_us = NUM_SHOWN * max(_period_us(recording.timeline) for recording in steady)
    for index, recording in enumerate(steady):
        lanes = figure.add_subplot(grid[index, 0])
        _draw_lanes(lanes, recording, shown_us)
        if index == len(steady) - 1:
            lanes.set_xlabel("time (us)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _draw_shares(figure.add_subplot(grid[:, 1]), steady)
    figure.savefig(path, dpi=150)


def _draw_lanes(axes: Axes, recording: Recording, shown_us: float) -> None:
    timeline = recording.timeline
    begin_ns = int(timeline.steps.seen_ns[len(timeline) // 2])
    spans = timeline.spans
    for stage, name in enumerate(STAGES):
        of_stage = spans.of(stage)
        bars = _bars(of_stage.begin_ns, of_stage.end_ns, begin_ns, shown_us)
        axes.broken_barh(list(bars), CPU_LANE, color=STAGE_COLOURS[name], label=LEGEND.get(name, name))
    for parity, colour in enumerate(STEP_COLOURS):
        for begins_ns, ends_ns in _device_times(timeline):
            bars = _bars(begins_ns[parity::2], ends_ns[parity::2], begin_ns, shown_us)
            label = "step on the GPU" if parity == 0 else None
            axes.broken_barh(list(bars), GPU_LANE, color=colour, label=label)
    axes.set(xlim=(0, shown_us), ylim=(0, 2))
    axes.set_title(_summary(recording), fontsize="medium")
    axes.set_yticks([0.5, 1.5], ["GPU", "CPU"])


def _draw_shares(axes: Axes, recordings: Sequence[Recording]) -> None:
    """A device without a clock has no bar."""
    shares = [recording.timeline.figures().idle_share for recording in recordings]
    percents = [100 * share if share is not None else float("nan") for share in shares]
    names = [recording.name.replace(", ", "\n") for recording in recordings]
    bars = axes.bar(names, percents, color=STEP_COLOURS[0], width=0.5)
    axes.margins(x=0.2)
    axes.bar_label(bars, [f"{percent:.1f} %" if percent == percent else "" for percent in percents])
    axes.set(ylabel="GPU idle share (%)", ylim=(0, max(1.0, 1.2 * float(np.nanmax([0.0, *percents])))))


def _device_times(timeline: Timeline) -> Iterator[tuple[Column, Column]]:
    if timeline.clock is not None:
        yield timeline.clock.to_host(timeline.steps.begin_ns), timeline.clock.to_host(timeline.steps.end_ns)


def _bars(
    begins_ns: Column, ends_ns: Column, origin_ns: int, shown_us: float
) -> Iterator[tuple[float, float]]:
    """(left, width) in microseconds of what lies in the picture."""
    begins_us, ends_us = (begins_ns - origin_ns) / 1e3, (ends_ns - origin_ns) / 1e3
    is_shown = (ends_us > 0) & (begins_us < shown_us)
    yield from zip(begins_us[is_shown], (ends_us - begins_us)[is_shown], strict=True)


def _summary(recording: Recording) -> str:
    figures = recording.timeline.figures()
    parts = [f"{recording.name}: {_period_us(recording.timeline):.0f} us a step"]
    if figures.busy_us_median is not None:
        parts.append(f"GPU busy {figures.busy_us_median:.0f} us")
    return ", ".join([*parts, f"CPU busy {figures.host_us_median:.0f} us"])


def _period_us(timeline: Timeline) -> float:
    return float(np.median(np.diff(timeline.steps.seen_ns))) / 1e3
