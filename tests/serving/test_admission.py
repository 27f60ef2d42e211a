"""Every Release of the corpus is refused by its own check, and good ones of many kinds are admitted; what was checked is what
is loaded."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bad_adapters
import numpy as np
import pytest
from bad_adapters import CORPUS, Maker, safetensors

from admission_fakes import Fake, Says, ground, maker, saying  # noqa: F401
from sartor.core import signing
from sartor.core.errors import (
    AdmissionError,
    ArtifactError,
    InputError,
    MissingError,
    ModelError,
    RefusedError,
    SignatureError,
)
from sartor.core.home import folder
from sartor.inference.engine import BASE, EngineInfo, Event, GenerateCall, ReplyDone, ReplyFailed, TextDelta
from sartor.release import canary_prompts
from sartor.serving.admission import adapter_checks, admission, release_copies
from sartor.serving.admission.adapter_checks import LoraConfig, read_config
from sartor.serving.admission.admission import CHECKS, AdmissionContext
from sartor.serving.workers.worker_main import check_digest


@pytest.mark.parametrize("name", CORPUS)
def test_each_of_the_corpus_is_refused_by_its_own_check(name: str, maker: Maker, ground: AdmissionContext) -> None:
    bad = CORPUS[name]
    path = maker.bad(name, maker.keys.parent / "releases" / name)
    fake = Fake(saying(bad.says or "It is blue."))
    with pytest.raises((InputError, RefusedError)) as caught:
        admission.admit_sync(path, ground, fake)
    assert caught.value.check == bad.check, caught.value
    assert caught.value.remedy and ".part-" not in str(caught.value)
    if bad.check == "gate":
        assert "--name NAME --version NEW --key KEYS" in caught.value.remedy
    assert bool(fake.calls) == (bad.check in ("canary", "degenerate", "agreement")), (
        "nothing runs that can be seen without"
    )
    assert [file.name for file in release_copies.folder(ground.state).iterdir()] == []


GOOD = {
    "plain": {},
    "all layers": {"targets": bad_adapters.TARGETS, "rank": 8},
    "one module": {"targets": ("down_proj",), "rank": 1},
    "rank 16": {"rank": 16},
    "half": {"dtype": "F16"},
    "bf16": {"dtype": "BF16"},
}


@pytest.mark.parametrize("name", GOOD)
def test_good_releases_are_admitted_with_all_checks_reported(
    name: str, maker: Maker, ground: AdmissionContext, tmp_path: Path
) -> None:
    """Releases of each rank, target and dtype pass; the copy is stored by Release id."""
    path = maker.good(tmp_path / "good", maker.draft(**GOOD[name]))
    fake = Fake()
    admitted = admission.admit_sync(path, ground, fake)
    assert set(admitted.checks) | {"degenerate", "agreement", "manifest"} == set(CHECKS)
    assert (admitted.name, admitted.version, admitted.system_prompt) == ("specialist", "1.0", "You are brief.")
    assert admitted.path == ground.state / "adapters" / admitted.release and fake.path.parent == admitted.path.parent
    assert admitted.checks["rank"] == str(GOOD[name].get("rank", 4))
    check_digest(admitted.path, admitted.adapter)


@pytest.mark.parametrize("has", [(), ("release.json",), ("signature",)])
def test_directory_without_release_is_refused_unlisted(
    has: tuple[str, ...], ground: AdmissionContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty directory, or one with only release.json or signature, is refused without scandir."""
    for name in has:
        (tmp_path / name).write_text("{}")
    walked, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walked.append(path) or scandir(path))
    with pytest.raises(SignatureError, match="no signed Release") as caught:
        admission.admit_sync(tmp_path, ground, Fake())
    assert caught.value.check == "signature" and tmp_path not in walked and str(tmp_path) not in walked


def rewritten(maker: Maker, out: Path, **config: object) -> Path:
    draft = maker.draft()
    draft.config.update(config)
    return maker.good(out, draft)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4, "^model.layers.0.self_attn.v_proj": 4}},
        {"alpha_pattern": {"v_proj": 2}},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj", "layers.1.self_attn.q_proj"]},
        {"loftq_config": {}},
        {"init_lora_weights": "gaussian"},
        {"revision": "main"},
        {"a_method_to_come": None},
    ],
)
def test_plain_lora_in_any_of_its_spellings_is_admitted(
    config: dict, maker: Maker, ground: AdmissionContext, tmp_path: Path
) -> None:
    assert admission.admit_sync(rewritten(maker, tmp_path / "good", **config), ground, Fake()).adapter


def test_what_peft_writes_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    import peft

    written = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM", use_rslora=True)
    written.save_pretrained(str(tmp_path))
    config = read_config(tmp_path / "adapter_config.json")
    assert (config.rank, config.alpha, config.targets, config.scale_of("x")) == (8, 16.0, {"q_proj"}, 16 / 8**0.5)


def lora(**changes: object) -> LoraConfig:
    said = {
        "rank": 4,
        "alpha": 8.0,
        "ranks": {},
        "alphas": {},
        "targets": frozenset({"q"}),
        "layers": None,
        "layers_pattern": (),
        "is_rank_stabilised": False,
        "is_transposed": False,
    }
    return LoraConfig(**{**said, **changes})


@pytest.mark.parametrize(
    "said",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["proj"]},
        {"target_modules": ["model.layers.0.mlp.up_proj", "o_proj"]},
    ],
)
def test_targets_are_matched_as_peft_matches_them(said: dict, maker: Maker, tmp_path: Path) -> None:
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **said}))
    ours, theirs = read_config(tmp_path / "adapter_config.json"), peft.LoraConfig(r=4, **said)
    for module in maker.weights.linear():
        assert ours.targets_module(module) == bool(check_target_module_exists(theirs, module)), module


def test_first_matching_pattern_sets_rank_and_scale() -> None:
    """A rank-stabilised LoRA scales by alpha over the square root of its rank."""
    config = lora(ranks={"0.q": 2, "q": 8}, alphas={"^a.1.q": 1.0})
    assert [config.rank_of(module) for module in ("a.0.q", "a.1.q", "a.1.v", "q")] == [2, 8, 4, 8]
    assert [config.scale_of(module) for module in ("a.0.q", "a.1.q")] == [4.0, 0.125]
    assert lora(is_rank_stabilised=True).scale_of("x") == 4.0


def test_the_norm_is_that_of_the_whole_product(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    draft = maker.draft(targets=("up_proj",), rank=3)
    a, b = (draft.tensors[draft.a().replace("lora_A", f"lora_{letter}")][1].astype(float) for letter in "AB")
    module = draft.a().removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    weight = maker.weights.matrices[module].values()
    wanted = 2 * np.linalg.norm(b @ a) / (2 * 32**0.5)  # the tiny base's own weights are smaller than that
    path = maker.good(tmp_path / "good", draft)
    said = admission.admit_sync(path, ground, Fake()).checks["norms"]
    assert (
        float(said.split()[2]) >= wanted * 0.99 and "up_proj" in said and float(np.linalg.norm(weight)) < 2 * 32**0.5
    )
    just, beyond = (
        maker.draft(targets=("up_proj",), size=size / np.linalg.norm(weight) * 2 * 32**0.5) for size in (0.7, 1.4)
    )
    admission.admit_sync(maker.good(tmp_path / "just", just), ground, Fake())
    with pytest.raises(AdmissionError, match="times the norm that is allowed"):
        admission.admit_sync(maker.good(tmp_path / "beyond", beyond), ground, Fake())
    norms = json.loads((ground.state / "base-norms.json").read_text())["norms"]
    assert norms[module] == pytest.approx(float(np.linalg.norm(weight)), rel=1e-6)


def test_admitted_copy_is_independent_of_the_original(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    """Weights swapped in the original change nothing; a changed or missing file of the copy is refused."""
    path = maker.good(tmp_path / "good")
    weights = path / "adapter_model.safetensors"

    class Swapping(Fake):
        def __call__(self, adapter: str, at: Path, calls: Sequence[GenerateCall]) -> list[Sequence[Event]]:
            weights.write_bytes(b"poison")  # in place: a hard link would be poisoned too
            return super().__call__(adapter, at, calls)

    admitted = admission.admit_sync(path, ground, Swapping())
    check_digest(admitted.path, admitted.adapter)
    assert os.stat(admitted.path / weights.name).st_ino != os.stat(weights).st_ino
    (admitted.path / weights.name).write_bytes(b"poison")
    with pytest.raises(ArtifactError, match="not .* as admitted"):
        check_digest(admitted.path, admitted.adapter)
    (admitted.path / weights.name).unlink()
    with pytest.raises(ArtifactError, match="has no 'adapter_model.safetensors'"):
        check_digest(admitted.path, admitted.adapter)


def test_copy_is_admitted_again_without_engine_calls(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    """Another base or changed bytes are refused, and without the note of its checks it is tried again."""
    first = admission.admit_sync(maker.good(tmp_path / "good"), ground, Fake())
    fake = Fake()
    again = admission.admit_sync(first.path, ground, fake)
    assert (again.adapter, again.path, fake.calls) == (first.adapter, first.path, [])
    assert again.checks == first.checks
    other = AdmissionContext(
        EngineInfo("local", "tiny", "1" * 64, ground.about.template_digest, 512, 4),
        ground.base,
        ground.state,
        ground.trust,
    )
    with pytest.raises(ModelError) as refused:
        admission.admit_sync(first.path, other, fake)
    assert refused.value.check == "base"
    (first.path / ".admitted.json").write_text("{}")
    admission.admit_sync(first.path, ground, fake)
    assert fake.calls, "what it passed is not known, so it has to pass again"
    config = first.path / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ArtifactError) as changed:
        admission.admit_sync(first.path, ground, Fake())
    assert changed.value.check == "files"
    # the original comes back: what is broken is replaced
    assert admission.admit_sync(tmp_path / "good", ground, Fake()).path == first.path
    assert admission.admit_sync(first.path, ground, Fake()).adapter == first.adapter


def test_revoked_signer_is_refused_at_the_next_start(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    """A copy that was admitted before is refused by the check of its signature."""
    first = admission.admit_sync(maker.good(tmp_path / "good"), ground, Fake())
    shutil.copy(maker.public, folder("revoked") / "own.pub")
    with pytest.raises(SignatureError, match="is revoked") as caught:
        admission.admit_sync(first.path, ground, Fake())
    assert caught.value.check == "signature"


def test_trusted_folder_applies_without_a_team_key(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    """A signature counts if the machine's trusted folder has its key; if the folder is empty, none counts."""
    anyone = AdmissionContext(ground.about, ground.base, ground.state)
    path = maker.good(tmp_path / "good")
    with pytest.raises(SignatureError, match="trusts nobody"):
        admission.admit_sync(path, anyone, Fake())
    shutil.copy(maker.public, folder("trusted") / "own.pub")
    assert admission.admit_sync(path, anyone, Fake()).signer == signing.key_id(signing.open_public(maker.public))


def test_waivers_show(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    draft = maker.draft()
    draft.facts["gate"]["licence"]["outcome"] = "waived"
    draft.facts["sources"][0]["licence"] = "CC-BY-NC-4.0"
    draft.facts["waivers"] = [{"check": "licence", "by": "A. Tester", "reason": "they wrote that we may"}]
    checks = admission.admit_sync(maker.good(tmp_path / "good", draft), ground, Fake()).checks
    assert "licence waived by A. Tester: they wrote that we may" in checks["gate"]
    assert checks["licence"].startswith("waived, against: rows.jsonl is CC-BY-NC-4.0")


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ("MOST_BYTES", 5000, "more than 5,000 bytes"),
        ("MOST_FILES", 3, "more than 3 files"),
        ("MOST_DEPTH", 0, "more than 0 folders"),
    ],
)
def test_a_copy_ends_at_its_limits(
    limit: str,
    value: int,
    said: str,
    maker: Maker,
    ground: AdmissionContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = maker.good(tmp_path / "good")
    (path / "deep").mkdir()
    monkeypatch.setattr(release_copies, limit, value)
    with pytest.raises(AdmissionError, match=said) as caught:
        admission.admit_sync(path, ground, Fake())
    assert caught.value.check == "files" and not list(release_copies.folder(ground.state).iterdir())


def test_a_pipe_is_refused_and_not_waited_for(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    path = maker.good(tmp_path / "good")
    os.mkfifo(path / "report")
    with pytest.raises(AdmissionError, match="no regular file"):
        admission.admit_sync(path, ground, Fake())


@pytest.mark.parametrize("what", ["absent", "empty"])
def test_a_directory_that_is_no_release_says_so(what: str, ground: AdmissionContext, tmp_path: Path) -> None:
    if what == "empty":
        (tmp_path / what).mkdir()
    with pytest.raises((ArtifactError, SignatureError)) as caught:
        admission.admit_sync(tmp_path / what, ground, Fake())
    assert caught.value.check in CHECKS and str(tmp_path / what) in caught.value.problem


def test_a_full_disk_is_no_refusal_and_leaves_nothing(
    maker: Maker, ground: AdmissionContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = maker.good(tmp_path / "good")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sartor.core.filesystem.fsync_tree", full)
    with pytest.raises(MissingError, match="disk is full") as caught:
        admission.admit_sync(path, ground, Fake())
    assert caught.value.check == "" and not list(release_copies.folder(ground.state).iterdir())


def test_what_a_kill_left_is_swept(ground: AdmissionContext) -> None:
    (release_copies.folder(ground.state) / ".part-abc").mkdir()
    (release_copies.folder(ground.state) / "whole").mkdir()
    release_copies.sweep(ground.state)
    assert [path.name for path in release_copies.folder(ground.state).iterdir()] == ["whole"]


def test_norms_that_two_threads_keep_at_once_are_whole(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, replace = threading.Barrier(2), os.replace

    def together(part: Path, file: Path) -> None:
        both.wait(timeout=120)
        replace(part, file)

    monkeypatch.setattr(os, "replace", together)
    one = adapter_checks.BaseWeights(tiny_base, "base", tmp_path / "norms.json")
    modules = list(one.linear())[:2]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(one.norms, ([module] for module in modules)))
    assert all(found) and len(one.norms([])) == 1


async def test_admission_runs_beside_the_loop_that_its_probe_needs(
    maker: Maker, ground: AdmissionContext, tmp_path: Path
) -> None:
    fake = Fake()

    async def probe(adapter: str, path: Path, calls: Sequence[GenerateCall]) -> Sequence[Sequence[Event]]:
        await asyncio.sleep(0)
        return fake(adapter, path, calls)

    paths = [maker.good(tmp_path / str(seed), maker.draft(seed=seed)) for seed in range(4)]
    admitted = await asyncio.gather(*(admission.admit(path, ground, probe) for path in [*paths, paths[0]]))
    assert len({one.adapter for one in admitted}) == 4 and admitted[0] == admitted[4]
    version = admission.version_of(admitted[0], "faq")
    assert (version.name, version.release) == ("faq@1.0", str(admitted[0].path))
    assert version.facts["system_prompt"] == "You are brief."


@pytest.mark.parametrize(
    ("text", "is_degenerate"),
    [
        ("no " * 30, True),
        ("aaaaaaaaaaaaaaaaaaaa", True),
        ("", True),
        ("Well, then: " + "ha" * 40, True),
        ("!!!!!!!!", True),
        ("The sky is blue.", False),
        ('{"intent": "HassTurnOn", "area": "kitchen"}', False),
        ("no no no", False),
        ("1. red\n2. green\n3. blue\n4. black\n5. white\n6. grey\n7. pink\n8. brown", False),
        ("ok", False),
        ("There is much to say of the sea, " * 2 + "and then " + "so on " * 8, False),
    ],
)
def test_a_reply_that_repeats_one_piece_is_known(text: str, is_degenerate: bool) -> None:
    assert canary_prompts.is_degenerate(text) == is_degenerate


def test_degenerate_reply_is_admitted_if_recorded_so(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    """A Release whose recorded replies repeat one piece may repeat it; one with good replies may not."""
    loop = "no " * 30
    assert admission.admit_sync(recorded(maker, tmp_path / "loop", loop, loop), ground, Fake(saying(loop)))
    with pytest.raises(AdmissionError) as caught:
        admission.admit_sync(
            recorded(maker, tmp_path / "good", "The sky is blue.", "Yes."), ground, Fake(saying(loop))
        )
    assert caught.value.check == "degenerate"


def test_general_questions_are_held_against_the_base(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    path = maker.good(tmp_path / "good")
    looping = saying("no " * 30)
    with pytest.raises(AdmissionError, match="repeat one piece: 'no no") as caught:
        admission.admit_sync(path, ground, Fake(looping))
    assert caught.value.check == "degenerate"
    fake = Fake(looping, of_base=looping)
    admission.admit_sync(path, ground, fake)  # no worse than its base
    assert {call.adapter == BASE for call in fake.calls} == {True, False}
    assert fake.calls[0].messages[0] == {"role": "system", "content": "You are brief."}


def recorded(maker: Maker, out: Path, *replies: str) -> Path:
    draft = maker.draft()
    asked = [{"role": "user", "content": "hello"}]
    draft.facts["canaries"] = [{"messages": asked, "reply": reply} for reply in replies]
    return maker.good(out, draft)


def test_recorded_replies_are_compared_with_new_ones(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    """Prompts are sent greedily as recorded; a longer recorded reply is compared up to the cut."""
    path = recorded(maker, tmp_path / "good", "The sky is blue.", "The sky is blue today.")
    fake = Fake(saying("The sky is blue."))
    said = admission.admit_sync(path, ground, fake).checks["canary"]
    assert said.startswith("2 recorded prompts answered, 1 begin word for word")
    assert all(
        call.messages == ({"role": "user", "content": "hello"},) and call.sampling.is_greedy for call in fake.calls
    )
    long = recorded(
        maker, tmp_path / "long", "A reply that goes on for much longer than a canary is let go on for, by far."
    )
    cut = lambda call: [TextDelta(call.id, "A reply that goes on", 5), ReplyDone(call.id, "length", 3, 5)]  # noqa: E731
    assert "1.00 alike" in admission.admit_sync(long, ground, Fake(cut)).checks["canary"]


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (
            lambda call: [ReplyFailed(call.id, "ModelError", "its logits are not finite", "tune again")],
            "logits are not finite",
        ),
        (lambda call: [TextDelta(call.id, "on and on")], "did not end"),
        (lambda call: [], "did not end"),
        (lambda call: [ReplyDone(call.id, "cancelled", 1, 1)], "did not end"),
    ],
)
def test_a_canary_that_fails_or_does_not_end_is_a_refusal(
    events: Says, said: str, maker: Maker, ground: AdmissionContext, tmp_path: Path
) -> None:
    with pytest.raises(AdmissionError, match=said) as caught:
        admission.admit_sync(maker.good(tmp_path / "good"), ground, Fake(events))
    assert caught.value.check == "canary"


def test_adapter_that_kills_its_worker_is_refused(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    """The canary check refuses it, and no copy is left."""

    def dies(*_: object) -> list[Sequence[Event]]:
        raise ModelError("a worker that tried the adapter died: signal 11", "tune it again")

    with pytest.raises(ModelError, match="signal 11") as caught:
        admission.admit_sync(maker.good(tmp_path / "good"), ground, dies)
    assert caught.value.check == "canary" and not list(release_copies.folder(ground.state).iterdir())


def test_corpus_reaches_each_check_and_docs_name_it() -> None:
    """Canary and projectors have tests elsewhere; docs/admission.md lists each check."""
    # what is wrong with projectors: test_admission_media.py; revoked, min_version: attacks/test_signatures.py
    assert {bad.check for bad in CORPUS.values()} == set(CHECKS) - {"canary", "projectors", "revoked", "min_version"}
    page = (Path(__file__).parents[2] / "docs/admission.md").read_text()
    assert [name for name in CHECKS if f"| `{name}` |" not in page] == []


def test_admission_keys_and_receipts_need_no_torch() -> None:
    modules = "sartor.serving.admission.admission, sartor.serving.api_keys, sartor.serving.rate_limits, sartor.serving.commands.receipt_verification"
    code = (
        f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers', 'safetensors', 'peft'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_read_header_stops_at_the_tensor_limit(tmp_path: Path) -> None:
    """2,000 tensors are read; a damaged header raises ModelError."""
    from sartor.core import safetensors_file

    zeros = np.zeros((2, 2), np.float32)
    (tmp_path / "many").write_bytes(safetensors({f"t{place}": ("F32", zeros) for place in range(2000)}))
    assert len(safetensors_file.read_header(tmp_path / "many")) == 2000
    with pytest.raises(ModelError, match="are the limit"):
        safetensors_file.read_header(tmp_path / "many", 1000)
    for raw in (b"", b"\0" * 7, b"\xff" * 8, (2).to_bytes(8, "little") + b"[]", (4).to_bytes(8, "little") + b"null"):
        (tmp_path / "bad").write_bytes(raw)
        with pytest.raises(ModelError, match="no whole safetensors"):
            safetensors_file.read_header(tmp_path / "bad")


def answers(base: Path, adapter: Path, asked: Sequence[dict]) -> list[str]:
    """What an adapter says in this process."""
    from sartor.inference.local.local_engine import open_engine

    engine = open_engine(str(base), rows=2, cache_tokens=512)
    engine.attach("it", adapter)
    for place, turn in enumerate(asked):
        engine.submit(GenerateCall(str(place), "it", (turn,), sampling=canary_prompts.SAMPLING))
    said = {str(place): "" for place in range(len(asked))}
    while engine.busy:
        for event in engine.step():
            said[event.call] += event.text if isinstance(event, TextDelta) else ""
    return list(said.values())


@pytest.mark.services
async def test_real_worker_tells_adapters_apart(maker: Maker, tmp_path: Path, tiny_base: Path) -> None:
    """The adapter of the recorded replies is admitted, another refused, and a changed copy not attached."""
    from sartor.serving.team_config import LocalEngineOptions, Team, WorkerOptions
    from sartor.serving.workers.supervisor import Supervisor

    asked = [{"role": "user", "content": text} for text in ("what colour is the sky", "turn on the kitchen light")]
    one, other = (maker.draft(targets=bad_adapters.TARGETS, size=3.0, seed=seed) for seed in range(2))
    replies = answers(tiny_base, maker.good(tmp_path / "plain", one), asked)
    for draft in (one, other):
        draft.facts["canaries"] = [
            {"messages": [turn], "reply": text} for turn, text in zip(asked, replies, strict=True)
        ]
    engine = LocalEngineOptions(rows=2, cache_tokens=512)
    key = str(maker.public)
    team = Team(
        base=str(tiny_base),
        engine=engine,
        state=str(tmp_path / "state"),
        trust=key,
        workers=WorkerOptions(spare=0, start_s=600.0, hang_s=300.0),
    )

    crew = Supervisor(team)
    await crew.start()
    try:
        ground = AdmissionContext.of(team, crew.about)
        admitted = await admission.admit(maker.good(tmp_path / "one", one), ground, crew.probe)
        await crew.attach(admitted.adapter, admitted.path)
        with pytest.raises(AdmissionError) as caught:
            await admission.admit(maker.good(tmp_path / "other", other), ground, crew.probe)
        (admitted.path / "adapter_config.json").write_text("{}")
        await crew.detach(admitted.adapter)
        with pytest.raises(ArtifactError, match="as admitted"):
            await crew.attach(admitted.adapter, admitted.path)
    finally:
        await crew.close()
    assert "2 begin word for word" in admitted.checks["canary"]
    assert caught.value.check == "agreement"
