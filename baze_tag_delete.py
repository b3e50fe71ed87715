"""Bazefield Tag Delete: delete what was recorded under tags, in a period.

parameters: {"object_names": ["LAN-01"], "tags": ["ActivePower"], "start": "2026-03-01 00:00:00",
             "end": "2026-03-02 00:00:00", "dry_run": true}; object_filter instead of object_names
steps:      one per object and tag
result:     {"found": 144, "deleted": 144}; with dry_run nothing is deleted

The window is [start, end): the sample at `end` stays, however the server counts. A step counts
what is there, deletes where there is something, in chunks of at most 30 days, and reads the window
again until nothing is left: it fails if that does not come. Deleting twice does no harm, so a step
that was interrupted is simply run again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import bazefield
import object_filter
from bazefield import STEP_OBJECTS_SQL, Lookup, waits
from jobs import TIME, JobInstance, JobRequestError, JobStepError, parse_time, query
from parameters import first_few, shorten

CHUNK_MS = timedelta(days=30) // timedelta(milliseconds=1)  # longest period of one delete
MOST_LEFT = 1000     # samples looked at when reading back
LATE_SECONDS = 15.0  # a server may delete after it has answered

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
            return [row[:2] for row in object_filter.select(self.connection,
                                                            self.parameters["object_filter"])]
        names = self.parameters["object_names"]
        ids = {name: object_id for object_id, name in
               query(self.connection, OBJECTS_SQL, {"names": names})}
        if missing := [shorten(repr(name), 80) for name in names if name not in ids]:
            raise JobRequestError("Nothing was deleted: unknown objects "
                                  f"{', '.join(first_few(missing))}; see the table objects; "
                                  "insert a corrected job")
        return [(ids[name], name) for name in names]

    def _run_step(self, step_id: int) -> dict[str, Any]:
        with bazefield.working() as client:
            if self._lookup is None:
                self._lookup = Lookup(client, query(self.connection, STEP_OBJECTS_SQL,
                                                    {"job_id": self.job_id}))
            series = Series(client, *self._lookup.point(
                self._lookup.bazefield_id(self.step["object_id"]), self.step["parameters"]["tag"]))
            start, end = parse_time(self.parameters["start"]), parse_time(self.parameters["end"])
            if self.parameters.get("dry_run"):
                return {"found": sum(1 for _ in series.times(start, end)), "deleted": 0,
                        "dry_run": True}
            found = series.delete(start, end)
            return {"found": found, "deleted": found}


class Series:
    """The samples of one point of one object."""

    def __init__(self, client: bazefield.Client, object_id: str, point: str) -> None:
        self.client, self.object_id, self.point = client, object_id, point

    def times(self, start: datetime, end: datetime) -> Iterator[int]:
        return self.client.sample_times(self.object_id, self.point, start, end)

    def delete(self, start: datetime, end: datetime) -> int:
        """Delete the samples in [start, end) and return how many there were.

        Raise `JobStepError` if any is left after all.
        """
        found = self._delete_chunks(start, end)
        if not found:
            return 0
        last = bazefield.to_ms(end) - 1
        left = self._left(start, end)
        if left and set(left) == {last}:
            # The server leaves out the sample at `to`, or somebody writes; either way `to` must
            # not be `end`, lest the sample there go with it.
            self._delete_last(last)
            left = self._left(start, end)
        if left:
            raise JobStepError(why_left(left, found))
        return found

    def _delete_chunks(self, start: datetime, end: datetime) -> int:
        """Delete wherever a chunk holds samples; return how many there were."""
        first, last = bazefield.to_ms(start), bazefield.to_ms(end) - 1
        found, filled = 0, set()
        for moment in self.times(start, end):
            found += 1
            filled.add((moment - first) // (CHUNK_MS - 1))
        for n in sorted(filled):
            # `to` is the first moment of the next chunk, so it matters only at the very end of the
            # window whether the server counts it in.
            since = first + n * (CHUNK_MS - 1)
            until = min(since + CHUNK_MS - 1, last)
            self.client.delete_samples(self.object_id, self.point, since, until)
        return found

    def _left(self, start: datetime, end: datetime) -> list[int]:
        """Return times still there, MOST_LEFT at most: the server may delete a little later."""
        for pause in (0.0, *waits(min(LATE_SECONDS, self.client.patience))):
            if pause:
                self.client.sleep(pause)
            if not (left := list(itertools.islice(self.times(start, end), MOST_LEFT))):
                break
        return left

    def _delete_last(self, last: int) -> None:
        try:
            self.client.delete_moment(self.object_id, self.point, last)
        except bazefield.BazefieldError as exc:
            raise JobStepError(
                f"All but the last millisecond ({bazefield.from_ms(last)}) is deleted; the sample "
                "there cannot be told apart from one at the end of the window, so it was left: "
                f"{exc}"
            ) from None


def why_left(left: list[int], found: int) -> str:
    """Return what is left of `found` samples, and what that suggests."""
    count = f"{len(left)}{' or more' if len(left) == MOST_LEFT else ''} of {found} samples"
    text = f"{count} are still there, the first at {bazefield.from_ms(left[0])}"
    if len(left) >= min(found, MOST_LEFT):
        return (f"{text}, though Bazefield reported no error: may the key's user write the data "
                "of this tag? (that right is separate from access to the object)")
    return f"{text}; is somebody writing to this tag? jobctl retry tries again"
