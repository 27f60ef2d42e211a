"""Whatever stands in an input from outside, its parser reads it or refuses it with a remedy, in bounded memory and time."""

from __future__ import annotations

from pathlib import Path

import pytest

import fuzzing
from fuzz_parsers import PARSERS

KEPT = [(name, file) for name in PARSERS for file in fuzzing.cases(name)]


@pytest.mark.services
@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of a find
@pytest.mark.parametrize("name", PARSERS)
def test_mutated_input_is_parsed_or_refused(name: str, tmp_path: Path) -> None:
    """SARTOR_FUZZ_EXAMPLES inputs, the same in every run: 1,000 in CI, 10,000 by `make fuzz`."""
    fuzzing.fuzz(PARSERS[name], tmp_path)


@pytest.mark.parametrize("name", PARSERS)
def test_valid_input_is_parsed(name: str, tmp_path: Path) -> None:
    """Otherwise the mutations would never get further than the first check."""
    for seed in PARSERS[name].seeds():
        PARSERS[name].parse(seed, tmp_path)


@pytest.mark.parametrize(("name", "file"), KEPT, ids=[f"{name}-{file.name}" for name, file in KEPT])
def test_kept_case_is_parsed_or_refused(name: str, file: Path, tmp_path: Path) -> None:
    fuzzing.warm_up(PARSERS[name], tmp_path)
    fuzzing.check(PARSERS[name], file.read_bytes(), tmp_path)


def test_every_case_is_of_a_parser() -> None:
    assert {file.name for file in fuzzing.CASES.iterdir() if file.is_dir()} <= set(PARSERS)
