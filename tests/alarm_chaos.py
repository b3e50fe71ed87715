"""make chaos, the alarms: thousands of random cases against the oracle (alarm_oracle.py).

A case is an object of a model of its own, with chains of 3 to 8 alarms, some of them given and not
calculated here; samples with gaps, NULLs, NaNs and odd moments; intervals of minutes, of days
across a change of the clocks, of months. Then random jobs (some alarms, some window), samples
corrected, thresholds, shapes and priorities changed between them, and at last jobs for everything
in any order. Both layers must be what the oracle has, after every job. A case that fails is shrunk
to a small one and printed.

    python tests/alarm_chaos.py [CASES] [SEED]     default: 2,000 from a random seed
"""

from __future__ import annotations

import itertools
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psycopg  # noqa: E402
from alarm_oracle import Alarm, Interval, Oracle, Periods, inside, seconds  # noqa: E402

import alarm_calc  # noqa: E402
import control  # noqa: E402
from jobs import Jsonb, query  # noqa: E402
from worker import Worker, use_worker  # noqa: E402

ZONE = "Europe/Madrid"  # its clocks change on 29 March and 25 October 2026
BEGIN = datetime(2026, 3, 26, 23, tzinfo=UTC)
FEATURES = (1, 2)


@dataclass
class Case:
    """What happens to one object, in order."""

    interval: Interval
    alarms: dict[int, Alarm]
    given: dict[int, Periods]
    samples: list[tuple[int, datetime, float | None]]  # feature, timestamp, value
    actions: list[tuple[Any, ...]]
    end: datetime
    last: list[tuple[Any, ...]] = field(default_factory=list)  # jobs that calculate everything


# Making a case.


def random_case(rng: random.Random) -> Case:
    interval, step = rng.choice([
        (Interval(rest=timedelta(minutes=10)), timedelta(minutes=10)),
        (Interval(rest=timedelta(minutes=10)), timedelta(minutes=10)),
        (Interval(rest=timedelta(seconds=450)), timedelta(minutes=10)),
        (Interval(days=1), timedelta(days=1)),
        (Interval(months=1), timedelta(days=29))])
    interval = replace(interval, zone=ZoneInfo(ZONE))
    count = rng.choice([10, 20, 40])
    alarms = random_alarms(rng, step)
    end = BEGIN + (count + 4) * step  # behind the last sample
    given = {n: random_periods(rng, end) for n, a in alarms.items() if a.feature is None}
    samples = [(f, at, v) for f in FEATURES for at, v in random_samples(rng, step, count).items()]
    case = Case(interval, alarms, given, samples, [], end)
    case.actions = [action for _ in range(rng.randrange(2, 7))
                    for action in random_actions(rng, case, step)]
    case.last = [("job", *window, numbers, "clear")
                 for window in random_cuts(rng, BEGIN, end, rng.randrange(1, 4))
                 for numbers in random_split(rng, calculated(case))]
    rng.shuffle(case.last)
    return case


def random_alarms(rng: random.Random, step: timedelta) -> dict[int, Alarm]:
    alarms: dict[int, Alarm] = {}
    for number in rng.sample(range(100, 200), rng.randrange(3, 9)):
        alarms[number] = Alarm(
            rng.choice([None, *FEATURES * 4]) if alarms else 1, rng.random() < 0.6,
            random_threshold(rng), random_length(rng, step), random_length(rng, step),
            random_important(rng, list(alarms)))
    return alarms


def random_threshold(rng: random.Random) -> float:
    return rng.choice([-1, 0, 0.5, 1])


def random_length(rng: random.Random, step: timedelta) -> timedelta:
    return rng.choice([0, 0, 0, 0.02, 1, 1.5, 2, 4]) * step


def random_important(rng: random.Random, others: list[int]) -> tuple[int, ...]:
    """Usually a chain, sometimes more, sometimes a number that no alarm has."""
    chain = others[-1:] if rng.random() < 0.8 else []
    return tuple({*chain, *(n for n in others if rng.random() < 0.2), *rng.choice([(), (), (7,)])})


def random_samples(rng: random.Random, step: timedelta, count: int) -> dict[datetime, Any]:
    value, samples = 0.0, {}
    late = rng.choice([[0], [0, 0, 0, 0.15], [0, 0.001, 0.005]])
    for n in range(1, count + 3):
        value = 0.6 * value + rng.gauss(0, 1)
        if rng.random() < 0.9:
            at = BEGIN + (n + rng.choice(late)) * step
            samples[at.replace(microsecond=0)] = rng.choice([None, math.nan, *[value] * 20])
    return samples


def random_periods(rng: random.Random, end: datetime) -> Periods:
    length = int((end - BEGIN).total_seconds())
    edges = sorted(rng.sample(range(length), 2 * rng.randrange(4)))
    return [(BEGIN + timedelta(seconds=a), BEGIN + timedelta(seconds=b))
            for a, b in zip(edges[::2], edges[1::2], strict=True)]


def random_window(rng: random.Random, case: Case) -> tuple[datetime, datetime]:
    return rng.choice(random_cuts(rng, BEGIN, case.end, rng.choice([1, 2, 3, 6])))


def random_cuts(rng: random.Random, start: datetime, end: datetime,
                count: int) -> list[tuple[datetime, datetime]]:
    """Return `count` windows that cover [start, end), cut at odd seconds."""
    length = int((end - start).total_seconds())
    cuts = sorted({0, length, *(rng.randrange(1, length) for _ in range(count - 1))})
    return [(start + timedelta(seconds=a), start + timedelta(seconds=b))
            for a, b in itertools.pairwise(cuts)]


def random_split(rng: random.Random, numbers: list[int]) -> list[list[int]]:
    shuffled = rng.sample(numbers, len(numbers))
    cut = rng.randrange(1, len(numbers) + 1)
    return [part for part in (shuffled[:cut], shuffled[cut:]) if part]


def calculated(case: Case | Oracle) -> list[int]:
    return [number for number, alarm in case.alarms.items() if alarm.feature is not None]


def random_actions(rng: random.Random, case: Case, step: timedelta) -> list[tuple[Any, ...]]:
    number = rng.choice(calculated(case))
    kind = rng.choice(["job"] * 6 + ["correct"] * 3 + ["lose", "threshold", "shape", "list"])
    if kind == "job":
        numbers = random_split(rng, calculated(case))[0]
        return [("job", *random_window(rng, case), numbers, rng.choice(["fail", "clear"]))]
    if kind == "correct":  # and calculated anew in its own small window
        feature, at, _ = rng.choice(case.samples)
        window = case.interval.begin(at), at
        return [("correct", feature, at, rng.choice([None, -2.0, 2.0])),
                ("job", *window, random_split(rng, calculated(case))[0], "clear")]
    if kind == "lose":
        return [("lose", rng.choice(FEATURES), *random_window(rng, case))]
    if kind == "threshold":
        return [("change", number, {"threshold": random_threshold(rng)})]
    if kind == "shape":
        return [("change", number, {"max_gap": random_length(rng, step),
                                    "min_duration": random_length(rng, step)})]
    earlier = list(case.alarms)[:list(case.alarms).index(number)]
    return [("change", number, {"important": random_important(rng, earlier)})]


# Running it.

PARK_SQL = """
WITH type AS (
    INSERT INTO object_types (name) VALUES (%(name)s) RETURNING id
), model AS (
    INSERT INTO object_models (object_type_id, name) SELECT id, %(name)s FROM type RETURNING id
), feature AS (
    INSERT INTO features (object_model_id, name, sample_interval)
    SELECT model.id, 'feature ' || n, %(interval)s::interval FROM model, generate_series(1, 2) AS n
    RETURNING id
)
INSERT INTO objects (object_model_id, name) SELECT id, %(name)s FROM model
RETURNING id, object_model_id
"""

class Run:
    """A case and its oracle, side by side."""

    def __init__(self, connection: psycopg.Connection, case: Case, name: str) -> None:
        self.connection, self.name = connection, name
        self.is_settled = True  # false: definitions changed, so the history is of several minds
        self.oracle = Oracle(case.interval, dict(case.alarms), {f: {} for f in FEATURES},
                             case.given)
        ((self.object_id, model_id),) = query(connection, PARK_SQL, {
            "name": name, "interval": str(case.interval)})
        self.feature_ids = dict(zip(FEATURES, (id_ for (id_,) in query(
            connection, "SELECT id FROM features WHERE object_model_id = %s ORDER BY name",
            [model_id])), strict=True))
        self.alarm_ids = {n: self._add_alarm(model_id, n) for n in case.alarms}
        for number, periods in case.given.items():
            for period in periods:
                self._do("INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time) "
                         "VALUES (%s, %s, %s, %s)",
                         self.object_id, self.alarm_ids[number], *period)
        with connection.cursor().copy("COPY feature_values FROM STDIN") as copy:
            for feature, at, value in case.samples:
                self.oracle.samples[feature][at] = value
                copy.write_row((self.object_id, self.feature_ids[feature], at, value))

    def _do(self, sql: str, *params: Any) -> None:
        query(self.connection, sql, params)

    def _add_alarm(self, model_id: int, number: int) -> int:
        ((alarm_id,),) = query(
            self.connection, "INSERT INTO alarms (object_model_id, manufacturer_id, trigger, "
            "non_overlapping_alarms) VALUES (%s, %s, %s, %s) RETURNING id",
            [model_id, number, *self._definition(number)])
        return alarm_id

    def _definition(self, number: int) -> tuple[Jsonb, list[int]]:
        alarm = self.oracle.alarms[number]
        if alarm.feature is None:
            return Jsonb({"trigger_type": "manufacturer"}), list(alarm.important)
        shape = {"max_gap": alarm.max_gap.total_seconds(),
                 "min_duration": alarm.min_duration.total_seconds()}
        return Jsonb({"trigger_type": "threshold", "feature_name": f"feature {alarm.feature}",
                      "threshold_type": "high" if alarm.is_high else "low",
                      "threshold_value": alarm.threshold} | {k: v for k, v in shape.items() if v}
                     ), list(alarm.important)

    def act(self, kind: str, *args: Any) -> str:
        """Do one action here and in the oracle; return what differs afterwards, "" if nothing."""
        return getattr(self, kind)(*args) or self.difference()

    def correct(self, feature: int, at: datetime, value: float | None) -> None:
        self.oracle.samples[feature][at] = value
        self._do("INSERT INTO feature_values VALUES (%s, %s, %s, %s) ON CONFLICT "
                 "(object_id, feature_id, timestamp) DO UPDATE SET value = EXCLUDED.value",
                 self.object_id, self.feature_ids[feature], at, value)

    def lose(self, feature: int, start: datetime, end: datetime) -> None:
        samples = self.oracle.samples[feature]
        self.oracle.samples[feature] = {at: samples[at] for at in samples
                                        if not start <= at < end}
        self._do("DELETE FROM feature_values WHERE object_id = %s AND feature_id = %s "
                 "AND timestamp >= %s AND timestamp < %s",
                 self.object_id, self.feature_ids[feature], start, end)

    def change(self, number: int, changes: dict[str, Any]) -> None:
        self.oracle.change(number, **changes)
        self.is_settled = self.is_settled and "threshold" in changes
        self._do("UPDATE alarms SET trigger = %s, non_overlapping_alarms = %s WHERE id = %s",
                 *self._definition(number), self.alarm_ids[number])

    def ask(self, start: datetime, end: datetime, numbers: list[int], no_samples: str) -> int:
        return control.create_job(self.connection, "Alarm Calculation", {
            "object_names": [self.name], "alarm_ids": numbers, "no_samples": no_samples,
            "start": f"{start:%Y-%m-%d %H:%M:%S}Z", "end": f"{end:%Y-%m-%d %H:%M:%S}Z"})

    def job(self, start: datetime, end: datetime, numbers: list[int], no_samples: str) -> str:
        if not self.is_settled:
            no_samples = "clear"  # else it depends on what stands now
        job_id = self.ask(start, end, numbers, no_samples)
        alarm_calc.JobAlarmCalc(job_id).run()
        numbers_of = {alarm_id: n for n, alarm_id in self.alarm_ids.items()}
        for alarm_id, state, comment, result in query(
                self.connection, "SELECT alarm_id, state, comment, result FROM job_steps "
                "WHERE job_instance_id = %s ORDER BY position", [job_id]):
            expected = self.expected(numbers_of[alarm_id], start, end, no_samples)
            if not self.is_settled:  # what stands in between is nobody's business
                expected |= {key: result[key] for key in ("periods", "seconds")}
            if (state == "Failed") != (expected is None) or not is_same(result, expected):
                return f"alarm {numbers_of[alarm_id]}: {state} {comment} {result} != {expected}"
        return ""

    def expected(self, number: int, start: datetime, end: datetime,
                 no_samples: str) -> dict[str, Any] | None:
        """Return the result of a step, None if it must fail."""
        oracle = self.oracle
        known = inside(oracle.detected.get(number, []), start, end) + inside(
            oracle.history(number), start, end)
        if known and no_samples == "fail" and not oracle.counted(
                oracle.alarms[number].feature, start, end):
            return None
        samples, coverage = oracle.detect(number, start, end)
        found = inside(oracle.history(number), start, end)
        return {"periods": len(found), "seconds": seconds(found), "samples": samples,
                "coverage": coverage}

    def difference(self) -> str:
        """Return in which layer of which alarm the rows are not the oracle's, "" if they are."""
        for number in calculated(self.oracle):
            found, expected = self.rows("detected", number), self.oracle.detected.get(number, [])
            if found != expected:
                return f"detected of {number}: {found} != {expected}"
        for number in self.oracle.alarms if self.is_settled else []:
            found, expected = self.rows("history", number), self.oracle.history(number)
            if found != expected:
                return f"history of {number}: {found} != {expected}"
        return ""

    def rows(self, layer: str, number: int) -> Periods:
        rows = query(self.connection, f"SELECT start_time, end_time FROM alarms_{layer} "
                     "WHERE object_id = %s AND alarm_id = %s ORDER BY 1",
                     [self.object_id, self.alarm_ids[number]])
        return [(start.astimezone(UTC), end.astimezone(UTC)) for start, end in rows]


def is_same(result: dict[str, Any] | None, expected: dict[str, Any] | None) -> bool:
    if result is None or expected is None:
        return result is expected
    return all(math.isclose(result[key], expected[key], abs_tol=2e-6) for key in expected)


names = (f"case {os.getpid()} {n}" for n in itertools.count(1))


def problem_of(connection: psycopg.Connection, case: Case) -> str:
    """Run a case; return what is wrong after which action, "" if nothing."""
    run = Run(connection, case, next(names))
    for action in [*case.actions, *case.last]:
        if problem := run.act(*action):
            return f"after {action}: {problem}"
    run.is_settled = True
    return run.difference()


# Making it small.


def smaller(case: Case) -> Iterator[Case]:
    """Yield cases with a part left out, large parts first."""
    for name in ("actions", "samples", "last"):
        items = getattr(case, name)
        size = max(1, len(items) // 2)
        while size:
            for n in range(0, len(items), size):
                yield replace(case, **{name: items[:n] + items[n + size:]})
            size //= 2
    for number in case.alarms:
        yield without_alarm(case, number)


def without_alarm(case: Case, number: int) -> Case:
    def still(action: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if action[0] == "job":
            numbers = [n for n in action[3] if n != number]
            return (*action[:3], numbers, action[4]) if numbers else None
        return None if action[0] == "change" and action[1] == number else action
    return replace(case, alarms={n: alarm for n, alarm in case.alarms.items() if n != number},
                   given={n: periods for n, periods in case.given.items() if n != number},
                   actions=list(filter(None, map(still, case.actions))),
                   last=list(filter(None, map(still, case.last))))


def shrunk(connection: psycopg.Connection, case: Case, tries: int = 400) -> Case:
    """Return a small case that still fails."""
    candidates = smaller(case)
    for _ in range(tries):
        candidate = next(candidates, None)
        if candidate is None:
            break
        if candidate.alarms and problem_of(connection, candidate):
            case, candidates = candidate, smaller(candidate)
    return case


def try_cases(connection: psycopg.Connection, cases: int, seed: int) -> str:
    """Run random cases; return a small one that fails and why, "" if none does."""
    for n in range(cases):
        case = random_case(random.Random(seed + n))
        if problem_of(connection, case):
            case = shrunk(connection, case)
            return f"seed {seed + n}, shrunk:\n{case}\n{problem_of(connection, case)}"
    return ""


def ask_at_once(connection: psycopg.Connection, cases: int, seed: int) -> list[Run]:
    """Ask for the jobs of random cases without running them; return what is to come of them."""
    rng, runs = random.Random(seed), []
    for _ in range(cases):
        case = random_case(rng)
        runs.append(Run(connection, case, next(names)))
        some = [("job", *random_window(rng, case), calculated(case), "clear") for _ in range(5)]
        for _, start, end, numbers, no_samples in [*some, *case.last]:
            runs[-1].ask(start, end, numbers, no_samples)
            for number in numbers:
                runs[-1].oracle.detect(number, start, end)
    return runs


def main(argv: list[str]) -> int:
    from embedded_pg import Server
    cases = int(argv[0]) if argv else 2000
    seed = int(argv[1]) if len(argv) > 1 else random.SystemRandom().randrange(10**9)
    os.environ["PERFDB_TIMEZONE"] = ZONE
    begun = time.monotonic()
    with Server({"fsync": "off"}) as server:
        worker = Worker(prepare(server.dsn()))
        use_worker(worker)
        problem = try_cases(worker.connection, cases, seed)
    print(problem or f"  {cases:,} random cases of alarms from seed {seed}: all as the oracle has "
          f"them, {time.monotonic() - begun:.0f} s")
    return int(bool(problem))


def prepare(dsn: str) -> str:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute((ROOT / "schema.sql").read_text())
        control.write_types(connection, ["Alarm Calculation"])
    return dsn


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
