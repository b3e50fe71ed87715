"""Which objects does a filter select?

    {"selected": {"parent": ["LAN"], "instances": ["KOR-07"]}, "ignored": {"models": ["G97"]}}

Each half may name `instances` (objects), `types`, `models` and `parent`: the union of what
`selected` names, less the union of what `ignored` names. `parent` means the leaves (turbines,
inverters) below it.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from jobs import JobRequestError, query
from parameters import first_few, shorten

_NAMES = {"type": "array", "items": {"type": "string", "minLength": 1}}
_HALF = {"type": "object", "additionalProperties": False,
         "properties": dict.fromkeys(("instances", "types", "models", "parent"), _NAMES)}

#: JSON Schema of an object filter
OBJECT_FILTER = {"type": "object", "required": ["selected"], "additionalProperties": False,
                 "properties": {"selected": _HALF, "ignored": _HALF}}

# named: every name of the filter with what it stands for; one that stands for nothing has id NULL.
# below: the tree under the parents. UNION, not UNION ALL: a circle of parents would never end.
SELECT_SQL = """
WITH RECURSIVE asked AS (
    SELECT half.key AS half, kind.key AS kind, name
      FROM jsonb_each(%(filter)s::jsonb) AS half,
           jsonb_each(half.value) AS kind,
           jsonb_array_elements_text(kind.value) AS name
), below AS (
    SELECT asked.half, asked.name, o.id, false AS is_below
      FROM asked
      JOIN objects o ON o.name = asked.name
     WHERE asked.kind = 'parent'
     UNION
    SELECT below.half, below.name, o.id, true
      FROM below
      JOIN objects o ON o.parent_id = below.id
), named AS (
    SELECT asked.half, asked.kind, asked.name, o.id
      FROM asked
      LEFT JOIN (objects o
                 JOIN object_models m ON m.id = o.object_model_id
                 JOIN object_types t  ON t.id = m.object_type_id
                CROSS JOIN LATERAL (VALUES ('instances', o.name), ('models', m.name),
                                           ('types', t.name)) AS called (kind, name))
             ON called.kind = asked.kind
            AND called.name = asked.name
     WHERE asked.kind <> 'parent'
     UNION
    SELECT asked.half, asked.kind, asked.name, leaf.id
      FROM asked
      LEFT JOIN below leaf ON leaf.half = asked.half
                          AND leaf.name = asked.name
                          AND leaf.is_below
                          AND NOT EXISTS (SELECT FROM objects child
                                           WHERE child.parent_id = leaf.id)
     WHERE asked.kind = 'parent'
)
SELECT o.id, o.name, o.bazefield_id,
       ARRAY(SELECT half || '.' || kind || ' ' || quote_literal(name)
               FROM named
              WHERE id IS NULL
              ORDER BY 1)
  FROM (SELECT 1) AS always
  LEFT JOIN objects o ON o.id IN (SELECT id FROM named WHERE half = 'selected')
                     AND o.id NOT IN (SELECT id FROM named
                                       WHERE half = 'ignored' AND id IS NOT NULL)
                     AND NOT EXISTS (SELECT FROM named WHERE id IS NULL)  -- else on every row
 ORDER BY o.name
"""


def select(connection: psycopg.Connection,
           object_filter: dict[str, Any]) -> list[tuple[int, str, str | None]]:
    """Return (id, name, bazefield_id) of the objects a filter selects, by name.

    Raise `JobRequestError` if `selected` names nothing, a name stands for nothing, or nothing is
    left.
    """
    if not any(object_filter["selected"].values()):
        raise JobRequestError("object_filter.selected is empty: name instances, types, models or "
                              "parent")
    rows = query(connection, SELECT_SQL, {"filter": Jsonb(object_filter)})
    if unknown := rows[0][3]:
        shown = first_few([shorten(name, 100) for name in unknown])
        raise JobRequestError("object_filter names what no object has, or a parent with nothing "
                              f"below it: {', '.join(shown)}; see objects, object_models, "
                              "object_types")
    if rows[0][0] is None:
        raise JobRequestError("object_filter: nothing is left of selected after ignored was taken "
                              "out")
    return [row[:3] for row in rows]
