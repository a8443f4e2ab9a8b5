"""What recorded steps say: both lanes on one clock, and how busy the device was. Knows no engine and no file format.

Two clocks that never meet. The device stamps begin and end of a step with its own clock (nanoseconds, resolution
tens of them); the host reads `time.perf_counter_ns`. Nothing synchronises them, but every step bounds their offset
from both sides: its results are seen after it ended, and it begins after its launch was begun,

    launch_begin - begin  <=  host clock - device clock  <=  seen - end.

The least of the right sides over a block of steps is the offset there: a waiting host sees results microseconds after
they are written. Offsets are interpolated between blocks, since the clocks drift. So device spans are drawn late, if
anything, never early; by how much at most, `DeviceClock.error_ns` says, the distance of the two bounds where they are
closest. Busy times and gaps are differences on the device's own clock and know nothing of all this.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.int64]
Table = npt.NDArray[np.int64]  # [records, fields]
NO_STEP = -1  # of a plan that found nothing to launch
STAGES = ("plan", "launch", "collect", "commit", "outputs")
BLOCK_STEPS = 64  # milliseconds, in which clocks drift by nanoseconds, with many waits among them
NUM_RAGGED = 2  # steps at each end of a run of equal ones that a neighbour may have touched


@dataclass(frozen=True)
class Spans:
    """What the host did, in order. Times in nanoseconds of the host's clock."""

    stage: Column  # [n] index into STAGES
    step: Column  # [n] NO_STEP: a plan with nothing to launch
    begin_ns: Column  # [n]
    end_ns: Column  # [n]

    def of(self, stage: int) -> Spans:
        return self[self.stage == stage]

    def __getitem__(self, index: npt.NDArray[np.bool_] | Column) -> Spans:
        return Spans(self.stage[index], self.step[index], self.begin_ns[index], self.end_ns[index])


@dataclass(frozen=True)
class Steps:
    """One entry a step, in order of launch; the device's own clock in begin_ns and end_ns, the host's elsewhere."""

    step: Column  # [n]
    num_rows: Column
    num_decode_rows: Column
    num_tokens: Column
    begin_ns: Column
    end_ns: Column
    launch_begin_ns: Column
    launch_end_ns: Column
    collect_ns: Column  # how long the host waited for it
    seen_ns: Column
    outputs_end_ns: Column

    def window(self, first: int, last: int) -> Steps:
        return Steps(*(getattr(self, name)[first:last] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class DeviceClock:
    """Maps the device's clock to the host's: offsets at a few moments, interpolated between."""

    device_ns: Column  # [k] ascending
    offset_ns: Column  # [k]
    error_ns: int

    def to_host(self, device_ns: Column) -> Column:
        """In small numbers: a double holds no nanoseconds since 1970."""
        moment, offset = self.device_ns[0], self.offset_ns[0]
        drift_ns = np.interp(device_ns - moment, self.device_ns - moment, self.offset_ns - offset)
        aligned: Column = device_ns + offset + np.rint(drift_ns).astype(np.int64)
        return aligned


@dataclass(frozen=True)
class Figures:
    """Of consecutive steps. None where the device has no clock."""

    num_steps: int
    host_us_median: float  # a turn of the loop without its wait, everything between two steps included
    busy_us_median: float | None = None
    gap_us_median: float | None = None  # from a step's end to the next one's begin
    gap_us_max: float | None = None
    idle_share: float | None = None  # gaps over all the time
    launch_lead_us_median: float | None = None  # from a launch to its predecessor's end; < 0: it came late
    queue_depth_mean: float | None = None  # launched and not yet over, the running one included
    clock_error_us: float | None = None  # of the lead

    def asdict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Records:
    """As `StepTrace` notes them, in order of time; the device's own clock where it says so, the host's elsewhere."""

    plans: Table  # step, begin, end
    launches: Table  # step, begin, end, rows, decode rows, tokens
    commits: Table  # step, begin, end, begin and end of the collect before, begin and end on the device
    outputs: Table  # step, begin, end


@dataclass(frozen=True)
class Timeline:
    spans: Spans
    steps: Steps
    clock: DeviceClock | None  # None where the device has none

    def __len__(self) -> int:
        return len(self.steps.step)

    def window(self, first: int, last: int) -> Timeline:
        return Timeline(self.spans, self.steps.window(first, last), self.clock)

    def steady(self) -> Timeline:
        """The longest run of decode steps of the same rows, without its ragged ends."""
        steps = self.steps
        is_decode = (steps.num_tokens == steps.num_rows) & (steps.num_decode_rows == steps.num_rows)
        goes_on = is_decode[1:] & is_decode[:-1] & (np.diff(steps.num_rows) == 0) & (np.diff(steps.step) == 1)
        borders = np.flatnonzero(np.concatenate(([True], ~goes_on, [True])))
        longest = int(np.diff(borders).argmax())
        first, last = int(borders[longest]), int(borders[longest + 1])
        trim = NUM_RAGGED if last - first > 3 * NUM_RAGGED else 0
        return self.window(first + trim, last - trim)

    def figures(self) -> Figures:
        """Needs two steps or more."""
        steps = self.steps
        host_us = _us(np.diff(steps.outputs_end_ns) - steps.collect_ns[1:])
        if self.clock is None:
            return Figures(len(self), _median(host_us))
        gaps_us, elapsed_us = self.gaps_us(), _us(steps.end_ns[-1:] - steps.begin_ns[:1]).item()
        ends_ns = self.clock.to_host(steps.end_ns)
        return Figures(
            num_steps=len(self),
            host_us_median=_median(host_us),
            busy_us_median=_median(_us(steps.end_ns - steps.begin_ns)),
            gap_us_median=_median(gaps_us),
            gap_us_max=round(float(gaps_us.max()), 2),
            idle_share=round(float(gaps_us.sum()) / elapsed_us, 5),
            launch_lead_us_median=_median(_us(ends_ns[:-1] - steps.launch_end_ns[1:])),
            queue_depth_mean=round(float(_us(ends_ns - steps.launch_begin_ns).sum()) / elapsed_us, 2),
            clock_error_us=round(self.clock.error_ns / 1e3, 2),
        )

    def gaps_us(self) -> npt.NDArray[np.float64]:
        """[n - 1] from each step's end to the next one's begin, on the device's clock."""
        return np.maximum(_us(self.steps.begin_ns[1:] - self.steps.end_ns[:-1]), 0.0)


def join(records: Records) -> Timeline:
    """The steps that were both launched and retired, and all spans."""
    launches, commits = records.launches, records.commits
    common, launched, retired = np.intersect1d(launches[:, 0], commits[:, 0], return_indices=True)
    steps = Steps(
        step=common,
        launch_begin_ns=launches[launched, 1],
        launch_end_ns=launches[launched, 2],
        num_rows=launches[launched, 3],
        num_decode_rows=launches[launched, 4],
        num_tokens=launches[launched, 5],
        collect_ns=(commits[:, 4] - commits[:, 3])[retired],
        seen_ns=commits[retired, 4],
        begin_ns=commits[retired, 5],
        end_ns=commits[retired, 6],
        outputs_end_ns=records.outputs[retired, 2],
    )
    return Timeline(_spans(records), steps, align(steps))


def _spans(records: Records) -> Spans:
    """All of them in order of time; equal times keep the order of the stages."""
    collects = records.commits[:, [0, 3, 4]]
    by_stage = (records.plans, records.launches[:, :3], collects, records.commits[:, :3], records.outputs)
    stage = np.repeat(np.arange(len(STAGES)), [len(table) for table in by_stage])
    step, begin_ns, end_ns = np.concatenate(by_stage).T
    return Spans(stage, step, begin_ns, end_ns)[np.lexsort((stage, end_ns, begin_ns))]


def align(steps: Steps) -> DeviceClock | None:
    """The offset of the clocks from what steps show of it (the method is told at the top). None without a clock."""
    if not steps.end_ns.any():
        return None
    upper_ns, lower_ns = steps.seen_ns - steps.end_ns, steps.launch_begin_ns - steps.begin_ns
    blocks = [slice(first, first + BLOCK_STEPS) for first in range(0, len(upper_ns), BLOCK_STEPS)]
    tightest = np.array([block.start + int(upper_ns[block].argmin()) for block in blocks])
    error_ns = min(int(upper_ns[block].min() - lower_ns[block].max()) for block in blocks)
    return DeviceClock(steps.end_ns[tightest], upper_ns[tightest], max(error_ns, 0))


def _us(nanoseconds: Column) -> npt.NDArray[np.float64]:
    return nanoseconds / 1e3


def _median(values: npt.NDArray[np.float64]) -> float:
    return round(float(np.median(values)), 2)
