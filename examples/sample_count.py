"""Sample Count: how many samples of a feature does each object have in a period?"""

from jobs import TIME, JobInstance, JobStepError, parse_time

OBJECTS_SQL = "SELECT id, name FROM objects WHERE name = ANY(%s) ORDER BY name"
COUNT_SQL = """
SELECT count(value)
  FROM feature_values v
  JOIN features f ON f.id = v.feature_id
 WHERE v.object_id = %(object_id)s AND f.name = %(feature)s
   AND v.timestamp > %(start)s AND v.timestamp <= %(end)s
"""


class JobSampleCount(JobInstance):
    """Count the samples of a feature for a list of objects."""

    _name = "Sample Count"
    _step_in_transaction = True  # its steps touch this database only
    _parameters_schema = {
        "type": "object",
        "required": ["object_names", "feature", "start", "end"],
        "additionalProperties": False,
        "properties": {"object_names": {"type": "array", "items": {"type": "string"}},
                       "feature": {"type": "string"}, "start": TIME, "end": TIME},
    }

    def _create_steps(self):
        rows = self.connection.execute(OBJECTS_SQL, [self.parameters["object_names"]])
        return [{"name": name, "object_id": object_id} for object_id, name in rows]

    def _run_step(self, step_id):
        period = {key: parse_time(self.parameters[key]) for key in ("start", "end")}
        (count,) = self.connection.execute(
            COUNT_SQL, self.parameters | self.step | period).fetchone()
        if not count:
            raise JobStepError(f"no samples of {self.parameters['feature']!r} in this period")
        return {"samples": count}
