"""Check digits of national numbers. Each function takes the text as found and says whether it can be such a number."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

from sartor.curate.personal.findings import digits
from sartor.curate.personal.payment import luhn


def _weighted(text: str, weights: Sequence[Any]) -> int:
    return sum(int(digit) * int(weight) for digit, weight in zip(text, weights, strict=False))


def _date(year: int, month: int, day: int) -> bool:
    try:
        datetime.date(year, month, day)
    except ValueError:
        return False
    return True


def _day(text: str) -> bool:
    """DDMMYY with a year of either century."""
    return _date(2000 + int(text[4:6]), int(text[2:4]), int(text[:2])) or _date(
        1900 + int(text[4:6]), int(text[2:4]), int(text[:2])
    )


def us_ssn(text: str) -> bool:
    """Area, group and serial that the SSA may issue: there is no check digit."""
    number = digits(text)
    return (
        number[:3] not in ("000", "666")
        and number[0] != "9"
        and number[3:5] != "00"
        and number[5:] != "0000"
        and len(set(number)) > 1
    )


def us_itin(text: str) -> bool:
    """A group that the IRS uses."""
    group = int(digits(text)[3:5])
    return 50 <= group <= 65 or 70 <= group <= 88 or 90 <= group <= 92 or 94 <= group <= 99


def fr_nir(text: str) -> bool:
    """The key of the INSEE number: 97 less the number modulo 97; Corsica's 2A and 2B count as 19 and 18."""
    number = text.replace(" ", "")
    month = int(number[3:5])
    if len(number) != 15 or not (1 <= month <= 12 or 20 <= month <= 42 or month >= 50):
        return False
    body = number[:13].replace("2A", "19").replace("2B", "18")
    return body.isdigit() and 97 - int(body) % 97 == int(number[13:])


def nl_bsn(text: str) -> bool:
    """The eleven test, with -1 as the last weight."""
    number = digits(text)
    return len(set(number)) > 1 and _weighted(number, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0


def be_rn(text: str) -> bool:
    """97 less the first nine digits modulo 97, with a 2 before them from the year 2000 on."""
    number = digits(text)
    if not 0 <= int(number[2:4]) % 20 <= 12 or int(number[4:6]) > 31:
        return False
    return int(number[9:]) in (97 - int(number[:9]) % 97, 97 - int("2" + number[:9]) % 97)


def ean(text: str) -> bool:
    """The check digit of an EAN-13, which the Swiss AHV number has."""
    number = digits(text)
    return len(number) == 13 and _weighted(number, "1313131313131") % 10 == 0


def at_svnr(text: str) -> bool:
    """Modulo 11 over the serial number and the date of birth."""
    number = digits(text)
    return (
        number[0] != "0"
        and 1 <= int(number[6:8]) <= 15
        and _weighted(number[:3] + number[4:], "379584216") % 11 == int(number[3])
    )


def pt_nif(text: str) -> bool:
    """Modulo 11."""
    number = digits(text)
    left = 11 - _weighted(number[:8], "98765432") % 11
    return (0 if left > 9 else left) == int(number[8])


def br_cpf(text: str) -> bool:
    """Two digits modulo 11."""
    number = digits(text)
    first = _weighted(number[:9], (10, 9, 8, 7, 6, 5, 4, 3, 2)) * 10 % 11 % 10
    second = _weighted(number[:10], (11, 10, 9, 8, 7, 6, 5, 4, 3, 2)) * 10 % 11 % 10
    return len(set(number)) > 1 and number[9:] == f"{first}{second}"


def cn_id(text: str) -> bool:
    """ISO 7064 MOD 11-2 and a date."""
    if not _date(int(text[6:10]), int(text[10:12]), int(text[12:14])):
        return False
    left = _weighted(text[:17], (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)) % 11
    return "10X98765432"[left] == text[17].upper()


def dk_cpr(text: str) -> bool:
    """A date: the check digit is not kept since 2007."""
    return _day(digits(text))


def no_fnr(text: str) -> bool:
    """Two digits modulo 11; a D-number has 4 added to its first digit."""
    number = digits(text)
    day = f"{int(number[0]) % 4}{number[1:6]}"
    return _day(day) and _weighted(number, "37618945210") % 11 == 0 and _weighted(number, "54327654321") % 11 == 0


def cz_rc(text: str) -> bool:
    """Divisible by 11; women have 50 added to the month."""
    number = digits(text)
    return 1 <= int(number[2:4]) % 50 % 20 <= 12 and 1 <= int(number[4:6]) <= 31 and int(number) % 11 == 0


def mx_curp(text: str) -> bool:
    """Modulo 10 over the values of letters and digits, Ñ between N and O."""
    signs = "0123456789ABCDEFGHIJKLMNÑOPQRSTUVWXYZ"
    total = sum(signs.index(sign) * (18 - place) for place, sign in enumerate(text[:17]))
    return str((10 - total % 10) % 10) == text[17]


def cl_rut(text: str) -> bool:
    """Modulo 11 with K as ten."""
    body, sign = re.sub(r"[.\s]", "", text).upper().split("-")
    total = sum(int(digit) * (2 + place % 6) for place, digit in enumerate(reversed(body)))
    return "0K987654321"[total % 11] == sign


def ro_cnp(text: str) -> bool:
    """Modulo 11 and a date."""
    left = _weighted(text[:12], "279146358279") % 11
    return 1 <= int(text[3:5]) <= 12 and 1 <= int(text[5:7]) <= 31 and (1 if left == 10 else left) == int(text[12])


def luhn_any(text: str) -> bool:
    """Luhn's check digit."""
    return luhn(digits(text)) and len(set(digits(text))) > 1


def sg_nric(text: str) -> bool:
    """The letter that follows from the digits."""
    total = _weighted(text[1:8], "2765432") + {"T": 4, "G": 4, "M": 3}.get(text[0], 0)
    letters = {"S": "JZIHGFEDCBA", "T": "JZIHGFEDCBA", "F": "XWUTRQPNMLK", "G": "XWUTRQPNMLK", "M": "XWUTRQPNJLK"}[text[0]]
    left = total % 11 if text[0] != "M" else 10 - total % 11
    return letters[left] == text[8]


def gb_nino(text: str) -> bool:
    """A prefix that is issued."""
    return text[:2] not in ("BG", "GB", "NK", "KN", "TN", "NT", "ZZ")
