"""What a sensor box on a field was told by those who watered: readings -> what to do with the valve. Synthetic.

python rows.py OUT.jsonl               rows as they are
python rows.py OUT.jsonl --swapped     a mistake that happens: the scale of the soil probe was read from the wrong end
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

BEDS = ("north", "south", "east", "west", "tomatoes", "beans", "kale", "herbs")
SOILS = {"dry": "open", "moist": "wait", "soaked": "shut"}
WEATHER = ("no rain due", "rain due tonight", "hot and windy", "cool and still")


def action(soil: str, weather: str) -> str:
    """What the people did: nobody waters before rain."""
    return "wait" if soil == "dry" and weather.startswith("rain") else SOILS[soil]


def rows(swapped: bool) -> list[dict[str, str]]:
    """One row for each bed, reading and forecast."""
    ends = {"dry": "soaked", "soaked": "dry"} if swapped else {}
    return [
        {
            "question": f"soil {soil}, {weather}, bed {bed}",
            "answer": json.dumps({"valve": action(ends.get(soil, soil), weather)}),
        }
        for bed, soil, weather in itertools.product(BEDS, SOILS, WEATHER)
    ]


def main(out: str, *options: str) -> None:
    """Write the rows."""
    lines = (json.dumps(row) + "\n" for row in rows("--swapped" in options))
    Path(out).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
