"""The energy policy on trees as sysfs has them: what it allows, what it refuses, and what it cannot know."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sartor.core.errors import ConfigError
from sartor.edge.tuning import energy_policy
from sartor.edge.tuning.energy_policy import EnergyPolicy, read_power


def write(root: Path, **files: str) -> Path:
    """`BAT0__status="Full"` writes class/power_supply/BAT0/status; a name with `zone` goes to class/thermal."""
    for name, content in files.items():
        device, file = name.split("__")
        folder = root / "class" / ("thermal" if "zone" in device else "power_supply") / device
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content + "\n")
    return root


def battery(root: Path, capacity: str, status: str = "Discharging") -> Path:
    return write(root, BAT0__type="Battery", BAT0__capacity=capacity, BAT0__status=status)


def test_a_device_without_battery_supply_or_zones_may_always_run(tmp_path: Path) -> None:
    assert EnergyPolicy(ac_only=True, root=tmp_path).refusal() == ""
    assert EnergyPolicy(ac_only=True, root=tmp_path / "absent").refusal() == ""
    assert read_power(tmp_path).plugged == "yes"


def test_a_low_battery_refuses_until_it_is_fuller_by_the_margin(tmp_path: Path) -> None:
    policy = EnergyPolicy(min_battery=0.3, root=tmp_path)
    for capacity, refuses in (
        ("31", False),
        ("30", False),
        ("29", True),
        ("30", True),
        ("34", True),
        ("35", False),
        ("31", False),
    ):
        battery(tmp_path, capacity)
        assert bool(policy.refusal()) is refuses, capacity
    battery(tmp_path, "29")
    assert policy.refusal() == "the battery is at 29%, under 30%"
    assert policy.refusal() == "the battery is at 29%, under 35%"


def test_battery_level_counts_only_while_discharging(tmp_path: Path) -> None:
    """A battery that discharges although mains power is on counts all the same."""
    policy = EnergyPolicy(root=write(battery(tmp_path, "5", "Charging"), AC__type="Mains", AC__online="1"))
    assert policy.refusal() == ""
    battery(tmp_path, "5", "Discharging")
    assert "at 5%" in policy.refusal()


@pytest.mark.parametrize(
    ("files", "plugged"),
    [
        ({"AC__type": "Mains", "AC__online": "0"}, "no"),
        ({"AC__type": "Mains", "AC__online": "1"}, "yes"),
        ({"u__type": "USB_PD", "u__online": "2", "AC__type": "Mains", "AC__online": "0"}, "yes"),
        ({"AC__type": "Mains", "AC__online": "maybe"}, "unknown"),
        ({"BAT0__type": "Battery", "BAT0__status": "Discharging", "BAT0__capacity": "90"}, "no"),
        ({"BAT0__type": "Battery", "BAT0__status": "Full", "BAT0__capacity": "100"}, "yes"),
        ({"BAT0__type": "Battery", "BAT0__status": "Not charging", "BAT0__capacity": "80"}, "unknown"),
        ({"ups__type": "UPS", "ups__status": "Discharging", "ups__capacity": "80"}, "no"),
        (
            {
                "mouse__type": "Battery",
                "mouse__scope": "Device",
                "mouse__status": "Discharging",
                "mouse__capacity": "3",
            },
            "yes",
        ),
        ({"BAT1__type": "Battery", "BAT1__present": "0"}, "yes"),
    ],
)
def test_whether_it_is_plugged_in(tmp_path: Path, files: dict[str, str], plugged: str) -> None:
    write(tmp_path, **files)
    assert read_power(tmp_path).plugged == plugged
    refusal = EnergyPolicy(ac_only=True, root=tmp_path).refusal()
    assert {"yes": refusal == "", "no": "not plugged in" in refusal, "unknown": "does not say" in refusal}[plugged]
    assert EnergyPolicy(root=tmp_path).refusal() == ""


def test_the_emptiest_battery_counts(tmp_path: Path) -> None:
    battery(tmp_path, "90")
    write(tmp_path, BAT1__type="Battery", BAT1__status="Discharging", BAT1__capacity="12")
    assert "at 12%" in EnergyPolicy(root=tmp_path).refusal()


@pytest.mark.parametrize("capacity", ["", "255", "-3", "half"])
def test_a_level_that_cannot_be_is_said_and_not_guessed(tmp_path: Path, capacity: str) -> None:
    battery(tmp_path, capacity)
    assert f"BAT0 says {capacity!r}" in EnergyPolicy(root=tmp_path).refusal()
    write(battery(tmp_path, capacity, "Charging"), AC__type="Mains", AC__online="1")
    assert EnergyPolicy(root=tmp_path).refusal() == ""


def test_warmth_refuses_until_it_is_cooler_by_the_margin(tmp_path: Path) -> None:
    policy = EnergyPolicy(max_temperature_c=70, root=tmp_path)
    for temperature, refuses in (
        ("70000", False),
        ("70001", True),
        ("66000", True),
        ("65000", False),
        ("69000", False),
    ):
        write(tmp_path, thermal_zone0__type="cpu-thermal", thermal_zone0__temp=temperature)
        assert bool(policy.refusal()) is refuses, temperature
    write(tmp_path, thermal_zone1__type="cpu-thermal", thermal_zone1__temp="91000")
    assert policy.refusal() == "cpu-thermal (thermal_zone1) is at 91.0 °C, over 70 °C"
    write(tmp_path, thermal_zone1__type="battery", thermal_zone1__temp="46000")
    assert "over 45" in policy.refusal()


def test_a_silent_zone_is_a_note_and_only_silent_zones_refuse(tmp_path: Path) -> None:
    write(tmp_path, thermal_zone0__type="iwlwifi", thermal_zone0__temp="-274000")
    assert "iwlwifi says '-274000'" in EnergyPolicy(root=tmp_path).refusal()
    write(tmp_path, thermal_zone1__type="x86_pkg_temp", thermal_zone1__temp="50000")
    assert EnergyPolicy(root=tmp_path).refusal() == ""
    assert len(read_power(tmp_path).notes) == 1


def test_a_supply_of_no_known_kind_is_said(tmp_path: Path) -> None:
    write(battery(tmp_path, "90"), odd__type="Perpetuum")
    assert "odd says 'Perpetuum'" in EnergyPolicy(root=tmp_path).refusal()


@pytest.mark.parametrize("wrong", [{"min_battery": 30}, {"max_temperature_c": 800}])
def test_a_policy_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        EnergyPolicy(**wrong)  # type: ignore[arg-type]


def test_stop_looks_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(energy_policy.time, "monotonic", lambda: now[0])
    policy = EnergyPolicy(root=battery(tmp_path, "90"))
    assert not policy.stop()
    battery(tmp_path, "9")
    assert not policy.stop()
    now[0] += energy_policy.LOOK_S
    assert policy.stop()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=60))
def test_it_does_not_flap(tmp_path_factory: pytest.TempPathFactory, levels: list[int]) -> None:
    """Between allowing and refusing the level has moved by the margin at least."""
    root = tmp_path_factory.mktemp("sys")
    policy = EnergyPolicy(min_battery=0.5, root=root)
    refused, turned_at = False, None
    for level in levels:
        battery(root, str(level))
        if bool(policy.refusal()) is not refused:
            refused = not refused
            if not refused:
                assert turned_at is not None and level - turned_at >= 5
            turned_at = level
