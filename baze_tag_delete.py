"""Bazefield Tag Delete: delete what was recorded under tags, in a period.

parameters: {"object_names": ["LAN-01"], "tags": ["ActivePower"], "start": "2026-03-01 00:00:00",
             "end": "2026-03-02 00:00:00", "dry_run": true}; object_filter instead of object_names
steps:      one per object and tag
result:     {"found": 144, "deleted": 144}; with dry_run nothing is deleted

The window is [start, end): the sample at `end` stays. A step counts what is there, deletes where
there is something, in chunks of at most 30 days, and reads the window again: it fails if anything is
left. Deleting twice does no harm, so a step that was interrupted is simply run again.
"""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta
from typing import Any

import bazefield
import object_filter
from bazefield import STEP_OBJECTS_SQL, Lookup
from jobs import TIME, JobInstance, JobRequestError, JobStepError, parse_time, query

CHUNK = timedelta(days=30)  # longest period of one delete
MOST_LEFT = 1000            # samples looked at when reading back

OBJECTS_SQL = "SELECT id, name FROM objects WHERE name = ANY(%(names)s)"


class JobBazeTagDelete(JobInstance):
    """Delete tag data from Bazefield for a period."""

    _name = "Bazefield Tag Delete"
    _parameters_schema = {
        "type": "object",
        "required": ["tags", "start", "end"],
        "additionalProperties": False,
        "properties": {
            "object_names": {"type": "array", "minItems": 1, "uniqueItems": True,
                             "items": {"type": "string", "minLength": 1}},
            "object_filter": object_filter.OBJECT_FILTER,
            "tags": {"type": "array", "minItems": 1, "uniqueItems": True,
                     "items": {"type": "string", "minLength": 1}},
            "start": TIME,
            "end": TIME,
            "dry_run": {"type": "boolean", "default": False},
        },
    }

    def __init__(self, job_id: int, skip_test: bool = True) -> None:
        self._lookup: Lookup | None = None
        super().__init__(job_id, skip_test)

    @classmethod
    def _check_parameters(cls, parameters: dict[str, Any]) -> list[str]:
        if ("object_names" in parameters) == ("object_filter" in parameters):
            return ["$: give exactly one of object_names and object_filter"]
        return []

    def _create_steps(self) -> list[dict[str, Any]]:
        bazefield.read_settings()  # wrong settings fail the job, not each of its steps
        return [{"name": f"{name} / {tag}", "object_id": object_id, "parameters": {"tag": tag}}
                for object_id, name in self._objects() for tag in self.parameters["tags"]]

    def _objects(self) -> list[tuple[int, str]]:
        if "object_filter" in self.parameters:
            return [row[:2] for row in object_filter.select(self.connection, self.parameters["object_filter"])]
        names = self.parameters["object_names"]
        rows = query(self.connection, OBJECTS_SQL, {"names": names})
        if missing := [name for name in names if name not in {row[1] for row in rows}]:
            raise JobRequestError(f"Nothing was deleted: unknown objects {', '.join(map(repr, missing))}; "
                                  "see the table objects; insert a corrected job")
        return sorted(rows, key=lambda row: names.index(row[1]))

    def _run_step(self, step_id: int) -> dict[str, Any]:
        client = bazefield.client()
        if self._lookup is None:
            self._lookup = Lookup(client, query(self.connection, STEP_OBJECTS_SQL, {"job_id": self.job_id}))
        object_id, tag = self._lookup.bazefield_id(self.step["object_id"]), self.step["parameters"]["tag"]
        self._lookup.require_point(object_id, tag)
        start, end = parse_time(self.parameters["start"]), parse_time(self.parameters["end"])
        if self.parameters.get("dry_run"):
            return {"found": sum(1 for _ in client.sample_times(object_id, tag, start, end)), "deleted": 0,
                    "dry_run": True}
        found = delete(client, object_id, tag, start, end)
        return {"found": found, "deleted": found}


def delete(client: bazefield.Client, object_id: str, tag: str, start: datetime, end: datetime) -> int:
    """Delete the samples in [start, end) and return how many there were; `JobStepError` if any is left."""
    found, lasts = delete_chunks(client, object_id, tag, start, end)
    if not found:
        return 0
    left = list(itertools.islice(client.sample_times(object_id, tag, start, end), MOST_LEFT))
    if left and set(left) <= set(lasts):
        # The server leaves out the sample at `to`; that it is still there shows that `to` may safely be
        # the millisecond after it.
        for moment in left:
            client.delete_samples(object_id, tag, moment, moment + 1)
        left = list(itertools.islice(client.sample_times(object_id, tag, start, end), MOST_LEFT))
    if left:
        raise JobStepError(f"{len(left)}{' or more' if len(left) == MOST_LEFT else ''} of {found} samples are still "
                           f"there, the first at {bazefield.from_ms(left[0])}; is somebody writing to this tag? "
                           "jobctl retry tries again")
    return found


def delete_chunks(client: bazefield.Client, object_id: str, tag: str,
                  start: datetime, end: datetime) -> tuple[int, list[int]]:
    """Delete wherever a chunk holds samples; return their number and the chunks' last milliseconds."""
    first, last, size = bazefield.to_ms(start), bazefield.to_ms(end) - 1, CHUNK // timedelta(milliseconds=1)
    found, filled = 0, set()
    for moment in client.sample_times(object_id, tag, start, end):
        found += 1
        filled.add((moment - first) // size)
    chunks = [(first + n * size, min(first + (n + 1) * size - 1, last)) for n in sorted(filled)]
    for since, until in chunks:
        client.delete_samples(object_id, tag, since, until)
    return found, [until for _, until in chunks]
