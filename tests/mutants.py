"""make mutants: leave out one clause after the other, and see a test notice each time.

In a copy of the project one clause of a statement or one line of the code is changed at a time,
and the test named beside it is run: it must fail. Printed: what was left out, by what it was
caught and in how many seconds. Ends with status 1 if one survives, or if a clause is not found
any more.

python tests/mutants.py [WORD...]   only those with a WORD in their names
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from embedded_pg import Server  # noqa: E402

import tables  # noqa: E402

SECONDS = 240  # for one test; longer is a test that hangs, which is noticed too
ORDERS = "test_interleavings.py -k every_order and (cut or dead or taken)"
OWNER = r"\n\s+(AND|WHERE) (j\.)?worker_id( = |\s+IS NOT DISTINCT FROM )%\((worker_id|owner)\)s"
CANCEL = r"\n\s+AND (j\.)?cancel_requested IS NULL"


@dataclass(frozen=True)
class Mutant:
    """One change: of what, where (a regular expression, found once), into what; who notices."""

    name: str
    file: str
    clause: str
    instead: str
    test: str

    def apply(self, text: str) -> str:
        """Return the text changed; raise `ValueError` if there is not exactly one such place."""
        changed, found = re.subn(self.clause, self.instead, text, flags=re.S)
        if found != 1:
            raise ValueError(f"found {found} times")
        return changed


def of(statement: str, file: str, clause: str, instead: str, test: str, what: str) -> Mutant:
    """Return a mutant of the first such clause in a statement, a constant of that name."""
    return Mutant(f"{statement} without {what}", file,
                  rf'(\n{statement} = f?"""(?:(?!""").)*?){clause}', rf"\1{instead}", test)


def scene(name: str) -> str:
    return f"test_interleavings.py::test_every_order_of_the_statements[{name}]"


def play(name: str) -> str:
    return f"test_interleavings.py::{name}"


HELD_BY_OTHER = {
    "QUEUE_SQL": play("test_a_job_taken_away_before_it_is_queued_stays_free"),
    "RELEASE_SQL": play("test_a_job_is_released_by_its_owner_only"),
    "REFUSE_SQL": scene("refused"),
    "BEGIN_SQL": scene("resumed"),
    "NEXT_SQL": scene("taken away between steps"),
    "END_SQL": scene("taken away by hand"),
    "AGAIN_SQL": scene("taken away before another try"),
    "HAND_BACK_SQL": scene("taken away and stopped"),
    "CANCELLED_SQL": scene("taken away and cancelled"),
}
CANCELLED = {
    "RELEASE_SQL": play("test_a_cancelled_job_is_released_as_Failed"),
    "REFUSE_SQL": scene("refused"),
    "BEGIN_SQL": play("test_a_cancel_wins_over_the_begin_of_a_queued_job"),
    "END_SQL": play("test_a_cancel_while_the_last_step_runs_wins"),
    "AGAIN_SQL": play("test_a_cancel_while_the_last_step_runs_wins"),
    "HAND_BACK_SQL": play("test_a_cancel_wins_over_a_stop"),
}


def mutants() -> Iterator[Mutant]:
    for statement, test in HELD_BY_OTHER.items():
        instead = "\n AND true"
        yield of(statement, "life.py", OWNER, instead, test, "worker_id")
    for statement, test in CANCELLED.items():
        yield of(statement, "life.py", CANCEL, "", test, "a look at cancel_requested")
    yield from of_life()
    yield from of_recovery()
    yield from of_reconnecting()
    yield from of_claims()
    yield from of_code()
    yield from of_alarms()


def of_life() -> Iterator[Mutant]:
    yield Mutant("QUEUE_SQL begins a cancelled job", "life.py",
                 r"WHEN %\(begin\)s AND cancel_requested IS NULL(\n\s+THEN 'Running')",
                 r"WHEN %(begin)s\1", scene("cancelled"))
    yield Mutant("QUEUE_SQL forgets the reason", "life.py",
                 r"CASE WHEN cancel_requested IS NOT NULL THEN comment END", "NULL",
                 play("test_a_cancel_wins_over_a_take_up_and_a_refusal"))
    yield of("NEXT_SQL", "life.py", r"\(j\.cancel_requested IS NULL OR new\.id = %\(step_id\)s\)",
             "true", play("test_a_cancelled_job_begins_no_further_step"),
             "a look at cancel_requested")
    yield of("CANCEL_WAITING_SQL", "life.py", r"\n   AND j\.worker_id IS NULL", "",
             scene("cancelled"), "worker_id IS NULL")
    yield of("CANCEL_IN_HAND_SQL", "life.py",
             r"CASE WHEN cancel_requested IS NULL THEN %\(comment\)s ELSE comment END",
             "%(comment)s", play("test_the_first_reason_of_a_cancel_stays"),
             "keeping the first reason")
    yield Mutant("CANCELLED_SQL leaves the step Running", "life.py",
                 r"\), \{ENDED_CTE\}\nSELECT state, set_config\('application_name', "
                 r"%\(application_name\)s, false\) FROM job\n\"\"\"  # noqa: S608"
                 r"\n\n\nINTERRUPTED",
                 ")\nSELECT state, set_config('application_name', %(application_name)s, false) "
                 "FROM job\n\"\"\"  # noqa: S608\n\n\nINTERRUPTED",
                 play("test_a_job_taken_away_and_cancelled_takes_its_step_along"))


def of_recovery() -> Iterator[Mutant]:
    yield of("LOCK_STEP_SQL", "worker.py", " NOWAIT", "",
             play("test_recovery_looks_at_the_step_it_has_got"), "NOWAIT")
    yield of("LOCK_STEP_SQL", "worker.py", r"\n   FOR UPDATE NOWAIT", "",
             play("test_recovery_looks_at_the_step_it_has_got"), "FOR UPDATE")
    yield of("LOCK_ORPHAN_SQL", "worker.py", r"pg_try_advisory_xact_lock\(j\.worker_id\)", "true",
             scene("cut off"), "the dead worker's lock")
    yield of("LOCK_ORPHAN_SQL", "worker.py", r" SKIP LOCKED", "",
             play("test_recovery_passes_over_a_job_that_somebody_is_at"), "SKIP LOCKED")
    yield of("LOCK_ORPHAN_SQL", "worker.py", r"\n   FOR UPDATE OF j SKIP LOCKED", "", ORDERS,
             "FOR UPDATE")
    yield of("LOCK_ORPHAN_SQL", "worker.py",
             r"\n   AND j\.worker_id IS NOT DISTINCT FROM %\(owner\)s", "",
             play("test_recovery_leaves_a_job_that_is_another_s_by_now"), "the owner")
    yield of("LOCK_ORPHAN_SQL", "worker.py",
             r"\n   AND \(j\.worker_id IS NOT NULL OR j\.state = 'Running'\)", "", ORDERS,
             "another look whether it is an orphan")
    yield of("LOCK_ORPHAN_SQL", "worker.py", r"w\.started < pg_postmaster_start_time\(\)", "false",
             play("test_a_restart_of_the_server_is_not_the_fault_of_the_step"), "by_restart")
    yield Mutant("recovery does not look at a cancel", "worker.py",
                 r"            if cancelled:\n                return life[^\n]*\n", "",
                 play("test_a_job_taken_away_and_cancelled_takes_its_step_along"))
    yield Mutant("MAX_DEATHS is 4", "worker.py", r"MAX_DEATHS = 3", "MAX_DEATHS = 4",
                 "test_recovery.py -k given_up_after_three")
    yield of("END_OVERRUN_SQL", "worker.py", r" AND held\.pid = w\.backend_pid", "",
             play("test_who_recovers_a_job_is_not_ended_for_it"), "backend_pid")
    yield Mutant("END_OVERRUN_SQL without the minute of a step", "worker.py",
                 r"(s\.started \+ busy\.step_timeout) \+ interval '1 minute'", r"\1",
                 play("test_who_hangs_is_ended_a_minute_past_the_limit"))
    yield Mutant("END_OVERRUN_SQL without the minute of a take-up", "worker.py",
                 r"(last_state_change \+ step_timeout) \+ interval '1 minute'", r"\1",
                 play("test_who_hangs_is_ended_a_minute_past_the_limit"))


def of_reconnecting() -> Iterator[Mutant]:
    yield Mutant("the lock is not taken at reconnect", "worker.py",
                 r"(\nLOCK_SQL = [^;]*?), pg_advisory_lock\(%\(worker_id\)s[:a-z]*\)", r"\1",
                 scene("cut off"))
    yield of("END_FORMER_SESSIONS_SQL", "worker.py", r"\n   AND pid = ANY\(%\(former\)s\)", "",
             play("test_who_recovers_a_job_is_not_ended_by_its_worker"), "former")
    yield Mutant("former sessions are not ended", "worker.py",
                 r"\n +self\.execute\(END_FORMER_SESSIONS_SQL, self\._me\(\)\)", "",
                 play("test_a_worker_ends_every_former_session_of_its_own"))
    yield Mutant("only the first former session is known", "worker.py",
                 r"(def reconnect(?:(?!\n    def ).)*?)\n +self\._former\.append\([^\n]*",
                 r"\1",
                 play("test_a_worker_ends_every_former_session_of_its_own"))
    yield Mutant("what was in hand is not put back at reconnect", "worker.py",
                 r"if not go_on:", "if False:", scene("cut off"))
    yield Mutant("what is in hand is put back though its job can tell of it", "worker.py",
                 r"if not go_on:", "if True:", "test_job_files.py -k spoils_the_connection")
    yield Mutant("the id is kept though its row is gone", "worker.py",
                 r"if not (self\.execute\(REGISTER_AGAIN_SQL, self\._me\(\)\)\.fetchone\(\)):",
                 r"if \1 == 0:", "test_worker.py -k forgotten")


def of_claims() -> Iterator[Mutant]:
    yield Mutant("a claim without SKIP LOCKED", "claims.py", r"FOR UPDATE SKIP LOCKED",
                 "FOR UPDATE", play("test_a_claim_waits_for_nobody"))
    yield Mutant("job_type_has_room without its lock", "schema.sql",
                 r"PERFORM (pg_catalog\.)?pg_advisory_xact_lock\('job_types'[^;]*;", "PERFORM 1;",
                 scene("a claim that hangs"))
    yield Mutant("job_type_has_room does not count what is Running in nobody's hand", "schema.sql",
                 r"(j\.job_type_id = job_type_has_room\.job_type_id\n\s+)"
                 r"AND \(j\.worker_id IS NOT NULL OR j\.state = 'Running'\)",
                 r"\1AND j.worker_id IS NOT NULL",
                 play("test_a_job_taken_away_while_it_runs_takes_its_room"))
    yield Mutant("due jobs without SKIP LOCKED", "schedules.py",
                 r"FOR UPDATE (OF \w+ )?SKIP LOCKED", "FOR UPDATE",
                 play("test_jobs_that_are_due_are_created_by_one"))
    yield Mutant("a key is held by a job that is being cancelled", "schema.sql",
                 r"(WHERE unique_key IS NOT NULL AND state IN \('Created', 'Queued', 'Running'\)) "
                 r"AND cancel_requested IS NULL", r"\1",
                 play("test_a_key_is_free_when_its_job_is_being_cancelled"))


def of_code() -> Iterator[Mutant]:
    yield Mutant("the effect of a failed step is not rolled back", "jobs.py",
                 r"with in_transaction:", "with contextlib.nullcontext():", scene("cancelled"))
    yield Mutant("no look whether to stop between two steps", "jobs.py",
                 r"if self\._worker\.directions\.stopping\(\):", "if False:",
                 play("test_a_cancel_wins_over_a_stop"))
    yield Mutant("the database's own error fails the step", "jobs.py",
                 r"(our own statement[^\n]*\n)            if says_nothing[^\n]*\n +raise\n",
                 r"\1", "test_setbacks.py -k tried_again")
    yield Mutant("a dropped job that is ours after all is left in hand", "handler.py",
                 r"\n            worker\.put_back\(self\.worker\)  # if[^\n]*", "",
                 "test_setbacks.py -k taken_away")


def of_alarms() -> Iterator[Mutant]:
    """The Alarm Calculation: who may be at an object, what is not believed, what is not read."""
    yield of("TAKE_TURNS_SQL", "alarm_calc.py", r"pg_advisory_xact_lock[^\n]*,", "NULL,",
             "test_alarm_calc.py -k take_turns", "its lock")
    yield of("TAKE_TURNS_SQL", "alarm_calc.py", r"\s+set_config\('enable_seqscan'[^)]*\),", "",
             "test_alarm_calc.py -k plan_made", "index scans only")
    yield of("TAKE_TURNS_SQL", "alarm_calc.py", r"'force_generic_plan'", "'auto'",
             "test_alarm_calc.py -k plan_made", "one plan for all windows")
    for name, clause, instead, test in [
        ("NaN triggers", r"(threshold[^\n]*\n\s+)AND value < 'NaN'", r"\1",
         "test_alarm_calc.py -k test_threshold"),
        ("samples are taken as they come", r"( ORDER BY timestamp)(\)\n\s+FILTER)", r"\2",
         "test_alarm_calc.py -k come_in_order"),
        ("days are as long as each other", r"%\(grid\)s::interval IS NULL", "false",
         "test_alarm_layers.py -k later_sample"),
        ("coverage counts samples that overlap", "off_grid = 0", "true",
         "test_alarm_calc.py -k coverage"),
        ("nothing is known of what was detected", r"detected_new\.before OP[^)]*\) ", "",
         "test_alarm_layers.py -k hidden"),
    ]:
        yield Mutant(name, "alarm_layers.py", clause, instead, test)
    for name, clause, instead, test in [
        ("a window without samples erases", r"if found\.stood and", "if False and",
         "test_alarm_layers.py -k erases_nothing"),
        ("what gives way is not settled", r"if found\.others:", "if False:",
         "test_alarm_layers.py -k settles_the_others"),
    ]:
        yield Mutant(name, "alarm_calc.py", clause, instead, test)


def run(mutant: Mutant, copy: Path, dsn: str) -> tuple[str, float]:
    """Apply a mutant in the copy and run its test; return what became of it and the seconds."""
    begun, path = time.monotonic(), copy / mutant.file
    original = path.read_text()
    try:
        path.write_text(mutant.apply(original))
        own = "test_recovery.py" in mutant.test  # restarts its server
        env = os.environ | {"PERFDB_TEST_DSN": "" if own else dsn}
        tests, _, words = mutant.test.partition(" -k ")
        status = subprocess.run(
            [sys.executable, "-m", "pytest", "-xq",
             *(f"tests/{test}" for test in split(tests)), *(["-k", words] if words else [])],
            cwd=copy, env=env, stdout=subprocess.DEVNULL, timeout=SECONDS).returncode
        fate = {0: "SURVIVED", 1: "caught"}.get(status, f"pytest ended with {status}")
    except subprocess.TimeoutExpired:
        fate = "caught: hangs"
    except ValueError as exc:
        fate = f"CLAUSE {exc}"
    finally:
        path.write_text(original)
    return fate, time.monotonic() - begun


def split(tests: str) -> list[str]:
    """Return the tests named; a name in brackets may hold spaces."""
    return [tests] if "[" in tests else tests.split()


def main() -> int:
    chosen = [mutant for mutant in mutants()
              if not sys.argv[1:] or any(word in mutant.name for word in sys.argv[1:])]
    rows = []
    with (tempfile.TemporaryDirectory(prefix="perfdb-mutants-") as directory,
          Server({"fsync": "off"}) as server):
        copy = Path(directory) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "results", "__pycache__"))
        for mutant in chosen:
            fate, seconds = run(mutant, copy, server.dsn())
            rows.append([mutant.name, fate, mutant.test.rpartition("::")[2], round(seconds, 1)])
            print(f"  {fate}: {mutant.name}", file=sys.stderr, flush=True)
    print(tables.table(["left out", "", "by", "seconds"], rows))
    survived = sum(not fate.startswith("caught") for _, fate, _, _ in rows)
    print(f"\n  {len(rows)} mutants, {len(rows) - survived} caught")
    return int(survived > 0)


if __name__ == "__main__":
    raise SystemExit(main())
