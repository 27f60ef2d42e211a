"""Release -> export: what other runtimes load is what was signed, says so with numbers, or is not written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import releases
import sartor
import tiny
from killing import check, moments, run_killed
from sartor.core import model_refs
from sartor.core.artifacts import open_artifact
from sartor.core.errors import (
    ArtifactError,
    BudgetError,
    ConfigError,
    ExtraError,
    GateError,
    MissingError,
    ModelError,
    SignatureError,
)
from sartor.core.model_refs import TOWERS_KEY
from sartor.core.records import Message
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models import adapters, composed_model, hardware
from sartor.models.base import open_base
from sartor.models.losses import transformers_backend
from sartor.release.export import export, export_formats, llamacpp_process
from sartor.release.export import parity as measure
from sartor.release.export import parity as prompts
from sartor.release.export import parity as reference
from sartor.release.export import parity as runtimes
from sartor.release.release import verify_release


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a signed Release of the tiny base (`release`) and its keys (`keys`)."""
    folder = tmp_path_factory.mktemp("made")
    releases.signed(folder, tiny_base)
    return folder


@pytest.fixture
def tuned(made: Path, tiny_base: Path) -> Any:
    """The tiny base in fp32 with the Release's adapter on it."""
    return adapters.open_adapter(open_base(str(tiny_base), bits=32).model, made / "release")


@pytest.fixture
def options(made: Path) -> dict[str, Any]:
    return {"key": made / "keys"}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short replies: what is compared is the same, and the tiny base has nothing to say."""
    monkeypatch.setattr("sartor.release.export.parity.REPLY_TOKENS", 8)
    monkeypatch.setattr(runtimes, "REPLY_TOKENS", 8)


@pytest.fixture(scope="module")
def loaded(made: Path) -> Path:
    """The Release exported for peft, its receipt signed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sartor.release.export.parity.REPLY_TOKENS", 8)
        patch.setattr(runtimes, "REPLY_TOKENS", 8)
        how = sartor.ExportOptions(key=made / "keys", sign=made / "keys")
        done = sartor.export(made / "release", made / "out", to="peft", options=how).as_json()
    assert done["signed"] is True
    return Path(done["path"])


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "LLAMA_CPP", "no_such_runtime")


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([tiny.tokenizer()(text)["input_ids"]])


def test_peft_loads_what_was_signed(made: Path, loaded: Path, tiny_base: Path) -> None:
    out = loaded
    assert (out / adapters.WEIGHTS).read_bytes() == (made / "release" / adapters.WEIGHTS).read_bytes()
    plain = transformers.AutoModelForCausalLM.from_pretrained(str(tiny_base), dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(plain, str(out))
    base = open_base(str(tiny_base), bits=32)
    ours = adapters.open_adapter(base.model, out)
    ids = ids_of("switch attic down")
    with torch.no_grad():
        assert torch.equal(tuned(input_ids=ids).logits, ours(input_ids=ids).logits)
    turns = [{"role": "user", "content": "switch attic down"}]
    text = transformers.AutoTokenizer.from_pretrained(str(out)).apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    assert text == base.chat.render([Message.of("user", "switch attic down")], reply_next=True)


def test_export_verifies_and_is_never_taken_for_a_release(made: Path, loaded: Path, tmp_path: Path) -> None:
    """It has signer and parity; without its signature or its README.md it is refused."""
    key = made / "keys"
    said = sartor.verify(loaded, key=key).as_json()
    assert (said["export"], said["form"], said["base"], said["measured"]) == (str(loaded), "peft", "the same", True)
    assert said["signer"] and said["parity"][adapters.WEIGHTS]["agreement"] == 1.0
    with pytest.raises(ArtifactError, match="release"):
        verify_release(loaded, key=key)
    for unsure in ("signature", "README.md"):
        shutil.copytree(loaded, tmp_path / unsure)
        (tmp_path / unsure / unsure).unlink()
        with pytest.raises(SignatureError if unsure == "signature" else ArtifactError, match=unsure):
            sartor.verify(tmp_path / unsure, key=key)


def test_export_receipt_has_parity_parents_and_licences(made: Path, loaded: Path, tmp_path: Path) -> None:
    """NOTICE.md shows no local path; a file that was changed after the export is refused by name."""
    shutil.copytree(loaded, tmp_path / "out")
    manifest = open_artifact(tmp_path / "out", "export").manifest
    assert manifest["parents"][0]["id"] == open_artifact(made / "release").id
    figures = manifest["parity"]["files"][adapters.WEIGHTS]
    assert (figures["agreement"], figures["greedy_tokens"], figures["logit_difference"], figures["alike"]) == (
        1.0,
        1.0,
        0.0,
        1.0,
    )
    assert sum(manifest["parity"]["prompts"].values()) == prompts.LEAST == 50
    assert manifest["parity"]["prompts"] == {"generic prompts": 40, "rows of the Report": 10}
    assert "the Dataset is not on this machine, or was changed" in manifest["parity"]["notes"]
    assert {"machine", "versions", "licence", "obligations"} <= set(manifest)
    assert [step["kind"] for step in sartor.inspect(tmp_path / "out")["parents"]] == ["release"]
    notice = (tmp_path / "out" / "NOTICE.md").read_text()
    assert "rows.jsonl: CC-BY-4.0" in notice and "Apache-2.0" in notice and "/home/me" not in notice
    assert "> Switch to JSON." in (tmp_path / "out" / "README.md").read_text()
    file = tmp_path / "out" / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        open_artifact(tmp_path / "out")


def test_the_merged_directory_is_a_base_that_answers_alike(
    made: Path, tmp_path: Path, options: dict[str, Any], tuned: Any
) -> None:
    done = sartor.export(made / "release", tmp_path / "out", to="merged", options=sartor.ExportOptions(**options))
    said = done.as_json()
    merged = open_base(str(tmp_path / "out"), bits=32)
    assert merged.ref.digest == said["as_base"]["."]
    assert merged.ref.licence == open_artifact(made / "release").licence
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}
    asked = [merged.chat.prompt_ids([Message.of("user", f"switch {place} on")]) for place in ("den", "loft", "moon")]
    how = {"stop": merged.chat.stops, "pad": merged.chat.pad, "sampling": Sampling(8)}
    assert generate(merged.model, asked, **how) == generate(tuned, asked, **how)
    assert merged.chat.template_digest == model_refs.template_digest(tiny.CHATML)
    config = transformers.GenerationConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.do_sample, config.max_new_tokens, config.eos_token_id) == (False, 256, merged.chat.stops)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "out" / "README.md").stat().st_mode


def test_a_merged_bf16_base_stays_bf16(made: Path, tmp_path: Path) -> None:
    tiny.model().bfloat16().save_pretrained(str(tmp_path))
    assert export_formats._width_of(tmp_path) == torch.bfloat16


@pytest.mark.usefixtures("no_llama_cpp")
def test_gguf_files_hold_adapter_and_merged_model(
    made: Path, tmp_path: Path, options: dict[str, Any], tuned: Any
) -> None:
    with pytest.raises(ExtraError) as caught:
        sartor.export(made / "release", tmp_path / "out", to="gguf", options=sartor.ExportOptions(**options))
    assert "--allow-unmeasured" in caught.value.remedy and not (tmp_path / "out").exists()
    done = sartor.export(
        made / "release", tmp_path / "out", to="gguf", options=sartor.ExportOptions(["q8_0"], True, **options)
    )
    parity = done.as_json()["parity"]
    assert (parity["measured"], parity["files"]) == (False, {})
    assert any("not measured" in note for note in parity["notes"])
    names = {file.name for file in (tmp_path / "out").glob("*.gguf")}
    assert names == {"switch-1.0-adapter.gguf", "switch-1.0-f16.gguf", "switch-1.0-q8_0.gguf"}
    wanted = adapters.merge(tuned).model.layers[1].mlp.down_proj.weight.numpy()
    reader = gguf.GGUFReader(tmp_path / "out" / "switch-1.0-f16.gguf")
    held = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    assert np.array_equal(np.array(held.data), wanted.astype(np.float16))
    for name in names:
        fields = gguf.GGUFReader(tmp_path / "out" / name).fields
        assert fields["tokenizer.chat_template"].contents() == tiny.CHATML
    assert reader.fields["general.license"].contents() == open_artifact(made / "release").licence
    merged = model_refs.locate_base(str(tmp_path / "out" / "switch-1.0-f16.gguf"))
    assert merged.digest == done.as_json()["as_base"]["switch-1.0-f16.gguf"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == tiny.CHATML


def halved(model: Any) -> Any:
    """A merge that adds half of the adapter."""
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.scaling["default"] *= -4
    return transformers_backend.without_peft(model.merge_and_unload())


def test_one_that_answers_otherwise_is_not_written(
    made: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "merge", halved)
    with pytest.raises(GateError) as caught:
        sartor.export(made / "release", tmp_path / "out", to="merged", options=sartor.ExportOptions(**options))
    assert caught.value.exit_code == 5
    assert "next tokens are the Release's, and 0.98 must be" in caught.value.problem
    assert list(tmp_path.glob("*out*")) == []


def test_another_chat_template_is_not_let_pass(
    made: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        export_formats,
        "write_template",
        lambda base, part: (part / "chat_template.jinja").write_text(tiny.CHATML + " "),
    )
    with pytest.raises(GateError, match="chat template"):
        sartor.export(made / "release", tmp_path / "out", to="peft", options=sartor.ExportOptions(**options))
    assert list(tmp_path.glob("*out*")) == []


def figures(form: str, **changes: Any) -> measure.Figures:
    plain = {
        "runtime": "r",
        "form": form,
        "positions": 100,
        "agreement": 1.0,
        "greedy_tokens": 1.0,
        "greedy_replies": 1.0,
        "logprob_difference": 0.0,
        "mean_logprob_difference": 0.0,
        "logit_difference": 0.0,
        "alike": 1.0,
    }
    return measure.Figures(**{**plain, **changes})


@pytest.mark.parametrize(
    ("form", "changes", "word"),
    [
        ("f16", {"agreement": 0.97}, "0.9700 of 100 next tokens"),
        ("f16", {"agreement": float("nan")}, "nan of 100"),
        ("peft", {"logit_difference": 0.5}, "a logit differs by 0.5"),
        ("merged", {"alike": 0.5}, "0.50 of the prompts"),
        ("q4_1", {"agreement": 0.55, "agreement_deviation": 0.02}, "0.9 must be (chance moves that by 0.0200)"),
    ],
)
def test_each_figure_has_its_limit(form: str, changes: dict[str, Any], word: str) -> None:
    measure.check(figures(form), "x")
    with pytest.raises(GateError) as caught:
        measure.check(figures(form, **changes), "x")
    assert word in caught.value.problem and caught.value.remedy


def test_figures_count_positions_and_replies() -> None:
    asked = prompts.ParityPrompt((Message.of("user", "a"),), "", (1, 2), "here")
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 1.0, 5.0]])
    trace = reference.Trace(asked, (1, 2), logits)
    near = logits.log_softmax(-1)
    likeliest = [
        [(1, float(near[0, 1])), (2, float(near[0, 2]) + 0.25)],
        [(0, float(near[1, 0])), (2, float(near[1, 2]))],
    ]
    found = measure.compare("r", "f16", [trace], measure.RuntimeOutputs([[1, 0, 0]], [likeliest]))
    assert (found.positions, found.agreement, found.greedy_tokens, found.greedy_replies) == (2, 0.5, 1 / 3, 0.0)
    assert (round(found.logprob_difference, 4), found.logit_difference) == (0.25, None)
    assert measure.with_prompts(found, [trace], [[1, 2]]).alike == 1.0
    assert measure.with_prompts(found, [trace], [[1, 3]]).alike == 0.0


def test_agreement_deviation_counts_replies_not_positions() -> None:
    """At agreement 0.5 it is 0 if each reply is half right, and 0.25 if 2 of 4 replies are wholly right."""
    asked = prompts.ParityPrompt((Message.of("user", "a"),), "", (1, 2), "here")
    logits = torch.tensor([[0.0, 5.0], [0.0, 5.0]])
    traces = [reference.Trace(asked, (1, 1), logits)] * 4
    right, wrong = [(1, -0.01), (0, -5.0)], [(0, -0.01), (1, -5.0)]

    def told(*replies: list[list[tuple[int, float]]]) -> measure.Figures:
        return measure.compare("r", "f16", traces, measure.RuntimeOutputs([[1, 1]] * 4, list(replies)))

    scattered, together = told(*[[right, wrong]] * 4), told(*[[right, right], [wrong, wrong]] * 2)
    assert scattered.agreement == together.agreement == 0.5
    assert (
        scattered.agreement_deviation == 0 and together.agreement_deviation == 0.25
    )  # that of four draws, not of eight


def test_token_steps_count_tokens_inside_a_character() -> None:
    """Of an emoji of three tokens the server reports the last alone; the others have no logprob."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "top_logprobs": [{"id": token, "logprob": logprob}, {"id": 0, "logprob": -9.0}]}

    # an emoji of three tokens, of which the server tells of the last; then one whose entry could be either's
    whole = llamacpp_process.token_steps([7, 8, 9, 5, 5, 2], [entry(9, -1.0), entry(5, -2.0), entry(2, -3.0)])
    assert [step[0] for step in whole] == [(7, None), (8, None), (9, -1.0), (5, None), (5, None), (2, -3.0)]
    assert llamacpp_process.token_steps([3, 4], [entry(3, -1.0), entry(4, -2.0)])[1] == [(4, -2.0), (0, -9.0)]


def test_what_cannot_end_well_is_refused_before_any_work(made: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    for arguments, word in (
        ({"to": "onnx"}, "there is no form 'onnx'"),
        ({"to": "gguf", "options": sartor.ExportOptions(["q4_k_m"], **options)}, "'q4_k_m'"),
        ({"to": "peft", "options": sartor.ExportOptions(["q8_0"], **options)}, "--quantise is of GGUF files"),
    ):
        with pytest.raises(ConfigError, match=word):
            sartor.export(made / "release", tmp_path / "out", **arguments)
    for replace in (False, True):
        with pytest.raises(ConfigError, match="there"):
            sartor.export(made / "release", tmp_path / "there", to="peft", replace=replace)
    assert (tmp_path / "there" / "mine.txt").read_text() == "mine"
    with pytest.raises(SignatureError):  # this home trusts nobody
        sartor.export(made / "release", tmp_path / "out", to="peft")


def test_a_tampered_release_or_another_base_is_refused(
    made: Path, tmp_path: Path, options: dict[str, Any], tiny_base: Path
) -> None:
    shutil.copytree(made / "release", tmp_path / "bad")
    (tmp_path / "bad" / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="adapter_config"):
        sartor.export(tmp_path / "bad", tmp_path / "out", to="peft", options=sartor.ExportOptions(**options))
    shutil.copytree(tiny_base, tmp_path / "other")
    (tmp_path / "other" / "added_tokens.json").write_text("{}")
    with pytest.raises(ModelError, match="bound to the base"):
        sartor.export(
            made / "release",
            tmp_path / "out",
            to="peft",
            options=sartor.ExportOptions(base=str(tmp_path / "other"), **options),
        )


def test_memory_that_cannot_hold_the_comparison_is_said_before(
    made: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "available_bytes", lambda: hardware.FreeMemory(1 << 20, "a test"))
    with pytest.raises(BudgetError, match=r"needs 1\.1 GB; 0\.0 GB are there \(a test\)"):
        sartor.export(made / "release", tmp_path / "out", to="peft", options=sartor.ExportOptions(**options))


def test_a_full_disk_leaves_nothing(
    made: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: Any, path: Path, **how: Any) -> None:
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(MissingError, match="disk is full"):
        sartor.export(made / "release", tmp_path / "out", to="merged", options=sartor.ExportOptions(**options))
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.services
def test_replace_takes_the_place_of_an_export(made: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    for replace in (False, True):
        sartor.export(
            made / "release", tmp_path / "out", to="peft", options=sartor.ExportOptions(**options), replace=replace
        )
    assert open_artifact(tmp_path / "out", "export").manifest["form"] == "peft"
    with pytest.raises(ConfigError, match="add --replace"):
        sartor.export(made / "release", tmp_path / "out", to="merged", options=sartor.ExportOptions(**options))


def test_options_name_each_type_once() -> None:
    assert export.ExportOptions(["q8_0", "f16", "q8_0"]).types == ["f16", "q8_0"]
    assert export.ExportOptions(["bf16"]).types == ["bf16"]


@pytest.mark.services
def test_export_uses_held_out_rows_and_revoke_lists_it(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity is measured on 40 generic prompts and 10 held-out rows."""
    monkeypatch.setattr(
        "sartor.evaluate.audit.forgetting_probes.measure_probes",
        lambda *_: {"small_talk": {"skipped": "not of interest here"}},
    )
    sartor.keygen(tmp_path / "keys", trust=True)
    sartor.evaluate(adapter)
    waivers = [
        sartor.Waiver(check, "A. Tester", "a tiny random base gains nothing") for check in ("gain", "forgetting")
    ]
    release = sartor.release(adapter, name="switch", version="1.0", key=tmp_path / "keys", waivers=waivers).release
    done = sartor.export(release.path, tmp_path / "out", to="peft")
    assert done.as_json()["parity"]["prompts"] == {"generic prompts": 40, "held-out rows": 10}
    assert [step["kind"] for step in sartor.inspect(tmp_path / "out")["parents"]][:2] == ["release", "adapter"]
    said = sartor.revoke(tmp_path / "dataset", source="rows.jsonl").as_json()
    assert [entry["path"] for entry in said["exports"]] == [str(tmp_path / "out")]


@pytest.mark.services
@pytest.mark.parametrize("moment_s", moments(0.6, 3))
def test_a_killed_export_leaves_nothing_or_a_whole_one(
    made: Path, tmp_path: Path, options: dict[str, Any], moment_s: float, commands: dict[str, str]
) -> None:
    release, keys, out = str(made / "release"), str(made / "keys"), tmp_path / "out"
    code = f"""import sartor.release.export.export as v; print('READY', flush=True)
v.export({release!r}, {str(out)!r}, to='merged', options=v.Options(key={keys!r}))"""
    run_killed(code, moment_s, commands)
    how = sartor.ExportOptions(**options)
    check(out, lambda: sartor.export(made / "release", out, to="merged", options=how, replace=True))


def write_projectors(part: Path) -> None:
    """What an adapter that reads pictures has beside it; no tower is opened for an export."""
    said = {"name": "efficientnet-lite0", "digest": "ab" * 32, "licence": "Apache-2.0", "width": 4, "stack": 1}
    save_file({"image.mean": torch.zeros(4)}, part / composed_model.FILE, {TOWERS_KEY: json.dumps({"image": said})})


@pytest.mark.parametrize(("form", "where"), [("merged", "transformers"), ("gguf", "llama.cpp")])
def test_merged_and_gguf_exports_refuse_projectors(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, form: Any, where: str
) -> None:
    """A Release that reads images is refused before its base is opened; the remedy is --to peft."""
    monkeypatch.setattr(runtimes, "has_llama_cpp", lambda: True)
    release = releases.signed(tmp_path, tiny_base, files=write_projectors)
    monkeypatch.setattr(export, "open_base", lambda *_, **__: pytest.fail("a base was opened"))
    with pytest.raises(ModelError, match=f"reads image by projectors of its own, and {where}") as caught:
        sartor.export(release.path, tmp_path / "out", to=form, options=sartor.ExportOptions(key=tmp_path / "keys"))
    assert "--to peft" in caught.value.remedy and not (tmp_path / "out").exists()


def test_peft_export_has_projectors_and_describes_them(tmp_path: Path, tiny_base: Path) -> None:
    """README.md names the image encoder and the formula; a note says that parity is of text alone."""
    release = releases.signed(tmp_path, tiny_base, files=write_projectors)
    options = sartor.ExportOptions(key=tmp_path / "keys")
    made = sartor.export(release.path, tmp_path / "out", to="peft", options=options).export
    assert (made.path / composed_model.FILE).read_bytes() == (release.path / composed_model.FILE).read_bytes()
    card = (made.path / "README.md").read_text()
    assert "image by `efficientnet-lite0` (`abababababab`)" in card and "project_out(gelu(project_in" in card
    assert any("text alone" in note for note in made.manifest["parity"]["notes"])
