"""Whatever stands in job_instances.parameters, there is a sentence for it, and soon."""

import random
import time

import pytest

from alarm_calc import JobAlarmCalc
from parameters import JobRequestError, check_schema, explain_parameters, parse, schema_problems

NAMES = {"properties": {"names": {"type": "array", "items": {"type": "string"}}}}


def test_a_json_object_is_read():
    assert parse('{"a": [1, 1.5, null, true, {"b": "\\u00e9 \\\\u0000"}]}') == {
        "a": [1, 1.5, None, True, {"b": "é \\u0000"}]}
    assert parse('{"n": %s}' % ("9" * 300)) == {"n": int("9" * 300)}
    assert parse('{"n": 0.%s1}' % ("0" * 5000)) == {"n": 0.0}


@pytest.mark.parametrize(("text", "said"), [
    pytest.param('{"n": %s}' % ("9" * 5000), "is no number of at most 300 digits", id="5000"),
    ('{"n": 1e999}', "hold 1e999, which is no number"),
    ('{"n": -1e999}', "hold -1e999, which is no number"),
    ('{"n": NaN}', "hold NaN, which is no number"),
    ('{"n": -Infinity}', "hold -Infinity, which is no number"),
    pytest.param('{"n": %s}' % ("[" * 1500 + "]" * 1500), "deeper than 100 levels", id="1,500"),
    pytest.param('{"n": %s}' % ("[" * 100 + "]" * 100), "deeper than 100 levels", id="101"),
    pytest.param('{"n": %s' % ("[" * 200_000), "deeper than 100 levels", id="200,000"),
    ('{"n": "\\ud800"}', "one half of a surrogate pair"),
    ('{"n": "\\\\\\u0000"}', "hold \\\\u0000"),
    ("[1]", r"the parameters are \[1\]; write a JSON object"),
    ("", "not JSON: Expecting value"),
])
def test_what_cannot_be_read_is_said(text, said):
    with pytest.raises(JobRequestError, match=said) as exc:
        parse(text)
    assert len(str(exc.value)) < 300


def test_what_can_be_read_can_be_checked_down_to_the_last_level():
    tree = {"$ref": "#/$defs/tree",
            "$defs": {"tree": {"properties": {"a": {"$ref": "#/$defs/tree"}}, "required": ["a"]}}}
    text = '{"a": ' * 99 + "{}" + "}" * 99
    (problem,) = schema_problems(parse(text), tree)
    assert problem.endswith("'a' is a required property")


def test_checking_takes_time_in_proportion():
    """8,000 names of mixed types took 20 s and made a comment of 211,000 characters."""
    rng = random.Random(1)
    names = [rng.choice([n, str(n), n + 0.5, [n], {"a": n}]) for n in range(8000)]
    march = {"alarm_ids": [1], "start": "2026-03-01 00:00:00", "end": "2026-04-01 00:00:00"}
    before = time.process_time()
    problems = schema_problems(march | {"object_names": names}, JobAlarmCalc._parameters_schema)
    assert time.process_time() - before < 3  # a tenth of a second, where it is not 20
    assert len(problems) == sum(not isinstance(name, str) for name in names)
    text = explain_parameters(problems, JobAlarmCalc._parameters_schema)
    assert f"and {len(problems) - 10} more" in text
    assert len(text) < 5000


def test_ten_problems_are_shown_in_their_order_and_the_rest_counted():
    problems = schema_problems({"names": list(range(12))}, NAMES)
    assert problems[2] == "$.names[2]: 2 is not of type 'string'"
    assert explain_parameters(problems, NAMES).splitlines()[10:] == [
        "  $.names[9]: 9 is not of type 'string'", "  and 2 more", "  known parameters: names"]
    assert "more" not in explain_parameters(problems[:10], NAMES)


def test_a_huge_value_is_quoted_at_both_ends():
    (problem,) = schema_problems({"names": "x" * 100_000}, NAMES)
    assert problem.startswith("$.names: 'xxx")
    assert problem.endswith("xxx' is not of type 'array'")
    assert len(problem) < 400
    (problem,) = schema_problems({"k" * 9999: 1}, {"additionalProperties": {"type": "string"}})
    assert len(problem) < 400


@pytest.mark.parametrize(("items", "twice"), [
    ([1, True, "1", [1], {"a": 1}, None, 0, False], None),
    ([1, 1.0], "1.0 is there twice, as items 0 and 1"),
    ([[1, [2]], 3, [1, [2.0]]], "[1, [2.0]] is there twice, as items 0 and 2"),
    ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], "{'b': 2, 'a': 1} is there twice, as items 0 and 1"),
    ([[], {}], None), ([True, 1], None), ([0, False], None),
    (["a", "a"], "'a' is there twice, as items 0 and 1"),
])
def test_items_are_equal_as_json_schema_says(items, twice):
    assert schema_problems(items, {"uniqueItems": True}) == ([f"$: {twice}"] if twice else [])
    assert schema_problems(items, {"uniqueItems": False}) == []


@pytest.mark.parametrize(("schema", "said"), [
    ({"$ref": "#"}, "maximum recursion depth exceeded"),
    ({"patternProperties": {"(": {}}}, "unterminated"),
    ({"type": "park"}, "park"),
])
def test_a_schema_that_cannot_be_used_is_a_problem_and_no_crash(schema, said):
    (problem,) = schema_problems({"a": 1}, schema)
    assert problem.startswith("$: cannot be checked by the type's schema: ")
    assert said in problem


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_is_fetched(tmp_path):
    (tmp_path / "schema.json").write_text('{"required": ["z"]}')
    url = (tmp_path / "schema.json").as_uri()
    (problem,) = schema_problems({}, {"$ref": url})
    assert problem == f"$: cannot be checked by the type's schema: Unresolvable: {url}"


@pytest.mark.parametrize(("schema", "said"), [
    ({"properties": {"a": {"$ref": "http://example.org/a"}}}, "refers to 'http://example.org/a'"),
    ({"allOf": [{"$ref": "other.json#/a"}]}, "refers to 'other.json#/a'"),
    ({"$defs": {"a": {"$dynamicRef": "x"}}}, "refers to 'x'"),
    ({"type": "park"}, r"no JSON Schema \(2020-12\): \$.type: 'park' is not valid"),
    ({"properties": {"a": {"minimum": "1"}}}, r"\$.properties.a.minimum: '1' is not of type"),
])
def test_a_schema_is_checked_where_it_is_written(schema, said):
    with pytest.raises(ValueError, match="the parameters schema of job type 'Park' .*" + said):
        check_schema(schema, "Park")


def test_a_schema_may_refer_to_itself():
    schema = {"$defs": {"name": {"type": "string"}}, "items": {"$ref": "#/$defs/name"}}
    check_schema(schema, "Park")
    assert schema_problems([1], schema) == ["$[0]: 1 is not of type 'string'"]


def test_an_empty_run_does_not_import_jsonschema(conn, run_handler, tmp_path):
    """It takes longer than all the rest of it."""
    run_handler("--once")  # writes the types, and checks their schemas
    (tmp_path / "jsonschema.py").write_text("raise SystemExit(7)")
    run_handler("--once", env={"PYTHONPATH": str(tmp_path)})


def test_a_type_whose_schema_is_none_is_said_and_the_jobs_go_on(conn, run_handler, tmp_path):
    (tmp_path / "odd.py").write_text(
        "import jobs\nclass Odd(jobs.JobInstance):\n"
        "    _name = 'Odd'\n    _parameters_schema = {'type': 'park'}\n")
    done = run_handler("--once", "--module", "odd", env={"PYTHONPATH": str(tmp_path)})
    assert "the parameters schema of job type 'Odd' is no JSON Schema" in done.stderr
