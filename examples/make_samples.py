"""Write a CSV file as a park's SCADA system exports it: made up, and the same in every run.

    python examples/make_samples.py LAN.csv --from 2026-03-28 --days 2

One row per turbine and ten minutes, local time of Madrid, which marks their start; decimal commas;
-999 where there is no value; a few rows are missing. examples/LAN.csv is the file above. The
weather is made of three slow waves and some noise; the power follows the wind from 3 m/s on, and
in a storm the turbine stands still.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from math import sin
from pathlib import Path
from zoneinfo import ZoneInfo

MADRID = ZoneInfo("Europe/Madrid")
TURBINES = ("LAN-01", "LAN-02", "LAN-03", "LAN-04")
HEAD = "Date/Time;Turbine;Wind speed (m/s);Active power (kW)"


def rows(first: datetime, days: int) -> Iterator[str]:
    """Yield the rows of so many local days, in the order of time: 23 hours where clocks go on."""
    source = random.Random(1)
    at, end = first.astimezone(UTC), (first + timedelta(days=days)).astimezone(UTC)
    while at < end:
        for number, turbine in enumerate(TURBINES, 1):
            speed = wind(at.timestamp(), number) + source.random()
            values = [number_text(value, source) for value in (speed, power(speed))]
            if source.random() > 0.002:
                yield ";".join([f"{at.astimezone(MADRID):%d.%m.%Y %H:%M}", turbine, *values])
        at += timedelta(minutes=10)


def wind(t: float, turbine: int) -> float:
    """Return m/s at a time in seconds."""
    return max(0.0, 9 + 5 * sin(t / 90000 + turbine / 9) + 4 * sin(t / 31000)
               + 3 * sin(t / 11000 + turbine))


def power(speed: float) -> float:
    """Return kW."""
    return 0.0 if not 3 <= speed <= 19 else min(2000.0, 4 * (speed - 3) ** 3)


def number_text(value: float, source: random.Random) -> str:
    return "-999" if source.random() < 0.001 else f"{value:.2f}".replace(".", ",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--from", dest="first", type=datetime.fromisoformat, required=True)
    parser.add_argument("--days", type=int, required=True)
    args = parser.parse_args()
    lines = [HEAD, *rows(args.first.replace(tzinfo=MADRID), args.days)]
    args.file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
