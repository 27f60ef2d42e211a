"""Battery, mains and temperature rules for tuning.

    ROOT/class/power_supply/*/{type,scope,present,online,status,capacity}   Linux, ABI/testing/sysfs-class-power
    ROOT/class/thermal/thermal_zone*/{type,temp}                            Linux, ABI/testing/sysfs-class-thermal

Values that cannot be read or are impossible (a battery at 255 %, a zone at -274 degrees) are reported, not guessed. A
discharging battery of unknown level refuses, and so do thermal zones none of which can be read. On many machines some
zone gives no value (a radio that is off), so one unreadable zone beside others is only a note of `read_power`. A
device without a battery and a supply counts as plugged in. One without a thermal zone has no temperature limit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sartor.core.errors import ConfigError

# Hysteresis between refusing and allowing again: levels fluctuate, and a fan that starts cools at once
BATTERY_MARGIN, TEMPERATURE_MARGIN_C = 0.05, 5.0
# Possible values of a device's sensor: an LM75 ends at -55, silicon at 150
COLDEST_C, HOTTEST_C = -55.0, 150.0
# Lithium cells age fast above this, and are not charged there (JEITA)
BATTERY_C = 45.0
# Interval of readings: `stop` is called a hundred times a second
LOOK_S = 5.0
OUTSIDE = ("Mains", "USB", "Wireless")

Plugged = Literal["yes", "no", "unknown"]
# value of a supply's `online`; 2 is a supply with a programmable voltage
_ONLINE: Mapping[str, Plugged] = {"0": "no", "1": "yes", "2": "yes"}


@dataclass(frozen=True)
class PowerReading:
    """Present values of sysfs.

    level: of the emptiest battery, 0..1; None without one.
    drains: whether a battery is discharging, or may be.
    zones: degrees C by type of thermal zone.
    faults: values of supplies and batteries that could not be read.
    notes: values of zones that could not be read.
    """

    plugged: Plugged
    level: float | None
    drains: bool
    zones: dict[str, float]
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class EnergyPolicy:
    """Conditions under which a device may tune.

    min_battery: 0..1; it applies while the battery is discharging.
    ac_only: only if plugged in.
    max_temperature_c: of every thermal zone; those of batteries may be BATTERY_C at most.

    The policy remembers its refusals. Before it allows again, a battery must be BATTERY_MARGIN fuller, and a zone
    TEMPERATURE_MARGIN_C cooler.
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
        """Return why the device may not tune now; empty if it may."""
        reading = read_power(self.root)
        refused = dict(self._reasons(reading))
        self._refused = set(refused)
        return "; ".join(refused.values())

    def stop(self) -> bool:
        """Return whether a running tuning has to end, for `resource_limits.run`.

        It reads the sensors at most every LOOK_S.
        """
        now = time.monotonic()
        if now - self._looked_at >= LOOK_S:
            self._looked_at, self._said = now, self.refusal()
        return bool(self._said)

    def _reasons(self, reading: PowerReading) -> Iterator[tuple[str, str]]:
        """Yield (key to remember, reason) of each refusal."""
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
    """Read the power supplies and temperatures of the device."""
    plugs: list[Plugged] = []
    levels: list[float] = []
    states, faults, notes = [], [], []
    for supply in sorted((root / "class/power_supply").glob("*")):
        kind = _word(supply / "type")
        if _word(supply / "scope") == "Device" or _word(supply / "present") == "0":  # a mouse's battery; an empty bay
            continue
        if kind in ("Battery", "UPS"):
            states.append(_word(supply / "status"))
            level = _number(supply / "capacity", 0, 100)
            if level is None:
                faults.append(f"{supply.name} says {_word(supply / 'capacity')!r:.40} for its level in percent")
            else:
                levels.append(level / 100)
        elif kind.startswith(OUTSIDE):
            plugs.append(_ONLINE.get(_word(supply / "online"), "unknown"))
        else:
            faults.append(f"{supply.name} says {kind!r:.40} for what it is")
    plugged = _plugged_in(plugs, states)
    zones: dict[str, float] = {}
    for zone in sorted((root / "class/thermal").glob("thermal_zone*")):
        celsius = _number(zone / "temp", COLDEST_C * 1000, HOTTEST_C * 1000)
        name = _word(zone / "type") or zone.name
        if name in zones:  # another zone has it
            name = f"{name} ({zone.name})"
        if celsius is None:
            notes.append(f"the thermal zone {name} says {_word(zone / 'temp')!r:.40} for its thousandths of a degree")
        else:
            zones[name] = celsius / 1000
    drains = plugged != "yes" or "Discharging" in states
    return PowerReading(
        plugged=plugged,
        level=min(levels, default=None),
        drains=drains,
        zones=zones,
        faults=tuple(faults),
        notes=tuple(notes),
    )


def _plugged_in(plugs: list[Plugged], states: list[str]) -> Plugged:
    """Return whether the device is plugged in, by its supplies; without any, by its batteries' states."""
    if "yes" in plugs:
        return "yes"
    if "unknown" in plugs:
        return "unknown"
    if plugs:
        return "no"
    if "Discharging" in states:
        return "no"
    return "yes" if all(state in ("Charging", "Full") for state in states) else "unknown"


def _word(file: Path) -> str:
    """Return the text of a file; empty if it is missing, or if the driver gives no value."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(file: Path, low: float, high: float) -> float | None:
    """Return the integer in a file, or None if it is none or out of range."""
    try:
        value = int(_word(file))
    except ValueError:
        return None
    return float(value) if low <= value <= high else None
