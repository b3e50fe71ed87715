"""Job types for the tests: python handler.py --module sample_jobs."""

import os
import signal
import time

from jobs import TIME, JobInstance, JobRequestError, JobStepError


class Scripted(JobInstance):
    """Do what the parameters say: `steps` is a list of "ok", "error", "crash", "sleep", "kill" ..."""

    _name = "Scripted"
    _parameters_schema = {
        "type": "object",
        "required": ["steps"],
        "additionalProperties": False,
        "properties": {"steps": {"type": "array", "items": {"type": "string"}},
                       "sleep": {"type": "number"},
                       "refuse": {"type": "string"},
                       "start": TIME, "end": TIME},
    }

    def _create_steps(self):
        if "refuse" in self.parameters:
            raise JobRequestError(self.parameters["refuse"])
        return [{"name": what, "parameters": {"what": what}} for what in self.parameters["steps"]]

    def _run_step(self, step_id):
        what = self.step["parameters"]["what"]
        if what == "error":
            raise JobStepError("no wind")
        if what == "crash":
            return {"x": 1 / 0}
        if what == "sleep":
            time.sleep(self.parameters.get("sleep", 60))
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "disk full":
            self.connection.execute("DO $$ BEGIN RAISE disk_full; END $$")
        if what == "open":
            self.connection.execute("BEGIN")
        if what == "exit":
            raise SystemExit(7)
        if what == "nul":
            raise JobStepError("a\0b\ud800")
        if what == "unjson":
            return {"x": object()}
        return {"said": what}


class Transactional(Scripted):
    """As Scripted, each step in a transaction; every step first leaves a row in `trace`."""

    _name = "Transactional"
    _step_in_transaction = True

    def _run_step(self, step_id):
        self.connection.execute("INSERT INTO trace (job_id, step_id) VALUES (%s, %s)", [self.job_id, step_id])
        return super()._run_step(step_id)


class Noop(JobInstance):
    """As many steps as the parameters say that do nothing."""

    _name = "Noop"

    def _create_steps(self):
        return [{} for _ in range(self.parameters.get("steps", 1))]

    def _run_step(self, step_id):
        return None


class Buggy(JobInstance):
    """Fails before it has looked at its job."""

    _name = "Buggy"

    def __init__(self, job_id, skip_test=True):
        raise RuntimeError("a bug in the job file")
