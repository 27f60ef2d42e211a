"""The health check: what a device asks a version, what it says of the answers, and what a process that fails tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from health_fakes import CANARIES, ROWS, answering, lines, version  # noqa: F401
from sartor.core.artifacts import write_artifact
from sartor.core.errors import ConfigError, HealthError, MissingError
from sartor.core.resource_limits import JobResult, ResourceLimits, ResourceUsage
from sartor.edge.health_reason import HealthReason
from sartor.edge.runtime import device_runtime
from sartor.edge.update import health_check
from sartor.edge.update.health_check import Health, read_prompts
from sartor.inference.engine import BASE, GenerateCall, ReplyDone, ReplyFailed


def test_version_with_expected_replies_passes(tmp_path: Path, answering: Any) -> None:
    """Canaries and device prompts are asked; a bare prompt follows the version's system prompt."""
    fake = answering()
    found = Health(read_prompts(lines(tmp_path, *ROWS))).check(version(tmp_path, canaries=CANARIES))
    assert found.passed and (found.n_prompts, found.peak_memory_bytes) == (5, 123)
    asked = {call.messages[-1]["content"]: [one["role"] for one in call.messages] for call in fake.asked}
    assert asked["hello"] == ["system", "user"]  # a bare prompt comes after the version's system prompt
    assert asked["off"] == ["user"]
    assert {call.adapter for call in fake.asked} == {BASE}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hello": "Hello! I am your assistant."}, "line 1 (exact)"),
        ({"where": "in the hall"}, "line 2 (contains)"),
        ({"off": '{"intent": "HassTurnOn", "slots": {"area": "kitchen", "level": 3}}'}, "line 3 (json: intent)"),
        ({"off": "certainly"}, "line 3 (json: intent, slots.area, slots.level)"),
        ({"hello": ReplyFailed("x", "ModelError", "not finite", "tune")}, "line 1 (no answer: ModelError)"),
        (
            {"what_colour_is_the_sky": "Mary had a little lamb", "turn_on_the_light": "no"},
            "canary: of the release's own",
        ),
        ({"what_colour_is_the_sky": "ha" * 60, "turn_on_the_light": ""}, "degenerate: of the release's own"),
    ],
)
def test_what_is_wrong_is_said_by_line_and_kind(tmp_path: Path, answering: Any, changes: Any, said: str) -> None:
    answering(**changes)
    check = Health(read_prompts(lines(tmp_path, *ROWS)))
    with pytest.raises(HealthError) as raised:
        check(version(tmp_path, canaries=CANARIES))
    assert said in raised.value.problem
    for secret in ("assistant", "in the hall", "certainly", "Mary", "haha"):
        assert secret not in raised.value.problem


DEGENERATE = (
    "degenerate: of the release's own prompts: 2 of 2 replies to canary prompts say nothing or repeat one piece"
)
DIFFERENT = (
    "canary: of the release's own prompts: the replies to 2 recorded prompts are 0.04 like those that its Report has; "
    "the limit is 0.65"
)


@pytest.mark.parametrize(
    ("sky", "light", "reason"),
    [
        ("ha: " * 60, "", DEGENERATE),
        ("Mary: a lamb", "no", DIFFERENT),
        (
            ReplyFailed("x", "ModelError", "not finite: in the hall", "tune"),
            "no",
            "canary: of the release's own prompts: the adapter could not answer a canary prompt",
        ),
        (
            ReplyDone("x", "cancelled", 1, 1),
            "no",
            "canary: of the release's own prompts: the reply to canary-1 did not end",
        ),
    ],
)
def test_reason_of_the_releases_own_prompts_is_golden(
    tmp_path: Path, answering: Any, sky: str | ReplyFailed, light: str, reason: str
) -> None:
    answering(what_colour_is_the_sky=sky, turn_on_the_light=light)
    assert Health().check(version(tmp_path, canaries=CANARIES)).reasons == (reason,)


def test_a_release_without_canaries_has_to_answer_something(tmp_path: Path, answering: Any) -> None:
    fake = answering(**{"Hello!": "..."})
    assert Health().check(version(tmp_path)).passed and len(fake.asked) == 1
    answering(**{"Hello!": ReplyFailed("x", "ModelError", "it is broken", "tune")})
    assert Health().check(version(tmp_path / "again")).reasons == ("canary: no answer: ModelError",)


def test_a_private_measure_is_asked_last_and_may_say_no(tmp_path: Path, answering: Any) -> None:
    answering()
    release = version(tmp_path, canaries=CANARIES)
    asked: list[Path] = []

    def measured(path: Path) -> str:
        asked.append(path)
        return "0.41 of the owner's own questions; 0.60 before"

    assert Health(evaluation=measured).check(release).reasons[0].startswith("evaluation: 0.41")
    assert Health(evaluation=lambda path: None).check(release).passed
    assert Health(evaluation=lambda path: str(1 / 0)).check(release).reasons == ("evaluation: ZeroDivisionError",)
    answering(what_colour_is_the_sky="no", turn_on_the_light="no")
    assert not Health(evaluation=measured).check(release).passed and asked == [release]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("x", "a JSON object is due"),
        ({"prompt": "x"}, "expected is one of exact, contains, json"),
        ({"prompt": "x", "expected": {"regex": "y"}}, "expected is one of"),
        ({"prompt": "x", "expected": {"json": {}}}, "json takes fields"),
        ({"prompt": "x", "expected": {"contains": ""}}, "contains takes a text"),
        ({"prompt": "x", "messages": [], "expected": "y"}, "one of them"),
        ({"messages": [], "expected": "y"}, "messages a list"),
        ({"prompt": 3, "expected": "y"}, "prompt is a text"),
        ({"promt": "x", "expected": "y"}, "unknown key 'promt'"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, row: object, said: str) -> None:
    with pytest.raises(ConfigError, match="line 2") as raised:
        read_prompts(lines(tmp_path, {"prompt": "a", "expected": "b"}, row))
    assert said in raised.value.problem


def test_a_file_of_nothing_is_no_check(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for file in ("empty.jsonl", "absent.jsonl"):
        with pytest.raises(ConfigError):
            read_prompts(tmp_path / file)


def test_a_release_that_was_changed_does_not_open(tmp_path: Path) -> None:
    release = version(tmp_path)
    (release / "release.json").write_text("{}")
    assert Health().check(release).reasons[0].startswith("opens: ")


# the process itself


def gguf_export(folder: Path, content: bytes, **facts: Any) -> Path:
    def fill(part: Path) -> dict[str, Any]:
        (part / "home-1.0-f16.gguf").write_bytes(content)
        return {
            "form": "gguf",
            "name": "home",
            "version": "1.0",
            "base": {"name": "nowhere", "digest": "0" * 64},
            **facts,
        }

    return write_artifact(folder / "export", "export", fill).path


CALL = GenerateCall("x", BASE, ({"role": "user", "content": "hello"},))


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(HealthError, match=r"^time: it was not done in 0.05 s"):
        device_runtime.ask_in_process(version(tmp_path), [CALL], ResourceLimits(wall_s=0.05))


def test_what_a_version_did_to_its_process_begins_with_a_word() -> None:
    limits = ResourceLimits(memory_bytes=1 << 30, wall_s=5)
    for killed, code, said in (
        ("memory", -9, "memory: it took more than 1,073,741,824"),
        ("", -11, "crash: .* -11: terminate called"),
        ("", 0, "crash: .* 0: terminate called"),
    ):
        usage = ResourceUsage("x", 0, 0, 0, 0, code, killed)  # type: ignore[arg-type]
        with pytest.raises(HealthError, match=said):
            device_runtime._answers(JobResult(None, usage, ["loading", "terminate called"]), limits)
    assert isinstance(
        device_runtime._error({"kind": "AssetError", "problem": "no starter", "remedy": "x"}), MissingError
    )
    assert (
        "opens: no base" in device_runtime._error({"kind": "ModelError", "problem": "no base", "remedy": "x"}).problem
    )


@pytest.mark.services
def test_a_gguf_file_that_llama_cpp_cannot_take_is_a_verdict(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'sartor[llamacpp]'")
    with pytest.raises(HealthError, match="opens: llama.cpp does not start"):
        device_runtime.ask_in_process(gguf_export(tmp_path, b"GGUF" + bytes(100)), [CALL], ResourceLimits(wall_s=120))


def test_words_of_reasons_are_golden() -> None:
    """They are in reports and in the stores of devices."""
    words = ["opens", "time", "memory", "crash", "canary", "degenerate", "evaluation", "starts", "person", "other"]
    assert [reason.value for reason in HealthReason] == words
    assert all(HealthReason.parse(reason.text("it: said; so")) is reason for reason in HealthReason)
    assert HealthReason.CANARY.text("it: said; so") == "canary: it: said; so"
    assert health_check.KINDS == ("exact", "contains", "json")
