"""`personal_data`: what is found and what is not, what is masked where, and that no value is written anywhere."""

from __future__ import annotations

import importlib.util
import json
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sartor.core import config
from sartor.core.errors import ConfigError
from sartor.core.records import TEXT_KEPT, Drop, Example, Message, Origin, Part
from sartor.curate.step import Counting
from sartor.curate.steps.personal_data import DEFAULT, PersonalData
from sartor.text.pii import example_layout, national_ids
from sartor.text.pii.entities import ENTITIES, PiiEntity, normalize, resolve_overlaps
from sartor.text.pii.payment import bech32_checked, is_card, is_iban
from sartor.text.pii.scanner import Scanner

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "personal.py"
EVERYTHING = Scanner(ENTITIES, (), 0.5, ())
ORIGINS = (Origin("rows.jsonl", "rows.jsonl:1"),)
CARD, IBAN, MAIL = "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "bob@example.com"


def _planting() -> Any:
    spec = importlib.util.spec_from_file_location("planting", BENCHMARK)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLANTING = _planting()


def row(*turns: str, **more: Any) -> Example:
    roles = ("user", "assistant")
    return Example(tuple(Message.of(roles[place % 2], turn) for place, turn in enumerate(turns)), ORIGINS, **more)


def apply(example: Example, **options: Any) -> Example | Drop:
    return config.load(PersonalData, options).open(Path())(example)


def masked(text: str, **options: Any) -> str:
    outcome = apply(row("Hello", text), **options)
    assert isinstance(outcome, Example)
    return outcome.reply


def kinds(text: str) -> list[str]:
    return [finding.entity for finding in EVERYTHING.find(text)]


@pytest.mark.parametrize(
    ("text", "entity"),
    [
        ("write to bob@example.com today", "email"),
        ("BOB@GOV.BR is it", "email"),
        ("alice [at] firm [dot] co [dot] uk", "email"),
        ("mail me: bob.smith at example dot com", "email"),
        ("bob&#64;example.com", "email"),
        ("büro@müller.de", "email"),
        ("+49 (0)30 1234567", "phone"),
        ("(555) 123-4567", "phone"),
        ("Tel. Nr.: 030/1234567", "phone"),
        ("06 12 34 56 78", "phone"),
        ("my number is 5551234567", "phone"),
        (f"card {CARD}", "credit_card"),
        ("4111\u00a01111\u20111111\u200b1111", "credit_card"),
        ("４１１１１１１１１１１１１１１１", "credit_card"),
        ("٤١١١ ١١١١ ١١١١ ١١١١", "credit_card"),
        ("4111 1111 1111 1111 12/27 123", "credit_card"),
        (IBAN, "iban"),
        ("gb29nwbk60161331926819", "iban"),
        ("123-45-6789", "national_id"),
        ("ssn 219099999", "national_id"),
        ("RSSMRA85T10A562S", "national_id"),
        ("12345678Z", "national_id"),
        ("756.9217.0769.85", "national_id"),
        ("passport number C01X00T47", "national_id"),
        ("invoice2 4111 1111 1111 1111", "credit_card"),
        ("ask card2 378282246310005", "credit_card"),
        ("4111111111111111 2nd", "credit_card"),
        ("from 203.0.113.7 again", "ip_address"),
        ("2001:db8::8a2e:370:7334", "ip_address"),
        ("00:1B:44:11:3A:B7", "mac_address"),
        ("AKIAIOSFODNN7EXAMPLE", "secret"),
        ("password: hunter2", "secret"),
        ('"db_password"\x00"s3cr3t!x"', "secret"),
        ("postgres://bob:s3cr3t@db.example.com/x", "secret"),
        ("ftp://bob@example.com/x", "email"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----", "secret"),
        ("1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN2", "crypto_wallet"),
        ("bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq", "crypto_wallet"),
        ("742 Evergreen Terrace, Springfield, IL 62704", "address"),
        ("Musterstraße 12a, 10115 Berlin", "address"),
        ("10 rue de la Paix, 75002 Paris", "address"),
        ("Calle Mayor 5, 28013 Madrid", "address"),
        ("it is SW1A 1AA now", "address"),
        ("ul. Nowa 107, Warszawa, 41-710", "address"),
        ("she was born on 12 March 1985", "birth_date"),
        ("DOB: 03/12/1985", "birth_date"),
        ("My name is Ana Ruiz.", "person"),
        ("Sehr geehrte Frau Dr. Weber", "person"),
    ],
)
def test_it_is_found(text: str, entity: str) -> None:
    assert entity in kinds(text)


@pytest.mark.parametrize(
    "text",
    [
        "order 5551234567 of 12.03.2024",
        "icon@2x.png and lodash@4.17.21",
        "git clone git@github.com:owner/name",
        "4111 1111 1111 1112",
        "card-like 1234 5678 9012 3456",
        "DE89370400440532013001",
        "microwave them at 30 seconds increment to warm up",
        "version 1.2.3.4 and section 10.20.30.40",
        "from 1994-1998 he called them",
        "ISBN 978-3-16-148410-0",
        "EAN 4006381333931",
        "at 12:30:45 and std::vector, 127.0.0.1, 255.255.255.0",
        "#a1b2c3 and 123e4567-e89b-12d3-a456-426614174000",
        "commit da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "IMEI 356938035643809",
        "password: required, at least 8 characters",
        "min_pass_rate = pass_dict.get(name)",
        "password = read_password2()",
        "the monkey: banana12345",
        "we looked at amazon dot com",
        "131 S. Ct. 2541 under 42 U.S.C. Section 1983",
        "HR 88, BP 136/58",
        "the war ended on 8 May 1945",
        "Einstein was born on 14 March 1879",
        "It costs 1,234,567.89 USD or 15 000-40 000 SEK",
        "In 2010, 12000 people of 3,141,592 came",
        "",
        "\x00\x00",
        "<EMAIL_1> and password: <SECRET_2>, my name is <PERSON_1>",
    ],
)
def test_it_is_none(text: str) -> None:
    assert EVERYTHING.find(text) == []


def test_detection_reaches_95_percent_recall_and_precision() -> None:
    """Each entity reaches both, and at most 0.5 % of the rows without personal data are hit."""
    figures = PLANTING.quality(count=60, seed=3, min_score=0.5)
    for entity, one in figures["entities"].items():
        assert one["recall"] >= 0.95, (entity, figures["missed"][entity])
        assert one["precision"] >= 0.95, (entity, figures["false"])
    assert figures["clean_rows_hit"] <= 0.005 * figures["clean_rows"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.lists(st.sampled_from(ENTITIES), min_size=1, max_size=4), st.text(max_size=30))
def test_masking_is_idempotent_and_leaves_no_planted_value(seed: int, entities: list[str], around: str) -> None:
    rng = random.Random(seed)
    pairs = [PLANTING.planted(rng, entity) for entity in entities]
    step = PersonalData(entities=ENTITIES)  # type: ignore[arg-type]
    function = step.open(Path())
    once = function(row(*(f"{sentence}\n" for sentence, _ in pairs), around, "The end."))
    assert isinstance(once, Example)
    assert function(once) is once
    text = "\n".join(message.text for message in once.messages)
    assert not [value for _, value in pairs if value in text]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80), st.text(max_size=5))
def test_any_text_is_masked_without_harm(text: str, mark: str) -> None:
    step = PersonalData(entities=ENTITIES)  # type: ignore[arg-type]
    once = step.masker()(text + mark + MAIL)
    assert MAIL not in once
    assert step.masker()(once) == once


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=8) | st.just(MAIL) | st.just(4111111111111111),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.just(MAIL), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_json_stays_json(value: Any) -> None:
    arguments = json.dumps({"of": value})
    calls = json.dumps([{"function": {"name": "f", "arguments": arguments}}])
    example = Example((Message.of("user", "go"), Message("assistant", (), tool_calls=calls)), ORIGINS)
    outcome = apply(example)
    assert isinstance(outcome, Example)
    inner = json.loads(json.loads(outcome.messages[1].tool_calls)[0]["function"]["arguments"])
    assert MAIL not in json.dumps(inner) and "4111111111111111" not in json.dumps(inner)
    if MAIL not in arguments and "4111111111111111" not in arguments:
        assert outcome.messages[1].tool_calls == calls


def test_spans_in_a_drop_are_those_of_the_values() -> None:
    text = f"My mail is {MAIL}, card {CARD}."
    outcome = apply(row("Hi", text), action="drop")
    assert isinstance(outcome, Drop)
    said = [part.split(" at ")[1] for part in outcome.detail.split("; ")]
    spans = [tuple(map(int, part.split(" ")[1].split("-"))) for part in said]
    assert [text[start:end] for start, end in spans] == [MAIL, CARD]
    assert [part.split(" ")[0] for part in said] == ["messages[1].content"] * 2


def test_a_drop_holds_the_id_and_no_text() -> None:
    example = row("Hi", f"It is {MAIL}.")
    outcome = apply(example, action="drop")
    assert isinstance(outcome, Drop)
    assert (outcome.reason, outcome.step, outcome.id, outcome.text) == (
        "personal_data",
        "personal_data",
        example.id,
        "",
    )
    assert (outcome.source, outcome.locator) == ("rows.jsonl", "rows.jsonl:1")
    assert MAIL not in repr(outcome)


def test_a_finding_does_not_show_its_value() -> None:
    (finding,) = EVERYTHING.find(f"It is {MAIL}.")
    assert MAIL not in repr(finding) and finding.value == MAIL


def test_equal_values_have_equal_numbers_in_all_fields_of_a_row() -> None:
    calls = json.dumps(
        [{"function": {"name": "mail", "arguments": json.dumps({"to": "BOB@example.com", "cc": "eve@example.com"})}}]
    )
    example = Example(
        (
            Message("system", (Part("text", f"Owner: {MAIL}"),)),
            Message("user", (Part("text", "Call +49 30 1234567 or 0049 30 123 45 67"),), name=MAIL),
            Message("assistant", (Part("text", f"Written to {MAIL}"),), tool_calls=calls),
        ),
        ORIGINS,
        rejected=(Message.of("assistant", "I told eve@example.com"),),
        tools=json.dumps([{"function": {"description": f"ask {MAIL}"}}]),
    )
    outcome = apply(example)
    assert isinstance(outcome, Example)
    system, user, reply = outcome.messages
    assert (system.text, user.name, user.text) == ("Owner: <EMAIL_1>", "<EMAIL_1>", "Call <PHONE_1> or <PHONE_1>")
    assert reply.text == "Written to <EMAIL_1>"
    assert json.loads(json.loads(reply.tool_calls)[0]["function"]["arguments"]) == {
        "to": "<EMAIL_1>",
        "cc": "<EMAIL_2>",
    }
    assert outcome.rejected[0].text == "I told <EMAIL_2>"
    assert json.loads(outcome.tools)[0]["function"]["description"] == "ask <EMAIL_1>"


def test_plain_placeholders_have_no_number() -> None:
    assert masked(f"{MAIL} and eve@example.com", mask="plain") == "<EMAIL> and <EMAIL>"


def test_numbers_that_stand_in_a_row_are_not_given_again() -> None:
    assert masked(f"<EMAIL_3> knows {MAIL}") == "<EMAIL_3> knows <EMAIL_4>"


def test_a_value_is_masked_where_nothing_says_what_it_is() -> None:
    outcome = apply(row("My ssn is 219099999 and my phone 5551234567", "219099999 and 555-123-4567 are noted"))
    assert isinstance(outcome, Example)
    assert outcome.reply == "<NATIONAL_ID_1> and <PHONE_1> are noted"


def test_a_question_says_what_the_answer_is() -> None:
    assert isinstance(outcome := apply(row("What is your date of birth?", "12/03/1985")), Example)
    assert outcome.reply == "<BIRTH_DATE_1>"


def test_a_value_that_straddles_two_parts_is_masked_in_both() -> None:
    parts = (Part("text", "card 4111 1111 11"), Part("image", media="media/x.png"), Part("text", "11 1111, thanks"))
    outcome = apply(Example((Message("user", parts), Message.of("assistant", "ok")), ORIGINS))
    assert isinstance(outcome, Example)
    assert [part.text for part in outcome.messages[0].content] == ["card <CREDIT_CARD_1>", "", ", thanks"]
    assert outcome.messages[0].content[1] == parts[1]


def test_each_part_is_also_read_by_itself() -> None:
    parts = (Part("text", MAIL), Part("text", "Thanks"))
    outcome = apply(Example((Message("user", parts), Message.of("assistant", "ok")), ORIGINS))
    assert isinstance(outcome, Example)
    assert outcome.messages[0].content[0].text.startswith("<EMAIL_1>")


def test_a_reply_that_is_json_stays_json() -> None:
    text = '{"card": 4111111111111111, "mail": "bob\\u0040example.com", "n": 1.0, "n": 2}'
    assert masked(text) == '{"card": "<CREDIT_CARD_1>", "mail": "<EMAIL_1>", "n": 1.0, "n": 2}'


def test_mail_address_as_group_becomes_a_digest() -> None:
    """Equal addresses keep one group and others do not; a group without personal data is unchanged."""
    one, two, same = (
        apply(row("Hi", text, group=group)) for text, group in (("a", MAIL), ("a", "eve@example.com"), ("b", MAIL))
    )
    assert isinstance(one, Example) and isinstance(two, Example) and isinstance(same, Example)
    assert MAIL not in one.group and one.group != two.group and one.group == same.group
    assert (
        isinstance(untouched := apply(row("Hi", "a", group="customer 12")), Example)
        and untouched.group == "customer 12"
    )


def test_a_row_without_findings_is_the_same_object() -> None:
    example = row("How late is it?", "12:30")
    assert apply(example) is example


@pytest.mark.parametrize(
    ("options", "prompt", "reply"),
    [
        ({"fields": "reply"}, MAIL, "<EMAIL_1>"),
        ({"fields": ["prompt"]}, "<EMAIL_1>", MAIL),
        ({"fields": {"reply": "keep"}}, "<EMAIL_1>", MAIL),
        ({"entities": ["phone"]}, MAIL, MAIL),
        ({"entities": {"email": "keep"}}, MAIL, MAIL),
        ({"allow": ["BOB@example.com"]}, MAIL, MAIL),
        ({"allow": ["/.*@example\\.com/"]}, MAIL, MAIL),
        ({"allow": ["/example/"]}, "<EMAIL_1>", "<EMAIL_1>"),
    ],
)
def test_options_say_where_and_what(options: dict[str, Any], prompt: str, reply: str) -> None:
    outcome = apply(row(MAIL, MAIL), **options)
    assert isinstance(outcome, Example)
    assert (outcome.messages[0].text, outcome.reply) == (prompt, reply)


@pytest.mark.parametrize(
    ("options", "drops"),
    [
        ({"action": "drop"}, True),
        ({"entities": {"email": "drop"}}, True),
        ({"entities": {"secret": "drop"}}, False),
        ({"fields": {"reply": "drop", "prompt": "mask"}}, True),
        ({"fields": {"prompt": "drop"}}, False),
        ({"action": "drop", "entities": {"email": "mask"}}, False),
        ({"action": "drop", "fields": {"reply": "mask"}}, False),
        ({"entities": {"email": "mask"}, "fields": {"reply": "drop"}}, True),
        ({"action": "drop", "fields": "prompt"}, False),
    ],
)
def test_the_stricter_of_entity_and_field_holds(options: dict[str, Any], drops: bool) -> None:
    assert isinstance(apply(row("Hello", MAIL), **options), Drop) is drops


def test_the_firms_own_hotline_is_allowed_in_any_spelling() -> None:
    assert (
        masked("Call +49 30 1234567, 030 1234567 or 030 7654321", allow=["+49 30 1234567"])
        == "Call +49 30 1234567, 030 1234567 or <PHONE_1>"
    )


def test_countries_bound_what_is_looked_for() -> None:
    assert masked("DNI 12345678Z", countries=["DE"]) == "DNI 12345678Z"
    assert masked("DNI 12345678Z", countries=["ES"]) == "DNI <NATIONAL_ID_1>"


def test_min_score_bounds_what_counts() -> None:
    assert masked("742 Evergreen Street", min_score=0.9) == "742 Evergreen Street"


@pytest.mark.parametrize(
    "options",
    [
        {"min_score": 1.5},
        {"countries": ["UK"]},
        {"countries": ["Germany"]},
        {"allow": ["/(/"]},
        {"entities": []},
        {"entities": ["emial"]},
        {"entities": {"email": "dorp"}},
        {"fields": {"repl": "drop"}},
        {"action": "hide"},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config.load(PersonalData, options)


@pytest.mark.parametrize(
    "options", [{}, {"entities": {"person": "mask"}}, {"fields": {"reply": "drop"}}, {"fields": ["reply"]}]
)
def test_options_survive_the_manifest(options: dict[str, Any]) -> None:
    step = config.load(PersonalData, options)
    assert config.load(PersonalData, config.dump(step)) == step


def test_a_mapping_of_entities_adds_to_the_default_set() -> None:
    step = config.load(PersonalData, {"entities": {"person": "mask", "phone": "keep"}})
    assert set(DEFAULT) - {"phone"} <= {entity for entity, action in step.entity_actions().items() if action != "keep"}
    assert step.entity_actions()["person"] == "mask"


def test_the_tally_counts_by_entity_and_field() -> None:
    function = PersonalData().open(Path())
    assert isinstance(function, Counting)
    function(row(f"{MAIL}, {CARD}", f"{MAIL} and {MAIL}"))
    function(row("Hi", "there"))
    assert dict(function.tally) == {"email.prompt": 1, "credit_card.prompt": 1, "email.reply": 2}


def test_a_masker_reads_raw_json_that_does_not_parse() -> None:
    mask = PersonalData().masker()
    assert (
        mask('{"a": "call\\n0151 23456789", "b": "bob\\u0040example.com"')
        == '{"a": "call\\n<PHONE_1>", "b": "<EMAIL_1>"'
    )
    assert mask(f"row 3: no field {MAIL!r}") == "row 3: no field '<EMAIL_1>'"


def test_value_cut_off_at_the_evidence_limit_is_masked() -> None:
    """Evidence ends after TEXT_KEPT characters; what is left of a value there is masked at each length."""
    for value in (MAIL, CARD, IBAN, "+49 30 1234567"):
        for length in range(4, len(value)):
            text = ("x " * TEXT_KEPT)[: TEXT_KEPT - length] + value[:length]
            assert len(text) == TEXT_KEPT
            assert value[: min(length, 8)] not in PersonalData().masker()(text)


def test_set_aside_rows_are_masked_in_every_field() -> None:
    step = config.load(PersonalData, {"action": "drop", "fields": "reply"})
    aside = step.row_masker()(row(MAIL, CARD))
    assert (aside.messages[0].text, aside.reply) == ("<EMAIL_1>", "<CREDIT_CARD_1>")


def test_nothing_reaches_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **more: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    code = (
        "import socket, sys, pyarrow.fs\n"  # which derives a class from socket.socket
        "def refuse(*a, **k): sys.exit('a socket was opened')\n"
        "socket.socket = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from pathlib import Path\n"
        "from sartor.curate.steps.personal_data import PersonalData\n"
        "mask = PersonalData().masker()\n"
        f"assert mask('{MAIL}, ssn 219-09-9999, bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq').count('<') == 3\n"
        "assert not {'torch', 'spacy', 'transformers', 'presidio_analyzer'} & set(sys.modules), 'too much is loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert masked(MAIL) == "<EMAIL_1>"


def test_no_value_is_logged(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(0)
    rng = random.Random(5)
    for entity in ENTITIES:
        sentence, value = PLANTING.planted(rng, entity)
        masked(sentence, entities=list(ENTITIES), action="mask")
        assert value not in caplog.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (is_card, "378282246310005", "378282246310006"),
        (is_card, "4111111111111111", "1111111111111117"),
        (is_iban, "GB82WEST12345698765432", "GB82WEST12345698765433"),
        # BIP 173 and BIP 350, test vectors; one sign changed
        (bech32_checked, "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t5"),
        (
            bech32_checked,
            "bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqzk5jj0",
            "bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqzk5jj9",
        ),
    ],
)
def test_check_digits_decide(check: Any, right: str, wrong: str) -> None:
    assert check(right) and not check(wrong)


# subtype -> a number that is valid, and one of the same form whose check fails; the issuers' and stdnum's own examples
NATIONAL_NUMBERS = {
    "at_svnr": ("1237 010180", "1238 010180"),
    "au_medicare": ("2123 45670 1", "2123 45671 1"),
    "au_tfn": ("123 456 782", "123 456 783"),
    "be_rn": ("85.07.30-033.28", "85.07.30-033.29"),
    "br_cpf": ("529.982.247-25", "529.982.247-24"),
    "ca_sin": ("123-456-782", "123-456-783"),
    "ch_ahv": ("756.9217.0769.85", "756.9217.0769.84"),
    "cl_rut": ("12.345.678-5", "12.345.678-6"),
    "cn_id": ("11010519491231002X", "110105194912310021"),
    "cz_rc": ("736028/5163", "736028/5164"),
    "de_health": ("A123456780", "A123456781"),
    "de_id_card": ("T220001293", "T220001294"),
    "de_insurance": ("15070649C103", "15070649C104"),
    "de_passport": ("C01X00T478", "C01X00T479"),
    "de_tax_id": ("36 574 261 809", "36 574 261 808"),
    "dk_cpr": ("211062-5629", "311362-5629"),
    "es_nie": ("X2482300W", "X2482300A"),
    "es_nif": ("54362315K", "54362315Z"),
    "fi_hetu": ("131052-308T", "131052-308U"),
    "fr_nir": ("2 55 08 14168 025 38", "2 55 08 14168 025 39"),
    "gb_nhs": ("943 476 5870", "943 476 5871"),
    "gb_nino": ("AB 12 34 56 C", "GB 12 34 56 C"),
    "il_id": ("039337423", "039337424"),
    "in_aadhaar": ("2341 2341 2346", "2341 2341 2347"),
    "in_pan": ("ACUPA7085R", "ACUPA0000R"),
    "it_fiscal_code": ("RCCMNL83S18D969H", "RCCMNL83S18D969"),
    "kr_rrn": ("971013-1019876", "971313-1019876"),
    "mx_curp": ("BOXW310820HNERXN09", "BOXW310820HNERXN08"),
    "ng_nin": ("12345678902", "12345678901"),
    "nl_bsn": ("111222333", "111222334"),
    "no_fnr": ("151086 95088", "151086 95077"),
    "pl_pesel": ("44051401359", "44051401358"),
    "pt_nif": ("123456789", "123456788"),
    "ro_cnp": ("1800101221144", "1800101221145"),
    "se_personnummer": ("880320-0016", "880320-0018"),
    "sg_nric": ("S1234567D", "S1234567E"),
    "sk_rc": ("736028/5163", "736028/5164"),
    "th_id": ("1-2345-45678-78-1", "1-2345-45678-78-9"),
    "tr_id": ("17291716060", "17291716050"),
    "us_itin": ("900-70-0000", "900-69-0000"),
    "us_ssn": ("219-09-9999", "666-09-9999"),
    "za_id": ("7503305044089", "7503305044088"),
}


def test_every_national_number_has_an_example() -> None:
    assert set(NATIONAL_NUMBERS) == {number.subtype for number in national_ids.NUMBERS}


@pytest.mark.parametrize("number", national_ids.NUMBERS, ids=lambda number: number.subtype)
def test_number_is_found_behind_a_word_by_its_check(number: national_ids.NationalId) -> None:
    """Its country alone is asked for, so that no other country's number covers it."""
    valid, invalid = NATIONAL_NUMBERS[number.subtype]
    find = national_ids.opener([number.country])
    subtypes = {
        text: {hit.subtype for hit in find(normalize(f"national id number {text} on the form"))}
        for text in (valid, invalid)
    }
    assert number.subtype in subtypes[valid] and number.subtype not in subtypes[invalid]


def test_of_two_findings_the_surer_stands_for_both() -> None:
    sure, less, far = (
        PiiEntity(5, 10, "email", "", 0.9, "a"),
        PiiEntity(8, 14, "phone", "", 0.6, "b"),
        PiiEntity(20, 25, "phone", "", 0.6, "c"),
    )
    (first, second) = resolve_overlaps([far, less, sure])
    assert (first.start, first.end, first.entity, second) == (5, 14, "email", far)


def test_a_sight_says_where_its_characters_stood() -> None:
    text = "a\u200b１&nbsp;b"
    sight = normalize(text)
    assert (sight.flat, list(sight.starts or ())) == ("a1 b", [0, 2, 3, 9])


def test_leaves_of_no_object_are_none() -> None:
    assert [
        example_layout.leaves(text) for text in ("1", '"a"', "{", "[1,", "", " x", "[" * 100_000 + "]" * 100_000)
    ] == [None] * 7


@pytest.mark.services
def test_text_of_10_000_values_is_masked_completely() -> None:
    """A text full of addresses and phone numbers must not take quadratic time."""
    text = " ".join(f"user{number}@example.com, phone 0171 {number:07}" for number in range(1000, 6000))
    outcome = apply(row("Hi", text))
    assert isinstance(outcome, Example)
    assert "@" not in outcome.reply and outcome.reply.count("<") == 10_000


def test_a_language_model_is_no_number_of_a_model() -> None:
    assert "9018" not in masked("As an AI language model, I cannot help with (030) 9018 20 446")
