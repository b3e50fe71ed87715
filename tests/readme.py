"""Run the commands that README.md shows, and put what they really print below them.

    python tests/readme.py        rewrites README.md

A block of it begins with `$ python`; a command goes on over lines until its quotes are closed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?<=```\n)\$ python .*?(?=```)", re.DOTALL)

# What differs from run to run, or from one machine to the next.
VOLATILE = [(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?=\n)", "TIME"), (r"[\d.]+ m?s\b", "SPAN"),
            (r"-{3,}", "---"), (r" +", " ")]


def commands(block: str) -> Iterator[str]:
    """Yield the commands of a block, each as a shell takes it."""
    lines = iter(block.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line[2:]
            while not is_whole(command):
                command += "\n" + next(lines)
            yield command


def is_whole(command: str) -> bool:
    try:
        shlex.split(command)
    except ValueError:  # no closing quotation
        return False
    return not command.endswith("\\")


def fresh(block: str, directory: Path) -> str:
    """Run the commands of a block in `directory` and return it with what they print."""
    for source in (*ROOT.glob("*.py"), ROOT / "schema.sql", ROOT / "examples"):
        if not (directory / source.name).exists():
            (directory / source.name).symlink_to(source)
    said = ""
    for command in commands(block):
        said += f"$ {command}\n"
        if (directory / command.split()[1]).exists():
            said += run(command, directory)
    return said


def run(command: str, directory: Path) -> str:
    python = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    done = subprocess.run(["sh", "-c", python], cwd=directory, capture_output=True, text=True,
                          check=False, env=os.environ | {"COLUMNS": "130"})
    return done.stdout + done.stderr


def stable(text: str) -> str:
    """Return the text without what differs from run to run."""
    for pattern, word in VOLATILE:
        text = re.sub(pattern, word, text)
    return text


def main() -> None:
    from embedded_pg import Server
    readme = ROOT / "README.md"
    with Server() as server, tempfile.TemporaryDirectory() as directory:
        os.environ |= {"PERFDB_DSN": server.dsn()}
        text = BLOCK.sub(lambda block: fresh(block[0], Path(directory)), readme.read_text())
    readme.write_text(text)


if __name__ == "__main__":
    main()
