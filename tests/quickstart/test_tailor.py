"""sartor tailor on the tests' tiny base: what it makes, how it goes on, what it says before time is spent."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from cyclopts import Token

import sartor
from release_fixtures import probe_rows
from sartor.cli import main
from sartor.cli.tuning import _fields
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import AssetError, ConfigError, GateError, MissingError, ModelError, SourceError, StoppedError
from sartor.evaluate.audit import probes
from sartor.quickstart import tailor as verb

HEADER = "Frage;Antwort\r\n"
ROWS = [(f"Wie öffne ich Konto {number}?", f"Über die App, Weg {number % 3}.") for number in range(40)]


def table(folder: Path, encoding: str = "utf-8-sig") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "faq.csv"
    file.write_bytes((HEADER + "".join(f"{prompt};{answer}\r\n" for prompt, answer in ROWS)).encode(encoding))
    return file


def shorten(patch: pytest.MonkeyPatch) -> None:
    """A dozen updates, no picture of the losses, and nothing is fetched."""
    patch.setattr("sartor.tune.auto_settings.UPDATES", 12)
    patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    patch.setattr(verb, "_ASSETS", ("small-talk",))
    patch.setattr(probes, "chitchat_rows", probe_rows)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


FIELDS = {"prompt": "Frage", "completion": "Antwort"}


def tailored(folder: Path, base: Path, **options: Any) -> verb.Tailored:
    said = {"fields": FIELDS, "licence": "own", **options}
    return sartor.tailor(table(folder), name="faq", base=str(base), out=folder / "faq", show=False, **said)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with the rows in faq.csv, and what an uninterrupted call made of them in faq/; `kept` has a copy of both."""
    folder = tmp_path_factory.mktemp("tailored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        shorten(patch)
        tailored(folder / "work", tiny_base)
    shutil.copytree(folder / "work", folder / "kept")
    return folder / "work"


@pytest.fixture
def finished(whole: Path) -> Path:
    """The folder `whole` as that call left it: what is made of the rows names where they are."""
    shutil.rmtree(whole)
    shutil.copytree(whole.with_name("kept"), whole)
    return whole


def opened(folder: Path, name: str) -> Artifact:
    return open_artifact(folder / "faq" / name)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252"])
def test_spreadsheet_becomes_an_adapter_with_a_report(
    encoding: str, tmp_path: Path, tiny_base: Path, quick: None
) -> None:
    """The gate of a random base holds it back, and the command still ends well and says what can be done."""
    table(tmp_path, encoding)
    lines: list[str] = []
    file = tmp_path / "faq.csv"
    made = sartor.tailor(
        file,
        name="faq",
        base=str(tiny_base),
        out=tmp_path / "faq",
        fields=FIELDS,
        licence="own",
        show=False,
        notice=lines.append,
    )
    said = made.as_json()
    assert set(said) == {
        "dataset",
        "adapter",
        "report",
        "release",
        "gate",
        "recipes",
        "metrics",
        "forgetting",
        "evidence",
        "next",
        "wall_s",
    }
    assert said["release"] is None and said["gate"]["licence"] == "pass" and said["gate"]["gain"] != "pass"
    assert said["next"][0] == f'sartor ask {tmp_path}/faq/adapter "..."'
    assert made.dataset.manifest["counts"]["splits"] == {"train": 32, "eval": 8}
    assert made.dataset.manifest["sources"][0]["encoding"] == ("" if encoding == "utf-8-sig" else encoding)
    assert any(line.startswith("plan     time") for line in lines)
    recipe = yaml.safe_load((tmp_path / "faq" / "tune.yaml").read_text())
    assert recipe == {"base": str(tiny_base), "data": str(tmp_path / "faq" / "data")}
    reply = sartor.ask(tmp_path / "faq" / "adapter", "Wie öffne ich Konto 3?", sampling={"max_tokens": 2})
    assert reply.as_json()["unreleased"] is True and "unreleased" in reply.reason and reply.agent == "faq"


def test_second_call_makes_nothing_again(
    finished: Path, tiny_base: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tuple(opened(finished, name).id for name in ("data", "adapter", "report"))
    monkeypatch.setattr(verb, "plan", lambda *_, **__: pytest.fail("planned again"))
    monkeypatch.setattr(verb, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    again = tailored(finished, tiny_base)
    assert (again.dataset.id, again.adapter.id, again.report.id) == first


@pytest.mark.parametrize("stage", ["plan", "tune", "evaluate", "gate"])
def test_call_that_was_stopped_goes_on(
    stage: str, finished: Path, tmp_path: Path, tiny_base: Path, quick: None
) -> None:
    """To the digests of a call that was not."""
    (finished / "faq").rename(tmp_path / "faq")
    with pytest.MonkeyPatch.context() as patch:

        def stopped(*_: Any, **__: Any) -> Any:
            raise StoppedError("stopped", "again", 15)

        patch.setattr(verb, stage, stopped)
        with pytest.raises(StoppedError):
            tailored(finished, tiny_base)
    made = tailored(finished, tiny_base)
    files = ("adapter_model.safetensors", "adapter_config.json")
    assert [(made.adapter.path / file).read_bytes() for file in files] == [
        (tmp_path / "faq" / "adapter" / file).read_bytes() for file in files
    ]
    assert made.dataset.manifest["digest"] == opened(tmp_path, "data").manifest["digest"]
    assert made.report.manifest["metrics"] == opened(tmp_path, "report").manifest["metrics"]


def test_licence_may_be_stated_later(tmp_path: Path, tiny_base: Path, quick: None) -> None:
    """The gate's open check names what states it; the same command with it makes the Dataset anew."""
    first = tailored(tmp_path, tiny_base, licence="")
    assert first.checks["licence"].holds_back
    assert any("--licence own" in step for step in first.next_steps)
    second = tailored(tmp_path, tiny_base, licence="own")
    assert not second.checks["licence"].holds_back and second.dataset.licence == "LicenseRef-own"
    with pytest.raises(ConfigError, match="LicenseRef-own, not MIT"):
        tailored(tmp_path, tiny_base, licence="MIT")


def test_released_if_the_gate_passes(
    tmp_path: Path, tiny_base: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the key of this machine, which is made once and trusted here alone."""
    from sartor.evaluate.limits import Check
    from sartor.release import release as releasing

    passed = {name: Check("pass", "as a test has it") for name in ("gain", "forgetting", "licence")}
    for module in (verb, releasing):
        monkeypatch.setattr(module, "gate", lambda *_, **__: passed)
    lines: list[str] = []
    made = sartor.tailor(
        table(tmp_path),
        name="faq",
        base=str(tiny_base),
        out=tmp_path / "faq",
        fields=FIELDS,
        licence="own",
        show=False,
        notice=lines.append,
    )
    assert made.released is not None and made.as_json()["release"] == str(tmp_path / "faq" / "faq-1.0")
    assert sartor.verify(made.released.path).as_json()["valid"]
    assert sum("keys/default" in line for line in lines) == 1
    again = tailored(tmp_path, tiny_base)
    assert again.released is not None and again.released.id == made.released.id
    own = sartor.keygen(tmp_path / "keys", trust=True)
    signed = tailored(tmp_path, tiny_base, key=tmp_path / "keys")
    assert signed.released is not None and sartor.verify(signed.released.path).signer == own["key_id"]
    assert tailored(tmp_path, tiny_base, key=tmp_path / "keys").released.id == signed.released.id  # type: ignore[union-attr]
    monkeypatch.setattr(verb, "gate", lambda *_, **__: passed | {"gain": Check("fail", "no longer")})
    with pytest.raises(GateError, match="no longer"):
        tailored(tmp_path, tiny_base, require_release=True)
    assert tailored(tmp_path, tiny_base).as_json()["release"] is None


def test_key_that_is_none_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no private key"):
        sartor.tailor(table(tmp_path), name="faq", out=tmp_path / "faq", fields=FIELDS, key=tmp_path / "none")
    assert not (tmp_path / "faq").exists()


def test_required_release_is_an_error_where_it_is_held_back(tmp_path: Path, tiny_base: Path, quick: None) -> None:
    with pytest.raises(GateError, match="holds .* back: gain"):
        tailored(tmp_path, tiny_base, require_release=True)
    assert (tmp_path / "faq" / "report" / "report.html").is_file()


def test_unknown_columns_are_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has the columns 'Frage', 'Antwort'") as caught:
        sartor.tailor(table(tmp_path), name="faq", out=tmp_path / "faq")
    assert caught.value.remedy == "--fields prompt=Frage,completion=Antwort"
    assert not (tmp_path / "faq").exists()


def test_columns_are_asked_for_beside_a_document(tmp_path: Path) -> None:
    """One note in a folder of tables does not hide that the columns of these are unknown."""
    folder = table(tmp_path / "rows").parent
    (folder / "readme.txt").write_text("notes on the rows", encoding="utf-8")
    with pytest.raises(ConfigError, match="has the columns 'Frage', 'Antwort'"):
        sartor.tailor(folder, name="faq", out=tmp_path / "faq")
    recipe = yaml.safe_load(sartor.init(folder, out=tmp_path / "recipes").curate.read_text(encoding="utf-8"))
    assert recipe["sources"][0]["fields"] == FIELDS


def test_remedy_for_columns_can_be_typed(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("Frage (kurz, klar);Antwort des Kunden\nWas?;Das.\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        sartor.tailor(file, name="faq", out=tmp_path / "faq")
    flag, value = shlex.split(caught.value.remedy)
    assert flag == "--fields" and value == "prompt=Frage (kurz,, klar),completion=Antwort des Kunden"
    assert _fields(dict, [Token(value=value)]) == {"prompt": "Frage (kurz, klar)", "completion": "Antwort des Kunden"}


def test_person_at_a_terminal_is_asked(tmp_path: Path, tiny_base: Path, quick: None) -> None:
    answers = iter(["Fragen", "Frage", "Antwort", "own"])
    questions: list[str] = []

    def ask(question: str) -> str:
        questions.append(question)
        return next(answers)

    made = tailored(tmp_path, tiny_base, fields=None, licence="", ask=ask)
    assert len(questions) == 4 and made.checks["licence"].outcome == "pass"
    assert tailored(tmp_path, tiny_base, fields=None, licence="", ask=ask).adapter.id == made.adapter.id, "asked once"


def test_other_options_need_another_directory(finished: Path, tiny_base: Path, quick: None) -> None:
    with pytest.raises(ConfigError, match="was made with other options: system"):
        tailored(finished, tiny_base, system="Du hilfst.")
    made = tailored(finished, tiny_base, system="Du hilfst.", replace=True)
    assert made.dataset.manifest["counts"]["splits"] == {"train": 32, "eval": 8}


def test_options_of_a_failed_first_call_can_be_corrected(tmp_path: Path, tiny_base: Path, quick: None) -> None:
    file, out = tmp_path / "faq.csv", tmp_path / "faq"
    file.write_bytes("Frage;Antwort\r\nGröße;ja\r\n".encode("cp1252"))
    with pytest.raises(SourceError, match="unknown_encoding") as caught:
        sartor.tailor(file, name="faq", base=str(tiny_base), out=out, fields=FIELDS)
    assert "--encoding cp1252" in caught.value.remedy and not out.exists()
    with pytest.raises(ConfigError, match="Antwrt"):
        wrong = {"prompt": "Frage", "completion": "Antwrt"}
        sartor.tailor(file, name="faq", base=str(tiny_base), out=out, fields=wrong, encoding="cp1252")
    with pytest.raises(SourceError, match="held out"):
        sartor.tailor(file, name="faq", base=str(tiny_base), out=out, fields=FIELDS, encoding="cp1252")


def test_next_steps_name_the_minutes_of_a_whole_tuning(finished: Path) -> None:
    """A tuning that its limit ended early is told from one that made all of its updates."""
    out, adapter = finished / "faq", opened(finished, "adapter")
    forecast = json.loads((out / "forecast.json").read_text())
    forecast |= {"updates": 1_000, "time_s": {"high": 590.0}, "evaluation_s": {"high": 10.0}}
    (out / "forecast.json").write_text(json.dumps(forecast))
    assert verb._longer_tuning(out, adapter) == []
    (out / "tune.yaml").write_text(yaml.safe_dump({"budget": {"minutes": 0.5}}))
    (step,) = verb._longer_tuning(out, adapter)
    assert "--replace --minutes 12:" in step and "of 1,000 updates" in step


def test_own_test_rows_are_the_ones_that_are_measured(tmp_path: Path, tiny_base: Path, quick: None) -> None:
    test = tmp_path / "test.jsonl"
    rows = [{"Frage": f"Was kostet Konto {number}?", "Antwort": "Nichts."} for number in range(9)]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = tailored(tmp_path, tiny_base, test=test)
    assert made.dataset.manifest["counts"]["splits"] == {"train": 40, "eval": 9} and made.report.manifest["rows"] == 9


def test_too_few_minutes_are_said_before_the_tuning(tmp_path: Path, tiny_base: Path, quick: None) -> None:
    with pytest.raises(ConfigError, match="minutes are too few") as caught:
        tailored(tmp_path, tiny_base, minutes=0.2)
    assert caught.value.remedy.startswith("--minutes ")
    assert not (tmp_path / "faq" / "adapter").exists()
    assert tailored(tmp_path, tiny_base, minutes=10).adapter.path.is_dir(), "and the same directory takes more"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"name": "Über FAQ"}, "the name"),
        ({"minutes": -1}, "it must be 0"),
        ({"fields": {"promt": "Frage"}}, "promt"),
        ({"licence": "Llama"}, "Llama"),
        ({"base": "nosuch"}, "there is no base"),
    ],
)
def test_bad_options(options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ModelError), match=problem):
        sartor.tailor(table(tmp_path), **{"name": "faq", "out": tmp_path / "faq", **options})
    assert not (tmp_path / "faq").exists()


def test_command_line(tmp_path: Path, tiny_base: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "tailor",
        str(table(tmp_path)),
        "--name",
        "faq",
        "--base",
        str(tiny_base),
        "--out",
        str(tmp_path / "faq"),
    ]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--fields", "prompt=Frage,completion=Antwort", "--licence", "own", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["adapter"] == str(tmp_path / "faq" / "adapter")
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--fields", "prompt"])
    assert ended.value.code == 2 and "is no NAME=COLUMN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "groups", "evidence", "more_rows"),
    [
        ((0.1, 0.6, 0.5, 0.3, 0.7), 40, "better", 0),
        ((0.6, 0.1, -0.5, -0.7, -0.3), 40, "worse", 0),
        # half of the interval is twice the difference: four times the groups
        ((0.1, 0.2, 0.1, -0.1, 0.3), 40, "not enough evidence", 240),
        ((0.2, 0.1, -0.1, -0.3, 0.1), 40, "not enough evidence", 0),
        ((0.0, 0.0, 0.0, -1.0, 1.0), 2, "no difference", 4),
    ],
)
def test_evidence_is_not_the_same_as_worse(
    metric: tuple[float, ...], groups: int, evidence: str, more_rows: int, tmp_path: Path
) -> None:
    """Two rows a group: so many more rows as there are groups wanting, twice."""
    keys = ("base", "tuned", "difference", "low", "high")
    metrics = {"exact_match": dict(zip(keys, metric, strict=True))}
    report = Artifact(tmp_path, {"primary": "exact_match", "metrics": metrics, "groups": groups, "rows": 2 * groups})
    assert verb._evidence(report) == (verb.GainEvidence(evidence), more_rows)


def test_no_network_is_said_before_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **_: Any) -> Path:
        raise AssetError("`pip download` failed: no network", "check the network")

    monkeypatch.setattr(verb.assets, "install", unreachable)
    monkeypatch.setattr(verb, "curate", lambda *_, **__: pytest.fail("rows were read"))
    with pytest.raises(AssetError, match="no network"):
        sartor.tailor(table(tmp_path), name="faq", out=tmp_path / "faq", fields=FIELDS)


def test_full_disk_is_said_before_the_tuning(
    tmp_path: Path, tiny_base: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("sartor.tune.preflight.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(verb, "tune", lambda *_, **__: pytest.fail("tuned"))
    with pytest.raises(MissingError, match="1 MB are free") as caught:
        tailored(tmp_path, tiny_base)
    assert caught.value.remedy.startswith("df -h ")


def test_code_page_may_be_named(tmp_path: Path, tiny_base: Path, quick: None) -> None:
    """Greek in a code page that a short file does not tell from others."""
    file = tmp_path / "rows.csv"
    rows = "".join(f"ερώτηση {number}?;απάντηση {number % 3}\r\n" for number in range(24))
    file.write_bytes(("Frage;Antwort\r\n" + rows).encode("iso8859-7"))
    made = sartor.tailor(
        file,
        name="gr",
        base=str(tiny_base),
        out=tmp_path / "gr",
        fields=FIELDS,
        encoding="iso8859-7",
        licence="own",
        show=False,
    )
    example = next(sartor.read_examples(made.dataset))
    assert "ερώτηση" in example.messages[0].text and made.dataset.manifest["sources"][0]["encoding"] == "iso8859-7"


def test_personal_data_is_said_and_masked_on_request(tmp_path: Path, tiny_base: Path, quick: None) -> None:
    file = tmp_path / "rows.csv"
    rows = [f"Who helps with part {number}?;Ask clerk{number}@firm-example.com.\r\n" for number in range(24)]
    file.write_text("Frage;Antwort\r\n" + "".join(rows))
    said: list[str] = []

    def made(**options: Any) -> list[str]:
        result = sartor.tailor(
            file,
            name="help",
            base=str(tiny_base),
            out=tmp_path / "help",
            fields=FIELDS,
            licence="own",
            show=False,
            notice=said.append,
            **options,
        )
        return [row.messages[-1].text for row in sartor.read_examples(result.dataset)]

    assert all("@firm-example.com" in reply for reply in made())
    (warning,) = [line for line in said if line.startswith("warning  24 of 24 rows may hold personal data")]
    assert "email in 24" in warning and "--personal-data mask" in warning

    def shown() -> list[str]:
        return [line for line in sartor.show(tmp_path / "help" / "data").as_json()["warnings"] if "personal" in line]

    assert len(shown()) == 1
    with pytest.raises(ConfigError, match="made with other options: personal_data"):
        made(personal_data="mask")
    said.clear()
    assert all("<EMAIL_1>" in reply for reply in made(personal_data="mask", replace=True))
    assert not [line for line in said if "personal data" in line] and not shown()


@pytest.mark.parametrize("replace", [False, True])
def test_what_no_call_has_made_is_never_removed(replace: bool, tmp_path: Path) -> None:
    """Rows in a folder `data` of the project, recipes of `sartor init`, an Adapter of somebody's own."""
    (tmp_path / "data").mkdir()
    file = table(tmp_path / "data")
    options: dict[str, Any] = {"name": "faq", "out": tmp_path, "fields": FIELDS, "replace": replace}
    with pytest.raises(ConfigError, match="stands where tailor puts what it makes"):
        sartor.tailor(file, **options)
    (tmp_path / "rows.csv").write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="tailor has not made it"):
        sartor.tailor(tmp_path / "rows.csv", **options)
    assert file.is_file() and not (tmp_path / "tailor.json").exists()


def test_directory_in_the_folder_of_the_rows_is_refused(tmp_path: Path) -> None:
    table(tmp_path)
    with pytest.raises(ConfigError, match="would be read as rows"):
        sartor.tailor(tmp_path, name="faq", out=tmp_path / "faq", fields=FIELDS)
    assert not (tmp_path / "faq").exists()


def test_replace_removes_nothing_where_there_are_no_rows(finished: Path, tiny_base: Path, quick: None) -> None:
    with pytest.raises(ConfigError, match="names no file"):
        sartor.tailor(
            finished / "typo.csv", name="faq", base=str(tiny_base), out=finished / "faq", fields=FIELDS, replace=True
        )
    assert opened(finished, "adapter").path.is_dir() and opened(finished, "report").path.is_dir()


def test_directory_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "faq"):
        with pytest.raises(ConfigError, match="cannot be made"):
            sartor.tailor(table(tmp_path), name="faq", out=out, fields=FIELDS)
        with pytest.raises(ConfigError, match="cannot be made"):
            sartor.init(table(tmp_path), out=out)


def test_disk_that_is_full_at_once_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(verb, "write_file_atomic", full)
    with pytest.raises(MissingError, match="tailor.json could not be written"):
        sartor.tailor(table(tmp_path), name="faq", out=tmp_path / "faq", fields=FIELDS)


def test_rows_that_were_changed_remove_nothing(finished: Path, tiny_base: Path, quick: None) -> None:
    """Not even where so many came that another fraction of them is held out."""
    more = (HEADER + "".join(f"Frage {number};Antwort {number}\r\n" for number in range(2000))).encode()
    for content in (more, b"Frage;Antwort\r\n" + b"Was?;Das.\r\n" * 3):
        (finished / "faq.csv").write_bytes(content)
        with pytest.raises(ConfigError, match="another number of rows|sources that have changed"):
            sartor.tailor(
                finished / "faq.csv",
                name="faq",
                base=str(tiny_base),
                out=finished / "faq",
                fields=FIELDS,
                licence="own",
                show=False,
            )
        assert opened(finished, "adapter").path.is_dir() and opened(finished, "report").path.is_dir()


@pytest.mark.parametrize("text", ["sources: [{path: other.csv}]\n", "sources: [\n"])
def test_recipe_that_a_person_has_changed_is_not_overwritten(
    text: str, finished: Path, tiny_base: Path, quick: None
) -> None:
    (finished / "faq" / "curate.yaml").write_text(text)
    with pytest.raises(ConfigError):
        tailored(finished, tiny_base)
    recipe = finished / "faq" / "curate.yaml"
    assert recipe.read_text() == text and opened(finished, "adapter").path.is_dir()
    assert tailored(finished, tiny_base, replace=True).adapter.path.is_dir()
