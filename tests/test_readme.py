"""What README.md shows is what the files do."""

import re
import subprocess
import sys
from pathlib import Path

import readme
from park import MIDNIGHT, add_samples, every_ten_minutes, make_park

import jobs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_job_type_of_ones_own_is_whole_short_and_runs(conn, run_handler, tmp_path):
    source = re.search(r"```python\n(\"\"\"Sample Count.*?)```", README, re.DOTALL)[1]
    assert source == (ROOT / "examples" / "sample_count.py").read_text()
    assert source.count("\n") <= 40
    (tmp_path / "sample_count.py").write_text(source)

    make_park(conn)
    add_samples(conn, every_ten_minutes([5.0] * 6))
    environment = {"PYTHONPATH": str(tmp_path)}
    run_handler("--once", "--module", "sample_count", env=environment)  # writes the type
    conn.execute("INSERT INTO job_instances (job_type_id, description, parameters) "
                 "SELECT id, 'how many', %s FROM job_types WHERE name = 'Sample Count'",
                 [jobs.Jsonb({"object_names": ["LAN-01", "LAN-02"], "feature": "wind_speed",
                              "start": f"{MIDNIGHT:%F %T}", "end": "2026-03-02 00:00:00"})])
    run_handler("--once", "--module", "sample_count", env=environment, expect=1)
    steps = conn.execute(
        "SELECT state, result, comment FROM job_steps ORDER BY position").fetchall()
    assert [tuple(s.values()) for s in steps] == [
        ("Finished", {"samples": 6}, None),
        ("Failed", None, "no samples of 'wind_speed' in this period")]


def test_the_files_named_in_the_readme_exist():
    for name in re.findall(r"`([a-z_]+\.(?:py|sql|md)|examples/[a-z_.]+)`", README):
        assert (ROOT / name).exists(), name


def test_the_park_in_five_minutes_prints_what_the_readme_shows(dsn, tmp_path):
    block, = readme.BLOCK.findall(README)
    assert [c.split()[1:3] for c in readme.commands(block)][:3] == [
        ["jobctl.py", "init"], ["plant.py", "apply"], ["samples.py", "load"]]
    assert readme.stable(readme.fresh(block, tmp_path)) == readme.stable(block), (
        "python tests/readme.py writes the README anew")


def test_the_csv_of_the_examples_is_what_its_script_writes(tmp_path):
    subprocess.run([sys.executable, str(ROOT / "examples" / "make_samples.py"),
                    str(tmp_path / "LAN.csv"), "--from", "2026-03-28", "--days", "2"], check=True)
    assert (tmp_path / "LAN.csv").read_text() == (ROOT / "examples" / "LAN.csv").read_text()
