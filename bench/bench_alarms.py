"""Alarm Calculation beside a count and sum of the same samples, numpy, polars and pandas."""

from __future__ import annotations

from collections.abc import Callable

import park
import psycopg
from measure import RAW, medians, report, seconds

import control
import jobs


class Alarms:
    """The parts of `bench.Bench` that calculate alarms."""

    connection: psycopg.Connection
    dsn: str
    once: Callable[[], float]  # run everything due
    peak: Callable[[str], int]
    peak_of_steps: Callable[[int], int]

    # The parts.

    def alarms(self) -> None:
        """One (object, alarm, year), and 100 x 10 of them, against count-and-sum and others."""
        self.park(100)
        self.connection.execute(self.SAMPLES_SQL, [100])
        for order in ("in order of arrival", "clustered"):
            if order == "clustered":
                self.connection.execute("CLUSTER feature_values USING feature_values_pkey")
            self.connection.execute("VACUUM ANALYZE feature_values")
            self.one_year(order, alarm_id=10, must=2.1)
            self.one_year(order, alarm_id=4, must=3.0)
            self.many_years(order, 100)
        self.ask_years(100)
        report("worker memory after 1,000 alarm years, over after 100 no-op steps",
               self.peak("1,000 alarm years") / self.peak_of_steps(100), better="<")
        self.empty_park()

    def empty_park(self) -> None:
        self.connection.execute("TRUNCATE feature_values, alarms_detected, alarms_history, "
                                "job_instances, job_steps")

    def chains(self) -> None:
        """500 alarms each giving way to the one before it; 263,001 periods calculated again."""
        self.park(10)
        self.connection.execute(self.SAMPLES_SQL, [10])
        self.connection.execute("VACUUM ANALYZE feature_values")
        self.chain(objects=10, alarms=500)
        self.cliff(263_001)
        self.empty_park()

    def chain(self, objects: int, alarms: int) -> None:
        """Alarms each of which gives way to the one before it, over a day."""
        self.connection.execute("DELETE FROM alarms")
        for n in range(1, alarms + 1):
            self.define(n, "high", 3 + n % 14, [n - 1] if n > 1 else [])

        def calculate() -> float:
            self.empty_history()
            self.ask_years(objects, alarms, end="2025-01-02 00:00:00Z")
            return self.once()
        m = medians(3, chain=calculate)
        report(f"{alarms} chained alarms on {objects} objects, a day, seconds",
               m["chain"], 5.4, 3.0, "<")

    def cliff(self, periods: int) -> None:
        """Every second sample triggers; then another threshold, or the other half."""
        self.connection.execute("DELETE FROM alarms")
        self.connection.execute("TRUNCATE feature_values")
        self.empty_history()
        self.connection.execute(
            "INSERT INTO feature_values SELECT 1, 1, '2025-01-01 00:00+00'::timestamptz "
            "+ n * interval '10 min', CASE n %% 2 WHEN 0 THEN 11 ELSE 9 END + 0.1 * (n %% 5) "
            "FROM generate_series(1, %s) n", [2 * periods])
        self.connection.execute("VACUUM ANALYZE feature_values")
        self.define(1, "high", 10, [], "wind")
        step = park.OneStep(self.connection, 1, 1, start="2025-01-01 00:00:00",
                            end="2036-01-01 00:00:00")
        found = {"first": seconds(step.run)}
        for name, kind, value in (("the same again", "high", 10),
                                  ("a higher threshold", "high", 11.15),
                                  ("the first again", "high", 10), ("the other half", "low", 10)):
            self.define(1, kind, value, [], "wind")
            found[name] = seconds(step.run)
            bars = (2.0, 1.5) if kind == "high" else (None, None)  # there every row is another
            report(f"{periods:,} periods, {name}, over the first calculation",
                   found[name] / found["first"], *bars, "<")
        RAW["cliff"] = found

    def define(self, number: int, kind: str, value: float, important: list[int],
               feature: str = "") -> None:
        trigger = park.trigger(kind, feature or ["wind", "power"][number % 2], value)
        self.connection.execute(
            "INSERT INTO alarms (id, object_model_id, manufacturer_id, trigger, "
            "non_overlapping_alarms) "
            "VALUES (%(n)s, 1, %(n)s, %(trigger)s, %(important)s) ON CONFLICT (id) DO UPDATE "
            "SET trigger = EXCLUDED.trigger, "
            "non_overlapping_alarms = EXCLUDED.non_overlapping_alarms",
            {"n": number, "trigger": jobs.Jsonb(trigger), "important": important})

    SAMPLES_SQL = """
INSERT INTO feature_values
SELECT o, f, ts, 10 + 8 * sin(extract(epoch FROM ts) / 30000 + o) + 0.1 * random()
  FROM generate_series(1, %s) o,
       generate_series(1, 2) f,
       generate_series('2025-01-01 00:10+00'::timestamptz, '2026-01-01 00:00+00', '10 min') ts
 ORDER BY ts, o"""

    def park(self, objects: int) -> None:
        self.connection.execute("CREATE TABLE IF NOT EXISTS bench_periods "
                                "(start_time timestamptz, end_time timestamptz)")
        self.connection.execute("TRUNCATE job_instances, job_steps, "
                                "alarms_history, alarms_detected")
        self.connection.execute("INSERT INTO object_types (id, name) "
                                "VALUES (1, 'wind_turbine') ON CONFLICT DO NOTHING")
        self.connection.execute("INSERT INTO object_models (id, object_type_id, name) "
                                "VALUES (1, 1, 'G97') ON CONFLICT DO NOTHING")
        self.connection.execute("INSERT INTO features (id, object_model_id, name) "
                                "VALUES (1, 1, 'wind'), (2, 1, 'power') ON CONFLICT DO NOTHING")
        self.connection.execute("INSERT INTO objects (id, object_model_id, name) "
                                "SELECT n, 1, 'T' || n FROM generate_series(1, %s) n "
                                "ON CONFLICT DO NOTHING", [objects])
        for n in range(1, 11):
            self.define(n, "high", 8 + n, [])

    SUM_SQL = ("SELECT count(*), sum(value) FROM feature_values "
               "WHERE object_id = %s AND feature_id = %s "
               "AND timestamp > '2025-01-01 00:00+00' AND timestamp <= '2026-01-01 00:00+00'")

    def one_year(self, order: str, alarm_id: int, must: float) -> None:
        share, periods = self.connection.execute(self.SHARE_SQL, [8 + alarm_id]).fetchone()
        step = park.OneStep(self.connection, 1, alarm_id, start="2025-01-01 00:00:00",
                            end="2026-01-01 00:00:00")

        def calculate() -> float:
            self.empty_history()
            return seconds(step.run)

        def count_and_sum() -> float:
            return seconds(lambda: self.connection.execute(
                self.SUM_SQL, [1, 1], prepare=True).fetchone())
        for _ in range(12):  # a worker's statements are prepared and planned by then
            calculate()
            count_and_sum()
        m = medians(15, count_and_sum=count_and_sum, calculate=calculate)
        report(f"one (object, alarm, year), {order}, {share:.0%} triggering, {periods} periods, "
               "over count-and-sum", m["calculate"] / m["count_and_sum"], must, 1.4, "<")
        others = {name: lambda way=way: seconds(lambda: way(1, 1, 8 + alarm_id)) for name, way in
                  (("numpy", self.numpy_year), ("polars", self.polars_year),
                   ("pandas", self.pandas_year))}
        for name, value in medians(3, **others).items():
            report(f"... over {name}", m["calculate"] / value, better="<")

    YEAR_SQL = ("SELECT timestamp, value FROM feature_values "
                "WHERE object_id = {} AND feature_id = {} "
                "AND timestamp > '2025-01-01 00:00+00' AND timestamp <= '2026-01-01 00:00+00' "
                "ORDER BY timestamp")

    SHARE_SQL = """
WITH sample AS (
    SELECT value > %s AS triggers, timestamp
      FROM feature_values
     WHERE object_id = 1 AND feature_id = 1
), change AS (
    SELECT triggers, triggers AND NOT lag(triggers, 1, false) OVER (ORDER BY timestamp) AS begins
      FROM sample
)
SELECT avg(triggers::int)::float8, count(*) FILTER (WHERE begins) FROM change"""

    def empty_history(self) -> None:
        """Not with TRUNCATE or VACUUM: after those PostgreSQL plans each statement anew."""
        self.connection.execute("DELETE FROM alarms_history")
        self.connection.execute("DELETE FROM alarms_detected")

    def pandas_year(self, object_id: int, feature_id: int, threshold: float) -> int:
        """As it is usually written: read, compare, group, write."""
        import pandas
        import sqlalchemy
        if not hasattr(self, "engine"):
            self.engine = sqlalchemy.create_engine("postgresql+psycopg://",
                                                   creator=lambda: psycopg.connect(self.dsn))
        frame = pandas.read_sql(self.YEAR_SQL.format(object_id, feature_id), self.engine)
        on = frame["value"] > threshold
        groups = frame[on].groupby((on != on.shift()).cumsum()[on])["timestamp"]
        periods = pandas.DataFrame({"start_time": groups.min() - pandas.Timedelta("10min"),
                                    "end_time": groups.max()})
        periods.to_sql("bench_periods", self.engine, if_exists="append", index=False)
        return len(periods)

    RECORDS_SQL = ("SELECT string_agg(timestamptz_send(timestamp) || float8send(value), '') "
                   "FROM (" + YEAR_SQL + ") AS year")

    def numpy_year(self, object_id: int, feature_id: int, threshold: float) -> int:
        """Read as one binary value, compare, find the edges, write with COPY."""
        import numpy
        row = self.connection.cursor(binary=True).execute(
            self.RECORDS_SQL.format(object_id, feature_id)).fetchone()
        # microseconds since 2000
        year = numpy.frombuffer(row[0], [("end", ">i8"), ("value", ">f8")])
        edges = numpy.flatnonzero(
            numpy.diff(year["value"] > threshold, prepend=False, append=False))
        at = (numpy.datetime64("2000-01-01", "us") + year["end"].astype("timedelta64[us]"))
        periods = zip((at[edges[::2]] - numpy.timedelta64(10, "m")).tolist(),
                      at[edges[1::2] - 1].tolist(), strict=True)
        with self.connection.cursor().copy(
                "COPY bench_periods (start_time, end_time) FROM STDIN") as copy:
            for period in periods:
                copy.write_row(period)
        return len(edges) // 2

    def polars_year(self, object_id: int, feature_id: int, threshold: float) -> int:
        import polars
        info = psycopg.conninfo.conninfo_to_dict(self.dsn)
        uri = (f"postgresql://{info['user']}@/{info['dbname']}"
               f"?host={info['host']}&port={info['port']}")
        frame = polars.read_database_uri(self.YEAR_SQL.format(object_id, feature_id), uri,
                                         engine="adbc")
        on = polars.col("value") > threshold
        return len(frame.with_columns(run=on.rle_id(), on=on).filter("on").group_by("run").agg(
            polars.col("timestamp").min().alias("start_time"),
            polars.col("timestamp").max().alias("end_time")))

    def ask_years(self, objects: int, alarms: int = 10, end: str = "2026-01-01 00:00:00Z") -> None:
        control.create_job(self.connection, "Alarm Calculation", {
            "object_names": [f"T{n}" for n in range(1, objects + 1)],
            "alarm_ids": list(range(1, alarms + 1)), "start": "2025-01-01 00:00:00Z", "end": end})

    def many_years(self, order: str, objects: int) -> None:
        def ours(is_chained: bool = False) -> float:
            self.connection.execute("UPDATE alarms SET non_overlapping_alarms = "
                                    "CASE WHEN %s AND id > 1 THEN ARRAY[id - 1] ELSE '{}' END",
                                    [is_chained])
            self.empty_history()
            self.ask_years(objects)
            return self.once()

        def count_and_sum() -> float:
            return seconds(lambda: [
                self.connection.execute(self.SUM_SQL, [o, n % 2 + 1], prepare=True).fetchone()
                for o in range(1, objects + 1) for n in range(1, 11)])

        def pandas(some: int = 3) -> float:
            return objects / some * seconds(lambda: [
                self.pandas_year(o, n % 2 + 1, 8 + n)
                for o in range(1, some + 1) for n in range(1, 11)])
        m = medians(2, years_sum=count_and_sum, years_ours=ours, years_pandas=pandas,
                    years_chained=lambda: ours(is_chained=True))
        report(f"{objects} objects x 10 alarms x 1 year, {order}, over pandas (from 3 objects)",
               m["years_ours"] / m["years_pandas"], 0.04, 0.015, "<")
        report("... each giving way to the one before it, over none doing so",
               m["years_chained"] / m["years_ours"], 1.5, 1.0, "<")
        report("... over a count-and-sum for each", m["years_ours"] / m["years_sum"], better="<")
