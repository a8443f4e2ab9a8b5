"""A made-up engine and device in numbers: what a trace of them must say is known beforehand. Times in nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

from headway.engine import trace as trace_module
from headway.engine.meter import StepMeter
from headway.engine.stages import Stages
from headway.engine.timeline import Timeline
from headway.engine.trace import StepTrace

HOST_NS, LAUNCH_NS, RUN_NS, SEE_NS = 10_000, 20_000, 200_000, 1_500  # plan, commit, outputs each HOST_NS
REACH_NS = 3_000  # from the launch's begin to the step's, on an idle device
GAP_NS = 1_000  # between steps that were queued in time
OFFSET_NS = 1_700_000_000_123_456_789  # the device's clock starts at 1970, the host's when it likes


@dataclass
class PacedEngine:
    """Runs the stages of `num_steps` decode steps in made-up time at some launch depth."""

    launch_depth: int
    drift: float = 0.0  # of the device's clock
    now_ns: int = 5_000_000
    device_free_ns: int = 0
    in_flight: list[SimpleNamespace] = field(default_factory=list)
    num_launched: int = 0

    def run(self, num_steps: int, trace: StepTrace | StepMeter) -> None:
        stages = trace.around(Stages(self.plan, self.launch, self.collect, self.commit, self.outputs))
        for _ in range(num_steps):
            while (plan := stages.plan()) is not None:
                stages.launch(plan)
            stages.collect(bool)
            stages.outputs(stages.commit(), 0.0)

    def plan(self) -> SimpleNamespace | None:
        if len(self.in_flight) > self.launch_depth:
            return None
        self.now_ns += HOST_NS
        return SimpleNamespace(step=self.num_launched, num_rows=8, num_decode_rows=8, num_tokens=8)

    def launch(self, plan: SimpleNamespace) -> None:
        begin_ns = max(self.now_ns + REACH_NS, self.device_free_ns + GAP_NS)
        self.device_free_ns = begin_ns + RUN_NS
        stamps = [self.on_device(moment) for moment in (begin_ns, self.device_free_ns)]
        self.in_flight.append(
            SimpleNamespace(step=plan.step, begin_ns=stamps[0], end_ns=stamps[1], tokens=[7] * 8)
        )
        self.in_flight[-1].is_seen_ns = self.device_free_ns + SEE_NS
        self.num_launched += 1
        self.now_ns += LAUNCH_NS

    def collect(self, is_ready: object) -> None:
        self.now_ns = max(self.now_ns, self.in_flight[0].is_seen_ns)

    def commit(self) -> SimpleNamespace:
        self.now_ns += HOST_NS
        return self.in_flight.pop(0)

    def outputs(self, commit: object, now_s: float) -> list[object]:
        self.now_ns += HOST_NS
        return []

    def on_device(self, host_ns: int) -> int:
        return OFFSET_NS + host_ns + round(self.drift * host_ns)


def paced_timeline(monkeypatch: object, launch_depth: int, num_steps: int, drift: float = 0.0) -> Timeline:
    engine, trace = PacedEngine(launch_depth, drift), StepTrace()
    monkeypatch.setattr(trace_module, "perf_counter_ns", lambda: engine.now_ns)
    engine.run(num_steps, trace)
    return trace.timeline()
