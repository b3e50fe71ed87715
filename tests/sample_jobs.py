"""Job types for the tests: python handler.py --module sample_jobs."""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from decimal import Decimal

from psycopg.rows import dict_row

import control
from jobs import TIME, JobInstance, JobRequestError, JobStepError, connect


class Scripted(JobInstance):
    """Do what the parameters say: `steps` is a list of "ok", "error", "crash", "sleep", ..."""

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
        if what.startswith("cancel"):  # from another session, as an operator does meanwhile
            with connect() as operator:
                control.cancel_job(operator, self.job_id, "wrong park")
        if what.endswith("stop"):
            os.kill(os.getpid(), signal.SIGTERM)
        if what.endswith("taken away"):
            with connect() as operator:
                operator.execute("UPDATE job_instances SET worker_id = NULL WHERE id = %s",
                                 [self.job_id])
        if what.endswith("then fail"):
            raise JobStepError("no wind")
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
        self.connection.execute("INSERT INTO trace (job_id, step_id) VALUES (%s, %s)",
                                [self.job_id, step_id])
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


class TakenUp(JobInstance):
    """Answers or does what the parameters say when it is asked for its steps."""

    _name = "Taken Up"

    def _create_steps(self):
        what = self.parameters.get("do")
        if what == "answer":
            return self.parameters["answer"]
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "exit":
            sys.exit(7)
        if what == "hang":
            time.sleep(60)
        if what == "disk full" and self.connection.execute(
                "SELECT nextval('tries') <= 3").fetchone()[0]:
            self.connection.execute("DO $$ BEGIN RAISE disk_full; END $$")
        return [{}]

    def _run_step(self, step_id):
        return None


RESULTS = {"decimal": lambda: {"power": Decimal("1.5")},
           "time": lambda: {"at": [datetime(2026, 3, 1)]},
           "nan": lambda: {"deep": {"mean": float("nan")}}, "set": lambda: {"names": {1}},
           "list": lambda: [1], "key": lambda: {7: 1}, "nul": lambda: {"text": "a\0"},
           "huge": lambda: {"n": 10**5000}}


class Answers(JobInstance):
    """Each step returns what RESULTS holds under its name."""

    _name = "Answers"

    def _create_steps(self):
        return [{"name": name} for name in self.parameters["steps"]]

    def _run_step(self, step_id):
        return RESULTS[self.step["name"]]()


class Meddling(JobInstance):
    """Each step runs SQL in the worker's session, or "autocommit off", or "rows as dicts"."""

    _name = "Meddling"

    def _create_steps(self):
        return [{"parameters": {"sql": sql}} for sql in self.parameters["steps"]]

    def _run_step(self, step_id):
        sql = self.step["parameters"]["sql"]
        if sql == "autocommit off":
            self.connection.autocommit = False
        elif sql == "rows as dicts":
            self.connection.row_factory = dict_row
        else:
            row = self.connection.execute(sql)
            return {"row": str(row.fetchone())} if row.description else None


class Starts(JobInstance):
    """Its step starts a shell that starts others, writes their ids down, and hangs."""

    _name = "Starts"

    def _create_steps(self):
        return [{}]

    def _run_step(self, step_id):
        subprocess.run(
            ["sh", "-c", "sleep 77 | cat & echo $! > " + self.parameters["file"] + "; sleep 78"],
            check=True)


class Orphans(JobInstance):
    """Its step leaves a process behind that is nobody's child, and waits until it ended badly."""

    _name = "Orphans"

    def _create_steps(self):
        return [{}]

    def _run_step(self, step_id):
        subprocess.run(["sh", "-c", "(sleep 0.2; exit 3) & exit 0"], check=True)
        return None
