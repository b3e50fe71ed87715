"""Job types for the benchmarks: python handler.py --module bench_jobs."""

import time

from jobs import JobInstance


class Noop(JobInstance):
    """As many steps as the parameters say (1), and they do nothing."""

    _name = "Bench Noop"

    def _create_steps(self):
        return [{} for _ in range(self.parameters.get("steps", 1))]

    def _run_step(self, step_id):
        return None


class Clock(JobInstance):
    """Say when its step began, in seconds since the epoch."""

    _name = "Bench Clock"

    def _create_steps(self):
        return [{}]

    def _run_step(self, step_id):
        print(time.time(), flush=True)
