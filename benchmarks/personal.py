"""How much planted personal data `personal_data` finds, how much it finds that is none, and how fast it is.

Values of every entity are made by seeded generators with their own checksums, in the forms in which people write them,
and put into sentences of chat rows; other sentences hold what looks like them: order numbers, versions, dates, prices,
ISBN, times, hex colours, UUIDs, IMEI, numbers of 16 digits and IBANs whose check digits are wrong, article numbers
like telephone numbers. `recall` is the fraction of planted values of which nothing is left, `precision` the fraction
of findings that touch a planted value of their own entity; it is absent where there are none.
`by_any` counts a value as found where another entity's finding covers it.
Speed and findings are also measured on `chitchat`, where that asset is installed. `another_author` has national
numbers of the package Faker, of 18 locales, each behind the word by which people of that country call it, and numbers
of Faker's that are none (EAN, ISBN, digits of the same lengths).

    python benchmarks/personal.py --json
    python benchmarks/personal.py --json --small    # a few planted rows: shows that it runs
"""

from __future__ import annotations

import argparse
import json
import random
import string
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import smallest
from results import print_result

from sartor.core.home import home
from sartor.core.records import Example, Message, Origin
from sartor.curate.steps.personal_data import DEFAULT, PersonalData
from sartor.text.pii.entities import ENTITIES
from sartor.text.pii.scanner import Scanner

Random = random.Random
FIRST = (
    "Ana",
    "Bob",
    "Chloe",
    "Dieter",
    "Elif",
    "Femi",
    "Grace",
    "Hiro",
    "Ines",
    "Jonas",
    "Karin",
    "Luca",
    "Mei",
    "Noor",
    "Olga",
    "Pedro",
    "Quinn",
    "Rosa",
    "Sven",
    "Tara",
    "Uwe",
    "Vera",
    "Wanda",
    "Yusuf",
)
LAST = (
    "Abbott",
    "Becker",
    "Castillo",
    "Dubois",
    "Eriksson",
    "Fischer",
    "Garcia",
    "Hansen",
    "Ivanov",
    "Jensen",
    "Keller",
    "Lopez",
    "Moreau",
    "Nowak",
    "Okafor",
    "Peters",
    "Rossi",
    "Smith",
)

HEX = "0123456789abcdef"
SPEED_ROWS = 3000
# with `--small`
SMALL_ROWS, SMALL_SPEED_ROWS = 12, 100
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def digits(rng: Random, count: int, first: str = "0123456789") -> str:
    return rng.choice(first) + "".join(rng.choice(string.digits) for _ in range(count - 1))


def luhn_digit(body: str) -> str:
    total = sum(int(d) if i % 2 else sum(divmod(2 * int(d), 10)) for i, d in enumerate(reversed(body)))
    return str(-total % 10)


def grouped(text: str, sizes: tuple[int, ...], mark: str) -> str:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return mark.join(piece for piece in [*pieces, text[at:]] if piece)


def email(rng: Random) -> str:
    first, last = rng.choice(FIRST).lower(), rng.choice(LAST).lower()
    local = rng.choice(
        [f"{first}.{last}", f"{first}_{last}{rng.randint(1, 99)}", f"{first[0]}{last}", f"{first}+shop", first]
    )
    domain = rng.choice(["example.com", "gmail.com", "mail.firma.de", "acme.co.uk", "uni-köln.de", "gov.br", "web.io"])
    said = f"{local}@{domain}"
    form = rng.randrange(8)
    if form == 0:
        return f"{local} [at] {domain.replace('.', ' [dot] ')}"
    if form == 1:
        return f"{local}(at){domain}"
    return said.upper() if form == 2 else said


def phone(rng: Random) -> str:
    number = digits(rng, 7)
    forms = [
        f"+1 {digits(rng, 3, '23456789')}-{digits(rng, 3, '23456789')}-{digits(rng, 4)}",
        f"({digits(rng, 3, '23456789')}) {digits(rng, 3, '23456789')}-{digits(rng, 4)}",
        f"{digits(rng, 3, '23456789')}-{digits(rng, 3, '23456789')}-{digits(rng, 4)}",
        f"{digits(rng, 3, '23456789')}.{digits(rng, 3, '23456789')}.{digits(rng, 4)}",
        f"{digits(rng, 3, '23456789')}{digits(rng, 3, '23456789')}{digits(rng, 4)}",
        f"+49 30 {number}",
        f"030/{number}",
        f"+49 (0)171 {number}",
        f"0171 {number}",
        f"0049 40 {number}",
        f"+44 7700 900{digits(rng, 3)}",
        f"07700 900{digits(rng, 3)}",
        f"020 7946 0{digits(rng, 3)}",
        "06 " + " ".join(digits(rng, 2) for _ in range(4)),
        "+33 6 " + " ".join(digits(rng, 2) for _ in range(4)),
        f"+34 6{digits(rng, 2)} {digits(rng, 3)} {digits(rng, 3)}",
        f"+91 9{digits(rng, 4)} {digits(rng, 5)}",
        f"{digits(rng, 3, '23456789')}-{digits(rng, 3, '23456789')}-{digits(rng, 4)} ext. {digits(rng, 3)}",
        f"001-{digits(rng, 3, '23456789')}-{digits(rng, 3, '23456789')}-{digits(rng, 4)}x{digits(rng, 4)}",
    ]
    return rng.choice(forms)


def card(rng: Random) -> str:
    prefix, length = rng.choice(
        [("4", 16), ("51", 16), ("2221", 16), ("34", 15), ("6011", 16), ("3530", 16), ("36", 14), ("62", 16)]
    )
    body = prefix + digits(rng, length - len(prefix) - 1)
    number = body + luhn_digit(body)
    sizes = {16: (4, 4, 4, 4), 15: (4, 6, 5), 14: (4, 6, 4)}[length]
    mark = rng.choice(["", " ", "-", "\u00a0", "\u2011", "\u200b"])
    said = grouped(number, sizes, mark)
    return said.translate({48 + d: 0xFF10 + d for d in range(10)}) if rng.random() < 0.05 else said


def iban_of(country: str, body: str) -> str:
    value = int("".join(str(int(sign, 36)) for sign in body + country + "00"))
    return f"{country}{98 - value % 97:02}{body}"


def iban(rng: Random) -> str:
    country, body = rng.choice(
        [
            ("DE", digits(rng, 18)),
            ("GB", "NWBK" + digits(rng, 14)),
            ("FR", digits(rng, 23)),
            ("ES", digits(rng, 20)),
            ("NL", "ABNA" + digits(rng, 10)),
            ("IT", "X" + digits(rng, 22)),
            ("CH", digits(rng, 17)),
            ("PL", digits(rng, 24)),
        ]
    )
    text = iban_of(country, body)
    return rng.choice([text, grouped(text, (4,) * 8, " "), grouped(text, (4,) * 8, "-"), text.lower()])


def ssn(rng: Random) -> str:
    return f"{rng.randint(1, 665):03}-{rng.randint(1, 99):02}-{rng.randint(1, 9999):04}"


def dni(rng: Random) -> str:
    number = rng.randint(10_000_000, 99_999_999)
    return f"{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


def nir(rng: Random) -> str:
    born = f"{rng.choice('12')}{rng.randint(0, 99):02}{rng.randint(1, 12):02}"
    body = f"{born}{rng.randint(1, 95):02}{rng.randint(1, 999):03}{rng.randint(1, 999):03}"
    key = 97 - int(body) % 97
    return f"{body[0]} {body[1:3]} {body[3:5]} {body[5:7]} {body[7:10]} {body[10:]} {key:02}"


def bsn(rng: Random) -> str:
    while True:
        number = digits(rng, 9, "123456789")
        if (sum(int(d) * w for d, w in zip(number, (9, 8, 7, 6, 5, 4, 3, 2, -1), strict=True))) % 11 == 0:
            return number


def pesel(rng: Random) -> str:
    body = f"{rng.randint(40, 99)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}{rng.randint(0, 9999):04}"
    return body + str(-sum(int(d) * w for d, w in zip(body, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3), strict=True)) % 10)


def cpf(rng: Random) -> str:
    body = digits(rng, 9)
    for _ in range(2):
        total = sum(int(d) * (len(body) + 1 - i) for i, d in enumerate(body))
        body += str(total * 10 % 11 % 10)
    return f"{body[:3]}.{body[3:6]}.{body[6:9]}-{body[9:]}"


def nino(rng: Random) -> str:
    return (
        f"{rng.choice(['AB', 'CE', 'JK', 'PW'])} {digits(rng, 2)} {digits(rng, 2)} {digits(rng, 2)} "
        f"{rng.choice('ABCD')}"
    )


def ahv(rng: Random) -> str:
    body = "756" + digits(rng, 9)
    check = -sum(int(d) * (3 if i % 2 else 1) for i, d in enumerate(body)) % 10
    return f"756.{body[3:7]}.{body[7:11]}.{body[11]}{check}"


def sin(rng: Random) -> str:
    body = digits(rng, 8, "1245679")
    return grouped(body + luhn_digit(body), (3, 3, 3), " ")


def personnummer(rng: Random) -> str:
    body = f"{rng.randint(40, 99)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}{rng.randint(0, 999):03}"
    return f"{body[:6]}-{body[6:]}{luhn_digit(body)}"


def hetu(rng: Random) -> str:
    body = f"{rng.randint(1, 28):02}{rng.randint(1, 12):02}{rng.randint(40, 99)}", f"{rng.randint(2, 899):03}"
    return f"{body[0]}-{body[1]}{'0123456789ABCDEFHJKLMNPRSTUVWXY'[int(''.join(body)) % 31]}"


def passport(rng: Random) -> str:
    return rng.choice("CFGHJK") + digits(rng, 8)


# (the words before it, how it is made)
NATIONAL: tuple[tuple[str, Callable[[Random], str]], ...] = (
    ("SSN", ssn),
    ("", ssn),
    ("DNI", dni),
    ("", dni),
    ("sécu", nir),
    ("BSN", bsn),
    ("PESEL", pesel),
    ("CPF", cpf),
    ("", nino),
    ("AHV", ahv),
    ("SIN", sin),
    ("personnummer", personnummer),
    ("", hetu),
    ("passport number", passport),
)


def national_id(rng: Random) -> tuple[str, str]:
    before, make = rng.choice(NATIONAL)
    return before, make(rng)


def ip(rng: Random) -> str:
    if rng.random() < 0.3:
        return (
            ":".join(f"{rng.getrandbits(16):x}" for _ in range(8))
            if rng.random() < 0.5
            else f"2001:db8::{rng.getrandbits(16):x}:{rng.getrandbits(16):x}"
        )
    return ".".join(
        str(part)
        for part in (
            rng.choice([10, 192, 203, 81, 172]),
            rng.randint(0, 255),
            rng.randint(0, 255),
            rng.randint(1, 254),
        )
    )


def mac(rng: Random) -> str:
    parts = [f"{rng.randint(0, 255):02x}" for _ in range(6)]
    return rng.choice([":".join(parts), "-".join(parts).upper()])


def word(rng: Random, count: int, signs: str = string.ascii_letters + string.digits) -> str:
    return "".join(rng.choice(signs) for _ in range(count))


def secret(rng: Random) -> tuple[str, str]:
    upper = string.ascii_uppercase + "234567"
    return rng.choice(
        [
            ("", "AKIA" + word(rng, 16, upper)),
            ("", "ghp_" + word(rng, 36)),
            ("", f"xoxb-{digits(rng, 12)}-{word(rng, 24)}"),
            ("", "sk-proj-" + word(rng, 48)),
            ("", f"eyJ{word(rng, 30)}.eyJ{word(rng, 60)}.{word(rng, 43)}"),
            ("", "sk_live_" + word(rng, 24)),
            ("", "AIza" + word(rng, 35)),
            ("", f"-----BEGIN RSA PRIVATE KEY-----\n{word(rng, 64)}\n{word(rng, 64)}\n-----END RSA PRIVATE KEY-----"),
            ("password:", word(rng, 6) + rng.choice("0123456789!$#")),
            ("Passwort:", word(rng, 6, string.ascii_lowercase) + str(rng.randint(10, 99))),
            ("api_key =", word(rng, 32, string.hexdigits.lower()[:16])),
            ("token=", word(rng, 40)),
            ("the password is", word(rng, 5, string.ascii_lowercase) + str(rng.randint(10, 9999))),
        ]
    )


def wallet(rng: Random) -> str:
    import hashlib

    alphabet = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    if rng.random() < 0.4:
        return "0x" + word(rng, 40, HEX)
    raw = bytes([rng.choice([0, 5])]) + rng.randbytes(20)
    raw += hashlib.sha256(hashlib.sha256(raw).digest()).digest()[:4]
    number, text = int.from_bytes(raw, "big"), ""
    while number:
        number, left = divmod(number, 58)
        text = alphabet[left] + text
    return "1" * (len(raw) - len(raw.lstrip(b"\0"))) + text


def address(rng: Random) -> str:
    n = rng.randint(1, 299)
    street = rng.choice(("Oak", "Maple", "Harbour", "Station", "Church", "Mill", "Victoria", "Kennedy"))
    zip_code = digits(rng, 5, "123456789")
    us_town = rng.choice(["Springfield, IL", "Portland, OR", "Salt Lake City, UT"])
    german = rng.choice(["Haupt", "Bahnhof", "Garten", "Goethe"]) + rng.choice(["straße", "str."])
    de_town = rng.choice(["Berlin", "Köln", "Bad Homburg"])
    french = rng.choice(["de la Paix", "Victor Hugo", "du Moulin"])
    fr_town = rng.choice(["Paris", "Saint-Denis", "Aix-en-Provence"])
    return rng.choice(
        [
            f"{n} {street} {rng.choice(['Street', 'Ave', 'Road', 'Blvd', 'Lane'])}, {us_town} {zip_code}",
            f"{n} {street} Street",
            f"{n} {street} Road, London {rng.choice(['SW1A 1AA', 'N1 9GU', 'EC1V 2NX'])}",
            f"{german} {n}{rng.choice(['', 'a'])}, {zip_code} {de_town}",
            f"Am {rng.choice(['Markt', 'Hafen'])} {n}, {digits(rng, 5, '123456789')} Bremen",
            f"{n} rue {french}, {zip_code} {fr_town}",
            f"Calle {rng.choice(['Mayor', 'de Alcalá', 'San Juan'])} {n}, 28{digits(rng, 3)} Madrid",
            f"Via {rng.choice(['Roma', 'Garibaldi'])} {n}, {digits(rng, 5, '123456789')} Milano",
            f"{rng.choice(['Keizersgracht', 'Dorpsstraat'])} {n}, {digits(rng, 4, '123456789')} AB Amsterdam",
            f"P.O. Box {n}",
        ]
    )


def birth_date(rng: Random) -> tuple[str, str]:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1930, 2010)
    name = MONTHS[month - 1]
    said = rng.choice(
        [
            f"{day:02}/{month:02}/{year}",
            f"{day}.{month}.{year}",
            f"{year}-{month:02}-{day:02}",
            f"{day} {name} {year}",
            f"{name} {day}, {year}",
        ]
    )
    return rng.choice(["born on", "DOB:", "date of birth is", "geboren am", "Geburtsdatum:"]), said


def person(rng: Random) -> tuple[str, str]:
    return rng.choice(
        ["my name is", "Dear Mr", "I am called", "Frau", "Ich heiße"]
    ), f"{rng.choice(FIRST)} {rng.choice(LAST)}"


CARRIERS: dict[str, list[str]] = {
    "email": [
        "Please write to {} about it.",
        "You can reach me at {}, thanks",
        "{} is the address on file",
        "Send the invoice to: {}.",
    ],
    "phone": [
        "Call me on {} after six.",
        "My number is {}.",
        "Tel: {}",
        "Our phone number changed to {} last week",
        "WhatsApp {} works too",
    ],
    "credit_card": [
        "My card {} was charged twice.",
        "Pay with {} please",
        "card number: {}, valid till 12/27",
        "It says {} on the card",
    ],
    "iban": ["Transfer it to {}.", "IBAN: {}", "The refund goes to {} please", "my account is {} at the local bank"],
    "national_id": ["It is {} on the form", "My {}", "I gave them {} already.", "number: {}"],
    "ip_address": [
        "It fails from {} only",
        "The server at {} is down.",
        "ping {} gives nothing",
        "login from {} at night",
    ],
    "mac_address": ["The adapter is {}.", "MAC {}", "Device {} is blocked"],
    "secret": ["We use {}", "{}", "It broke with {} set", "Here: {} and nothing else"],
    "crypto_wallet": ["Send it to {}.", "wallet {}", "My address on chain is {} now"],
    "address": ["I live at {}.", "Ship it to {} please", "{}", "The office is at {}, second floor"],
    "birth_date": ["She was {}.", "patient, {}", "I am {} and fine"],
    "person": ["Hello, {}.", "{}, I need help", "Hi! {} and I have a question"],
}
MAKERS: dict[str, Callable[[Random], Any]] = {
    "email": email,
    "phone": phone,
    "credit_card": card,
    "iban": iban,
    "national_id": national_id,
    "ip_address": ip,
    "mac_address": mac,
    "secret": secret,
    "crypto_wallet": wallet,
    "address": address,
    "birth_date": birth_date,
    "person": person,
}


def negative(rng: Random) -> str:
    """A sentence without personal data that looks as if it held some."""
    bad_card = digits(rng, 15, "45")
    bad_card += str((int(luhn_digit(bad_card)) + rng.randint(1, 9)) % 10)
    good = iban_of("DE", digits(rng, 18))
    bad_iban = good[:-1] + str((int(good[-1]) + rng.randint(1, 9)) % 10)
    imei = "35" + digits(rng, 12)
    month = rng.randint(1, 12)
    isbn = f"978-{digits(rng, 1)}-{digits(rng, 3)}-{digits(rng, 5)}-{digits(rng, 1)}"
    return rng.choice(
        [
            f"Order number {digits(rng, 10, '123456789')} has not arrived.",
            f"Invoice {digits(rng, 8)} of {rng.randint(1, 28)}.{rng.randint(1, 12)}.2023 is open",
            f"We run version {rng.randint(1, 9)}.{rng.randint(0, 20)}.{rng.randint(0, 9)}.{rng.randint(0, 99)} on it",
            f"Update to v{rng.randint(1, 9)}.{rng.randint(0, 20)}.{rng.randint(0, 99)} first",
            f"The meeting is on {rng.randint(2020, 2026)}-{month:02}-{rng.randint(1, 28):02} at "
            f"{rng.randint(10, 23)}:30.",
            f"It costs {rng.randint(1, 9)},{digits(rng, 3)},{digits(rng, 3)}.{digits(rng, 2)} USD",
            f"ISBN {isbn} is sold out",
            f"Use #{word(rng, 6, HEX)} for the border",
            f"Request {uuid.UUID(int=rng.getrandbits(128), version=4)} failed",
            f"The IMEI is {imei}{luhn_digit(imei)}.",
            f"Reference {bad_card} was rejected",
            f"Tracking id {bad_iban} is not known",
            f"Article no. {digits(rng, 3, '23456789')}-{digits(rng, 3)}-{digits(rng, 4)} is out of stock",
            f"Part 0{digits(rng, 3)} {digits(rng, 6)} fits both",
            f"commit {word(rng, 40, HEX)} broke it",
            f"The population is {rng.randint(1, 9)} {digits(rng, 3)} {digits(rng, 3)}",
            f"It took {rng.randint(1, 9)}:{rng.randint(10, 59)}:{rng.randint(10, 59)} h and {rng.randint(100, 999)} "
            "km",
            f"Coordinates {rng.randint(10, 80)}.{digits(rng, 6)}, -{rng.randint(10, 80)}.{digits(rng, 6)}",
            f"The timestamp 17{digits(rng, 8)} is in seconds",
            f"the war ended on 8 May {rng.randint(1900, 1990)} after {rng.randint(2, 9)} years",
            "password: required, at least 8 characters",
            "Set the api_key in your settings, the token is optional",
            f"We looked at amazon dot com and at {rng.randint(2, 9)} other shops",
            f"see icon@2x.png and lodash@4.{rng.randint(1, 20)}.{rng.randint(1, 30)}",
            f"There were {rng.randint(2, 90)} People Street performers",
            f"pi is 3.14159{digits(rng, 12)}",
            f"Room {digits(rng, 3)}, floor {rng.randint(1, 30)}, seats {rng.randint(1, 50)}-{rng.randint(51, 99)}",
            f"Call ticket {digits(rng, 7, '123456789')} closed; see page {rng.randint(1, 999)}",
            f"RAL {digits(rng, 4)} and DIN {digits(rng, 5)}, M{rng.randint(2, 20)}x{rng.randint(10, 90)}",
            f"std::vector<int> a::b; {rng.randint(1, 9)}::{rng.randint(1, 9)} is a ratio, 12:30:45 a time",
            f"Chapter {rng.randint(1, 9)}.{rng.randint(1, 9)}.{rng.randint(1, 9)}.{rng.randint(1, 9)} explains it",
            f"My score is {rng.randint(1000, 9000)}-{rng.randint(1000, 9000)} in season 2019/2020",
            f"The EAN 40{digits(rng, 11)} is on the box",
        ]
    )


def planted(rng: Random, entity: str) -> tuple[str, str]:
    """(a sentence, the value in it)."""
    made = MAKERS[entity](rng)
    carrier = rng.choice(CARRIERS[entity])
    if isinstance(made, str):
        return carrier.format(made), made
    before, value = made
    joined = f"{before} {value}" if before and not before.endswith("=") else f"{before}{value}"
    return carrier.format(joined), value


def row_of(*turns: str) -> Example:
    roles = ("user", "assistant")
    return Example(
        tuple(Message.of(roles[place % 2], turn) for place, turn in enumerate(turns)), (Origin("planted", "0"),)
    )


def quality(count: int, seed: int, min_score: float) -> dict[str, Any]:
    """Recall and precision by entity over `count` planted rows each, and the false findings of as many rows without
    any.
    """
    rng = Random(seed)
    scanner = Scanner(ENTITIES, (), min_score, ())
    right: Counter[str] = Counter()
    any_right: Counter[str] = Counter()
    found: Counter[str] = Counter()
    true: Counter[str] = Counter()
    missed: dict[str, list[str]] = defaultdict(list)
    false: list[str] = []
    for entity in ENTITIES:
        for _ in range(count):
            sentence, value = planted(rng, entity)
            text = " ".join([negative(rng) if rng.random() < 0.3 else "Thanks for the help.", sentence])
            span = (text.rindex(value), text.rindex(value) + len(value))
            hits = scanner.find(text)
            covered = set().union(*(set(range(hit.start, hit.end)) for hit in hits)) if hits else set()
            own = set().union(*(set(range(h.start, h.end)) for h in hits if h.entity == entity)) if hits else set()
            wanted = {place for place in range(*span) if text[place].isalnum()}
            right[entity] += wanted <= own
            any_right[entity] += wanted <= covered
            if not wanted <= covered:
                missed[entity].append(text)
            for hit in hits:
                found[hit.entity] += 1
                good = hit.touches(*span) and hit.entity == entity
                true[hit.entity] += good
                if not hit.touches(*span):
                    false.append(f"{hit.entity} {hit.subtype}: {text[hit.start : hit.end]!r} in {text!r}")
    clean = [negative(rng) for _ in range(count * len(ENTITIES))]
    wrong = [(hit, text) for text in clean for hit in scanner.find(text)]
    for hit, text in wrong:
        found[hit.entity] += 1
        false.append(f"{hit.entity} {hit.subtype}: {text[hit.start : hit.end]!r} in {text!r}")
    entities = {
        entity: {
            "recall": round(right[entity] / count, 4),
            "by_any": round(any_right[entity] / count, 4),
            **({"precision": round(true[entity] / found[entity], 4)} if found[entity] else {}),
        }
        for entity in ENTITIES
    }
    return {
        "entities": entities,
        "clean_rows": len(clean),
        "clean_rows_hit": len({text for _, text in wrong}),
        "missed": missed,
        "false": false,
    }


# locale of Faker -> (the word that announces the number, Faker's method); en_GB's and en_IN's are invalid on purpose
FAKER_NUMBERS = {
    "cs_CZ": ("rodné číslo", "birth_number"),
    "de_AT": ("SVNR", "ssn"),
    "de_CH": ("AHV", "ssn"),
    "de_DE": ("Rentenversicherungsnummer", "rvnr"),
    "dk_DK": ("CPR", "ssn"),
    "en_CA": ("SIN", "ssn"),
    "en_US": ("SSN", "ssn"),
    "es_ES": ("DNI", "nif"),
    "es_MX": ("CURP", "curp"),
    "fi_FI": ("HETU", "ssn"),
    "fr_FR": ("NIR", "ssn"),
    "he_IL": ("teudat zehut", "ssn"),
    "it_IT": ("codice fiscale", "ssn"),
    "nl_NL": ("BSN", "ssn"),
    "no_NO": ("fødselsnummer", "ssn"),
    "pl_PL": ("PESEL", "pesel"),
    "pt_BR": ("CPF", "cpf"),
    "sv_SE": ("personnummer", "ssn"),
}
FAKER_NONE = ("ean13", "isbn13", "isbn10", "uuid4", "iso8601", "msisdn", "swift11")


def another_author(count: int, seed: int) -> dict[str, Any]:
    """Recall of `count` numbers of each locale, and findings of national numbers among Faker's that are none.

    Raises ImportError without the package.
    """
    from faker import Faker

    scanner = Scanner(["national_id"], (), 0.5, ())
    recall = {}
    for locale, (word, method) in FAKER_NUMBERS.items():
        fake = Faker(locale)
        fake.seed_instance(seed)
        found = 0
        for _ in range(count):
            value = str(getattr(fake, method)())
            text = f"Hello, my {word} is {value}, thank you."
            start = text.rindex(value)
            covered = {position for hit in scanner.find(text) for position in range(hit.start, hit.end)}
            found += all(start + index in covered for index, sign in enumerate(value) if sign.isalnum())
        recall[locale] = round(found / count, 4)
    fake = Faker("en_US")
    fake.seed_instance(seed)
    others = [f"Item {getattr(fake, method)()} is in stock." for method in FAKER_NONE for _ in range(count)]
    others += [f"Order {fake.numerify('#' * length)} was sent." for length in range(8, 14) for _ in range(count)]
    return {
        "recall": round(sum(recall.values()) / len(recall), 4),
        "by_locale": recall,
        "others": len(others),
        "others_hit": sum(bool(scanner.find(text)) for text in others),
    }


def chitchat(file: Path) -> list[Example]:
    """The conversations of that asset, one row each."""
    rows = []
    for conversation in json.loads(file.read_text(encoding="utf-8")).values():
        turns = [" ".join(message["text"] for message in turn) for turn in conversation["messages"]]
        if turns:
            rows.append(row_of(*turns))
    return rows


def speed(rows: list[Example], repeats: int) -> dict[str, Any]:
    """Rows per second of one core, the best of some runs, and what was found."""
    best = 0.0
    apply = PersonalData().open(Path())
    for _ in range(repeats):
        apply = PersonalData().open(Path())
        began = time.perf_counter()
        changed = sum(apply(row) is not row for row in rows)
        best = max(best, len(rows) / (time.perf_counter() - began))
    return {"rows": len(rows), "rows_per_s": round(best, 1), "changed": changed, "tally": dict(apply.tally)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    smallest.add_argument(parser)
    parser.add_argument("--rows", type=int, default=500, help="planted rows of each entity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--min-score", type=float, default=0.5)
    parser.add_argument("--show", type=int, default=0, help="so many misses of each entity and so many false findings")
    given = parser.parse_args()
    if given.small:
        given.rows = SMALL_ROWS
    with smallest.home(given.small, "chitchat"):
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """Print what was found, and the JSON line."""
    speed_rows, repeats = (SMALL_SPEED_ROWS, 1) if given.small else (SPEED_ROWS, 3)
    result = quality(given.rows, given.seed, given.min_score)
    missed, false = result.pop("missed"), result.pop("false")
    for entity, texts in missed.items():
        for text in texts[: given.show]:
            print(f"missed {entity}: {text!r}")
    for line in false[: given.show * 10]:
        print(f"false {line}")
    if not given.json:
        for entity, figures in result["entities"].items():
            print(f"{entity:14} {figures}")
    result["default"] = list(DEFAULT)
    absent = {}
    try:
        result["another_author"] = another_author(given.rows, given.seed)
    except ImportError:
        absent["another_author"] = "no Faker: pip install faker"
    result["planted_speed"] = speed(
        [row_of(planted(Random(n), ENTITIES[n % 12])[0], "Thank you.") for n in range(speed_rows)], repeats
    )
    data = next(iter(sorted(home().glob("assets/chitchat-*/chitchat_dataset/dataset.json"))), None)
    if data is None:
        absent["chitchat"] = "not installed: sartor assets install chitchat"
    else:
        result["chitchat"] = speed(chitchat(data), repeats)
    if absent:
        result["absent"] = absent
    if not given.json:
        print(result.get("another_author"), result.get("chitchat"), absent)
    print_result(result)


if __name__ == "__main__":
    main()
