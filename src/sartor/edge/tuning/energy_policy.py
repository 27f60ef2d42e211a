"""Battery, mains and temperature rules for tuning.

    ROOT/class/power_supply/*/{type,scope,present,online,status,capacity}   Linux, ABI/testing/sysfs-class-power
    ROOT/class/thermal/thermal_zone*/{type,temp}                            Linux, ABI/testing/sysfs-class-thermal

What cannot be read, or cannot be so (a battery at 255 %, a zone at -274 degrees), is said and not guessed: a battery
that is being emptied and whose level is not known refuses, and so do thermal zones none of which can be read. On many
machines some zone is silent (a radio that is off), so one that is beside others is a note of `read`. A device that
shows no battery and no supply is plugged in; one that shows no thermal zone has no limit of warmth.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sartor.core.errors import ConfigError

# Between refusing and allowing again: levels hover, and a fan that comes on cools at once
BATTERY_MARGIN, TEMPERATURE_MARGIN_C = 0.05, 5.0
# What a sensor in a device can say: an LM75 ends at -55, silicon at 150
COLDEST_C, HOTTEST_C = -55.0, 150.0
# Lithium cells age fast above, and are not charged there (JEITA)
BATTERY_C = 45.0
# `stop` is asked a hundred times a second
LOOK_S = 5.0
OUTSIDE = ("Mains", "USB", "Wireless")

Plugged = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class PowerReading:
    """What sysfs says now. level: of the emptiest battery, 0..1, None without one. drains: a battery is emptied, or
    may be.

    zones: degrees C by type of thermal zone. faults: what was not to be read of supplies and batteries; notes: of the
    zones.
    """

    plugged: Plugged
    level: float | None
    drains: bool
    zones: dict[str, float]
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class EnergyPolicy:
    """When a device may tune. min_battery: 0..1, asked for while the battery is being emptied. ac_only: only plugged
    in.

    max_temperature_c: of every thermal zone; those of batteries may be BATTERY_C at most. Remembers what it refused: a
    battery must then be BATTERY_MARGIN fuller, and a zone TEMPERATURE_MARGIN_C cooler, before it allows again.
    """

    min_battery: float = 0.3
    ac_only: bool = False
    max_temperature_c: float = 80.0
    root: Path = Path("/sys")
    _refused: set[str] = field(default_factory=set, init=False, repr=False)
    _looked_at: float = field(default=float("-inf"), init=False, repr=False)
    _said: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.min_battery <= 1:
            raise ConfigError(f"min_battery is {self.min_battery}; it is a fraction, 0..1", "min_battery=0.3")
        if not COLDEST_C < self.max_temperature_c <= HOTTEST_C:
            raise ConfigError(f"max_temperature_c is {self.max_temperature_c}", f"at most {HOTTEST_C:g}, as 80.0")

    def refusal(self) -> str:
        """Why the device may not tune now; empty if it may."""
        reading = read_power(self.root)
        refused = dict(self._reasons(reading))
        self._refused = set(refused)
        return "; ".join(refused.values())

    def stop(self) -> bool:
        """Whether a tuning that runs is to end: for `limits.run`. Looks every LOOK_S at most."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_S:
            self._looked_at, self._said = now, self.refusal()
        return bool(self._said)

    def _reasons(self, reading: PowerReading) -> Iterator[tuple[str, str]]:
        """(what is remembered, the reason)."""
        if reading.faults and reading.drains and self.min_battery:
            yield "power", "; ".join(reading.faults)
        if self.ac_only and reading.plugged != "yes":
            yield (
                "plug",
                "it is not plugged in" if reading.plugged == "no" else "it does not say whether it is plugged in",
            )
        min_level = min(1.0, self.min_battery + BATTERY_MARGIN * ("battery" in self._refused))
        if reading.level is not None and reading.drains and reading.level < min_level:
            yield "battery", f"the battery is at {reading.level:.0%}, under {min_level:.0%}"
        if reading.notes and not reading.zones:
            yield "zones", "; ".join(reading.notes)
        for zone, celsius in reading.zones.items():
            limit_c = min(self.max_temperature_c, BATTERY_C) if "bat" in zone.lower() else self.max_temperature_c
            limit_c -= TEMPERATURE_MARGIN_C * (zone in self._refused)
            if celsius > limit_c:
                yield zone, f"{zone} is at {celsius:.1f} °C, over {limit_c:g} °C"


def read_power(root: Path = Path("/sys")) -> PowerReading:
    """What the device says of its power and its warmth."""
    plugs: list[Plugged] = []
    levels: list[float] = []
    states, faults, notes = [], [], []
    for supply in sorted((root / "class/power_supply").glob("*")):
        kind = _word(supply / "type")
        if _word(supply / "scope") == "Device" or _word(supply / "present") == "0":  # a mouse's; an empty bay
            continue
        if kind in ("Battery", "UPS"):
            states.append(_word(supply / "status"))
            level = _number(supply / "capacity", 0, 100)
            if level is None:
                faults.append(f"{supply.name} says {_word(supply / 'capacity')!r:.40} for its level in percent")
            else:
                levels.append(level / 100)
        elif kind.startswith(OUTSIDE):
            plugs.append(_plugged(_word(supply / "online")))
        else:
            faults.append(f"{supply.name} says {kind!r:.40} for what it is")
    plugged = _plugged_in(plugs, states)
    zones: dict[str, float] = {}
    for zone in sorted((root / "class/thermal").glob("thermal_zone*")):
        celsius = _number(zone / "temp", COLDEST_C * 1000, HOTTEST_C * 1000)
        name = _unique_name(_word(zone / "type") or zone.name, zone.name, zones)
        if celsius is None:
            notes.append(f"the thermal zone {name} says {_word(zone / 'temp')!r:.40} for its thousandths of a degree")
        else:
            zones[name] = celsius / 1000
    drains = plugged != "yes" or "Discharging" in states
    return PowerReading(plugged, min(levels, default=None), drains, zones, tuple(faults), tuple(notes))


def _plugged(online: str) -> Plugged:
    """2 is online too: a supply whose voltage can be set."""
    return {"0": "no", "1": "yes", "2": "yes"}.get(online, "unknown")  # type: ignore[return-value]


def _plugged_in(plugs: list[Plugged], states: list[str]) -> Plugged:
    """By the supplies; where there is none, by what the batteries do."""
    if "yes" in plugs:
        return "yes"
    if "unknown" in plugs:
        return "unknown"
    if plugs:
        return "no"
    if "Discharging" in states:
        return "no"
    return "yes" if all(state in ("Charging", "Full") for state in states) else "unknown"


def _unique_name(name: str, suffix: str, zones: dict[str, float]) -> str:
    return f"{name} ({suffix})" if name in zones else name


def _word(file: Path) -> str:
    """What a file says; empty where there is none, or the driver has no answer."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(file: Path, low: float, high: float) -> float | None:
    """The number in a file, if it is one and can be so."""
    try:
        value = int(_word(file))
    except ValueError:
        return None
    return float(value) if low <= value <= high else None
