"""Permissions and obligations of each licence family.

A licence belongs to the first row whose pattern matches its whole SPDX id. If none matches, it belongs to the row of
its category in ScanCode's index (shipped with `license-expression`). Any other licence has unknown terms.

Model licences have no SPDX id: model cards use free names (`llama3.2`, `gemma`, `license_name: lfm1.0`), which appear
here as LicenseRef-NAME. Read on 2026-11-29: the texts of Llama 3.2, Gemma and OpenRAIL, quotations of the named
clauses of Llama 2 and 3.0, and summaries of the others by third parties. A later text under the same name must be read
again. This is not legal advice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

Obligation = Literal[
    "attribution",
    "notice",
    "share-alike",
    "weak share-alike",
    "network",
    "llama-name",
    "built-with-llama",
    "built-with-llama-3",
    "built-with-qwen",
    "use-policy",
    "changes",
]
# duties of a person who distributes the derived work
DUTIES: dict[Obligation, str] = {
    "attribution": "credit the authors, name the licence, say what was changed",
    "notice": "keep the copyright notice and the text of the licence",
    "share-alike": "hand a derived work out under these same terms only",
    "weak share-alike": "hand changes of the licensed files themselves out under these same terms",
    "network": "the same towards those who use it over a network",
    "llama-name": "give the model that is handed out a name that begins with 'Llama'",
    "built-with-llama": "show 'Built with Llama' on a page, an interface or the documentation of what contains it",
    "built-with-llama-3": "show 'Built with Meta Llama 3' on a page, an interface or the documentation of what "
    "contains it",
    "built-with-qwen": "show 'Built with Qwen' or 'Improved using Qwen' in the documentation of the model that is "
    "handed out",
    "use-policy": "bind whoever gets it to the licence's use restrictions, give them a copy of the licence and its "
    "notice",
    "changes": "say in changed files that you changed them",
}


@dataclass(frozen=True)
class LicenceFamily:
    """One row of the table.

    rank: from 1 (permits everything) to 0 (permits nothing).
    derived: whether a derived work may be made and distributed ("yes"), made but not distributed ("kept"), or not
        made.
    outputs: whether other models may be trained on the model's output.
    condition: condition of commercial use that the table cannot check; the user confirms it with `use`.
    """

    name: str
    pattern: str
    rank: float
    reason: str
    duties: tuple[Obligation, ...] = ()
    commercial: bool = True
    derived: Literal["yes", "kept", "no"] = "yes"
    category: str = ""
    outputs: Literal["yes", "no"] = "yes"
    condition: str = ""

    @property
    def demands_own_terms(self) -> bool:
        """Whether the whole derived work must carry these terms, and so no stricter ones."""
        return "share-alike" in self.duties


UNKNOWN_TERMS = LicenceFamily(
    "unknown terms", "", 0.05, "neither this table nor ScanCode's index says what it permits"
)
NOTHING = LicenceFamily("no licence", "NOASSERTION|NONE", 0.0, "without a licence copyright reserves every use")

_MONTHLY_USERS = "section 2: whoever had over 700 million monthly users at its release asks Meta for a licence"
_REVENUE = "commercial use is free below 10 million USD of revenue a year (LFM Open License 1.0)"

_NOT_IN_THE_EU = "its use policy gives no rights in multimodal models to who is at home in the EU"
_LLAMA: tuple[Obligation, ...] = ("notice", "use-policy", "built-with-llama", "llama-name")

OWN_DATA = LicenceFamily("own data", r"LicenseRef-own", 0.95, "yours: nobody else reserves a use")

FAMILIES = (
    NOTHING,
    OWN_DATA,
    LicenceFamily(
        "Llama 2",
        r"LicenseRef-(?:scancode-)?llama-?2\b.*",
        rank=0.55,
        reason=f"community licence of 2023-07-18, 1.b.iii-v; its outputs may improve no other model; {_MONTHLY_USERS}",
        duties=("notice", "use-policy"),
        outputs="no",
    ),
    LicenceFamily(
        "Llama 3.0",
        r"LicenseRef-(?:meta-)?llama-?3(?:-0)?(?:-(?:community-)?licen[cs]e.*)?",
        rank=0.54,
        reason=f"community licence of 2024-04-18, 1.b.i-v; its outputs may improve no other model; {_MONTHLY_USERS}",
        duties=("notice", "use-policy", "built-with-llama-3", "llama-name"),
        outputs="no",
    ),
    LicenceFamily(
        "Llama 3.1",
        r"LicenseRef-(?:scancode-|meta-)?llama-?3[.-]1\b.*",
        rank=0.57,
        reason=f"community licence of 2024-07-23, 1.b; {_MONTHLY_USERS}",
        duties=_LLAMA,
    ),
    LicenceFamily(
        "Llama 3.2",
        r"LicenseRef-(?:scancode-|meta-)?llama-?3[.-]2\b.*",
        rank=0.57,
        reason=f"community licence of 2024-09-25, 1.b; {_MONTHLY_USERS}; {_NOT_IN_THE_EU}",
        duties=_LLAMA,
    ),
    LicenceFamily(
        "Llama 3.3",
        r"LicenseRef-(?:scancode-|meta-)?llama-?3[.-]3\b.*",
        rank=0.57,
        reason=f"community licence of 2024-12-06, 1.b; {_MONTHLY_USERS}",
        duties=_LLAMA,
    ),
    LicenceFamily(
        "Llama 4",
        r"LicenseRef-(?:scancode-|meta-)?llama-?4\b.*",
        rank=0.56,
        reason=f"community licence of 2025-04-05, 1.b; {_MONTHLY_USERS}; {_NOT_IN_THE_EU}",
        duties=_LLAMA,
    ),
    LicenceFamily(
        "Gemma",
        r"LicenseRef-(?:scancode-)?gemma\b.*",
        rank=0.58,
        reason="terms of use, 3.1: their restrictions (3.2) bind whoever gets a derived model",
        duties=("notice", "use-policy", "changes"),
    ),
    LicenceFamily(
        "Qwen, research",
        r"LicenseRef-(?:tongyi-)?(?:qwen|qianwen)-research\b.*",
        rank=0.22,
        reason="research licence: non-commercial purposes only",
        duties=("notice", "built-with-qwen"),
        commercial=False,
    ),
    LicenceFamily(
        "Qwen",
        r"LicenseRef-(?:tongyi-)?(?:qwen|qianwen)(?:-licen[cs]e.*)?",
        rank=0.62,
        reason="Qwen licence agreement: whoever has over 100 million monthly users asks for a licence",
        duties=("notice", "built-with-qwen", "changes"),
    ),
    LicenceFamily(
        "Mistral, research",
        r"LicenseRef-(?:mrl|mnpl|mistral-ai-(?:research|non-production))\b.*",
        rank=0.21,
        reason="research and non-production licences: no commercial purpose",
        duties=("notice", "use-policy"),
        commercial=False,
    ),
    LicenceFamily(
        "LFM", r"LicenseRef-lfm.*", rank=0.5, reason=_REVENUE, duties=("notice", "changes"), condition=_REVENUE
    ),
    LicenceFamily(
        "OpenRAIL",
        r"LicenseRef-(?:.*-)?(?:open-?rail.*|(?:bigscience|bigcode)-.*rail.*)",
        rank=0.53,
        reason="paragraphs 4 and 5: the restrictions of Attachment A bind whoever gets a derived model",
        duties=("notice", "use-policy", "changes"),
    ),
    LicenceFamily(
        "public domain",
        r"CC0-.*|CC-PDDC|CC-PDM-.*|PDDL-.*|Unlicense.*|0BSD|MIT-0|WTFPL|DL-DE-ZERO-.*|.*-PD",
        1.0,
        "every right is waived, or no condition is set",
        category="Public Domain",
    ),
    LicenceFamily(
        "non-commercial, no derivatives, 4.0",
        r"CC-BY-NC-ND-4\.0",
        rank=0.1,
        reason="2(a)(1): adapted material may be made, not shared",
        duties=("attribution",),
        commercial=False,
        derived="kept",
    ),
    LicenceFamily(
        "non-commercial, no derivatives",
        r"CC-BY-NC-ND-.*",
        rank=0.08,
        reason="before 4.0 adaptations may not be made at all",
        duties=("attribution",),
        commercial=False,
        derived="no",
    ),
    LicenceFamily(
        "no derivatives, 4.0",
        r"CC-BY-ND-4\.0",
        rank=0.15,
        reason="2(a)(1)(B): adapted material may be made, not shared",
        duties=("attribution",),
        derived="kept",
    ),
    LicenceFamily(
        "no derivatives",
        r"CC-BY-ND-.*",
        rank=0.12,
        reason="before 4.0 adaptations may not be made at all",
        duties=("attribution",),
        derived="no",
    ),
    LicenceFamily(
        "non-commercial, share-alike",
        r"CC-BY-NC-SA-.*",
        rank=0.2,
        reason="NC excludes use directed towards commercial advantage",
        duties=("attribution", "share-alike"),
        commercial=False,
    ),
    LicenceFamily(
        "non-commercial",
        r"CC-BY-NC-.*|NCGL-.*",
        rank=0.25,
        reason="excludes use directed towards commercial advantage",
        duties=("attribution",),
        commercial=False,
    ),
    LicenceFamily(
        "non-commercial software",
        r"PolyForm-Noncommercial-.*|Aladdin",
        rank=0.22,
        reason="excludes commercial use by its own words",
        duties=("notice",),
        commercial=False,
    ),
    LicenceFamily(
        "share-alike",
        r"CC-BY-SA-.*|LAL-.*|GFDL-.*",
        rank=0.5,
        reason="an adaptation carries the same licence",
        duties=("attribution", "share-alike"),
    ),
    LicenceFamily(
        "share-alike",
        r"CC-SA-.*|ODbL-.*|CDLA-Sharing-.*",
        rank=0.52,
        reason="a derived database or data set carries the same licence",
        duties=("notice", "share-alike"),
    ),
    LicenceFamily(
        "network copyleft",
        r"AGPL-.*|SSPL-.*|OSL-.*|NPOSL-.*|RPL-.*|EUPL-1\.2|CPAL-.*|CAL-1\.0",
        rank=0.4,
        reason="use over a network counts as handing out",
        duties=("notice", "share-alike", "network"),
    ),
    LicenceFamily(
        "copyleft",
        r"GPL-.*",
        rank=0.45,
        reason="a work based on it carries the same licence",
        duties=("notice", "share-alike"),
        category="Copyleft",
    ),
    LicenceFamily(
        "weak copyleft",
        r"LGPL-.*|MPL-.*|EPL-.*|CDDL-.*|OFL-.*",
        rank=0.6,
        reason="its own files stay under it, a larger work need not",
        duties=("notice", "weak share-alike"),
        category="Copyleft Limited",
    ),
    LicenceFamily(
        "attribution",
        r"CC-BY-\d.*|ODC-By-.*|OGL-.*|NLOD-.*|DL-DE-BY-.*|etalab-.*|OGDL-Taiwan-.*",
        rank=0.8,
        reason="any use, with credit",
        duties=("attribution",),
    ),
    LicenceFamily(
        "computational use",
        r"C-UDA-.*|O-UDA-.*",
        rank=0.82,
        reason="any computational use; results are free",
        duties=("notice",),
    ),
    LicenceFamily(
        "permissive with a notice of changes",
        r"Apache-.*|ECL-.*",
        rank=0.88,
        reason="section 4: licence, NOTICE file and a note of changes",
        duties=("notice",),
    ),
    LicenceFamily(
        "permissive",
        r"MIT|BSD-[1-4]-Clause|ISC|Zlib|CDLA-Permissive-.*",
        rank=0.9,
        reason="any use, with its notice",
        duties=("notice",),
        category="Permissive",
    ),
)


@cache
def family_of(licence: str, category: str = "") -> LicenceFamily:
    """Return the row of one SPDX id.

    For `A WITH B` pass A: an exception permits more, so A's row is the cautious one.
    """
    for family in FAMILIES:
        # SPDX ids have one spelling; licence names in model cards vary in case
        is_of_a_model = family.pattern.startswith("LicenseRef-") and family is not OWN_DATA
        if re.fullmatch(family.pattern, licence, re.IGNORECASE if is_of_a_model else 0):
            return family
    if licence.startswith(("LicenseRef-", "DocumentRef-")):
        return UNKNOWN_TERMS
    return next((family for family in FAMILIES if category and family.category == category), UNKNOWN_TERMS)


_AGPL = ("AGPL-3.0-only", "AGPL-3.0-or-later")
_GPL3 = ("GPL-3.0-only", "GPL-3.0-or-later", *_AGPL)
_GPL2_UP = ("GPL-2.0-only", "GPL-2.0-or-later", *_GPL3)
# Share-alike licence -> licences that its derived work may carry instead, and the authority for it. The relation is
# not symmetric: the converse needs a row of its own.
_ACCEPTS: dict[str, tuple[tuple[str, ...], str]] = {
    "CC-BY-SA-4.0": (("LAL-1.3", "GPL-3.0-only"), "Creative Commons' list of compatible licences"),
    "LAL-1.3": (("CC-BY-SA-4.0",), "Free Art License 1.3, section 5, as both sides have declared"),
    "GPL-1.0-or-later": (("GPL-1.0-only", *_GPL2_UP), "its own words: or any later version"),
    "GPL-2.0-or-later": (_GPL2_UP, "its own words: or any later version"),
    "GPL-3.0-only": (_AGPL, "GPL-3.0, section 13"),
    "GPL-3.0-or-later": (_GPL3, "its own words, and section 13"),
    "AGPL-3.0-or-later": (("AGPL-3.0-only",), "its own words: or any later version"),
    "EUPL-1.2": (
        (
            "GPL-2.0-only",
            "GPL-2.0-or-later",
            "GPL-3.0-only",
            "GPL-3.0-or-later",
            *_AGPL,
            "OSL-2.1",
            "OSL-3.0",
            "CC-BY-SA-3.0",
        ),
        "EUPL-1.2, appendix",
    ),
    "GFDL-1.1-or-later": (
        ("GFDL-1.1-only", "GFDL-1.2-only", "GFDL-1.2-or-later", "GFDL-1.3-only", "GFDL-1.3-or-later"),
        "section 10",
    ),
    "GFDL-1.2-or-later": (("GFDL-1.2-only", "GFDL-1.3-only", "GFDL-1.3-or-later"), "section 10"),
    "GFDL-1.3-or-later": (("GFDL-1.3-only",), "section 10"),
}
# conflicts that no share-alike rule covers
CLASHES: dict[frozenset[str], str] = {
    frozenset(
        {"GPL-2.0-only", "Apache-2.0"}
    ): "the patent terms of Apache-2.0 are a further restriction to GPL-2.0-only",
    frozenset({"GPL-2.0-only", "BSD-4-Clause"}): "the advertising clause is a further restriction to GPL-2.0-only",
    frozenset({"GPL-2.0-or-later", "BSD-4-Clause"}): "the advertising clause is a further restriction to the GPL",
    frozenset({"GPL-3.0-only", "BSD-4-Clause"}): "the advertising clause is a further restriction to the GPL",
    frozenset({"GPL-3.0-or-later", "BSD-4-Clause"}): "the advertising clause is a further restriction to the GPL",
}
_CC_SHARE_ALIKE = re.compile(r"(CC-BY(?:-NC)?-SA)-(\d\.\d)(?:-\w+)?$")


def targets(licence: str) -> frozenset[str]:
    """Return the licences that a derived work of a share-alike licence may carry, including itself.

    Later versions of CC licences are not included; `accepts` handles them.
    """
    return frozenset({licence, *_ACCEPTS.get(licence, ((), ""))[0]})


def accepts(licence: str, target: str) -> bool:
    """Return whether a derived work of a share-alike licence may carry `target`.

    >>> accepts("CC-BY-SA-3.0", "CC-BY-SA-4.0"), accepts("CC-BY-SA-4.0", "CC-BY-SA-3.0")
    (True, False)
    """
    if target in targets(licence):
        return True
    licence_match, target_match = _CC_SHARE_ALIKE.match(licence), _CC_SHARE_ALIKE.match(target)
    # Creative Commons, from 2.0 on, accepts later versions and ports to other countries with the same elements
    return bool(
        licence_match
        and target_match
        and licence_match[1] == target_match[1]
        and "2.0" <= licence_match[2] <= target_match[2]
    )
