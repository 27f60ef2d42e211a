"""The core: what counts as equal, what is found, what must not be, who survives, and where it stops and asks."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup_rows import WORDS, edited, search, text, texts
from sartor.core.errors import ConfigError, GuardError
from sartor.curate.dedup import clusters, near_duplicates, pair_scoring, pair_store, shingles
from sartor.curate.dedup import clusters as graph
from sartor.curate.dedup import shingles as commons
from sartor.curate.dedup.pair_scoring import ScoredPairs
from sartor.curate.dedup.shingles import Sets, Shingling

PAIRS2 = Shingling("words", 2)


def normal(row: str) -> str:
    buffer, _ = shingles._normal([row])
    return buffer.tobytes().decode()


def same_digest(one: str, other: str) -> bool:
    digests = shingles.sketch([one, other], PAIRS2).digests
    return bool((digests[0] == digests[1]).all())


# --- normal form and shingles


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('Hello,  World!\n"Yes."', "hello world yes "),
        ("C++ is not C", "c + + is not c "),
        ("3.5 or -5, at 10:30, e.g. don't", "3.5 or - 5 at 10:30 e.g don't "),
        ("a != b; (a+b)*c", "a ! = b ( a + b ) * c "),
        ("Straße ﬁne “ok”\u2028x\u00a0y", "strasse fine ok x y "),
        ("東京 は3,000人。", "東 京 は 3,000 人 "),
        ("hi👍there", "hi 👍 there "),
        ("  \t\n", ""),
        ("...", ""),
    ],
)
def test_the_normal_form(row: str, said: str) -> None:
    assert normal(row) == said


@pytest.mark.parametrize(
    ("one", "other"), [("The END.", "the end"), ("a  b", "a\nb"), ("it’s “so”", "it's so"), ("e\u0301", "é")]
)
def test_rows_that_differ_in_case_space_or_punctuation_are_equal(one: str, other: str) -> None:
    assert same_digest(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("C++", "C"), ("-5", "5"), ("a<b", "a>b"), ("(a+b)*c", "a+(b*c)"), ("1.5", "15"), ("👍", "👎"), ("人", "入")],
)
def test_rows_that_differ_in_a_sign_are_not_equal(one: str, other: str) -> None:
    assert not same_digest(one, other)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=12), st.integers(1, 4), st.sampled_from(["words", "characters"]))
def test_a_row_has_the_same_sketch_in_any_batch(rows: list[str], size: int, unit: str) -> None:
    how = Shingling(unit, size)  # type: ignore[arg-type]
    whole = shingles.sketch(rows, how)
    apart = shingles.Sketches.joined([shingles.sketch([row], how) for row in rows])
    assert np.array_equal(whole.shingles, apart.shingles)
    assert np.array_equal(whole.offsets, apart.offsets)
    assert np.array_equal(whole.digests, apart.digests)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["ab", "cd", "ef", "gh", "7", "x9"]), max_size=30), st.integers(1, 4))
def test_shingles_are_the_runs_of_words_and_the_numbers(row: list[str], size: int) -> None:
    found = shingles.sketch([" ".join(row)], Shingling("words", size)).shingles
    runs = {tuple(row[at : at + size]) for at in range(max(len(row) - size + 1, min(len(row), 1)))}
    numbers = {word for word in row if word in ("7", "x9")}
    assert len(found) == len(runs) + len(numbers)
    assert int((found & shingles.NUMBER).sum()) == len(numbers)
    assert (np.diff(found.astype(np.int64)) > 0).all()


def test_characters_are_code_points() -> None:
    assert len(shingles.sketch(["äöüß"], Shingling("characters", 3)).shingles) == len({"äöü", "öüs", "üss", "ss "})


def test_a_row_longer_than_a_chunk_is_cut_like_any_other() -> None:
    row = text(100_000, random.Random(0))
    pairs = set(itertools.pairwise(row.split()))
    assert (
        abs(len(shingles.sketch([row, "x"], PAIRS2).shingles) - len(pairs) - 1) <= 5
    )  # 32-bit hashes of 80,000 pairs may meet


@pytest.mark.parametrize(
    ("rows", "joined", "unit"),
    [
        (["turn on the light", "turn off the light"], 0, "words"),
        (["turn on the light light.on", "turn off the light light.off"], 2, "words"),
        (["set the heating to 21 degrees"], 0, "words"),
        (["anna meyer 12 high street 4011 19820101", "bo li 7 low road 2010 19770203"], 0, "characters"),
        (["anna meyer high street", "bo li low road"], 4, "characters"),
        (texts(3), 4, "words"),
        ([], 0, "words"),
    ],
)
def test_auto_takes_characters_for_short_records_alone(rows: list[str], joined: int, unit: str) -> None:
    how = shingles.resolve("auto", 0, rows, joined_fields=joined)
    assert (how.unit, how.size) == (unit, shingles.SIZES[unit])
    assert "words" in how.reason


@pytest.mark.parametrize("size", [-1, 65])
def test_a_senseless_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="makes no sense"):
        shingles.resolve("words", size, [])


# --- what is found


@pytest.mark.parametrize(("fraction", "recall"), [(0.01, 1.0), (0.025, 1.0), (0.05, 0.99), (0.10, 0.8)])
def test_edits_are_found_and_nothing_else(fraction: float, recall: float) -> None:
    rng = random.Random(1)
    rows = texts(400)
    found, removals, rules = search(rows + [edited(row, fraction, rng) for row in rows])
    pairs = found.pairs.judged(rules.threshold, rules.contained)
    right = pairs.b - pairs.a == len(rows)
    assert right.all()
    assert right.sum() >= recall * len(rows)
    assert len(removals.rows) == len(pairs.a)


def test_truncation_reordering_and_a_wrap_are_found() -> None:
    rng = random.Random(2)
    rows = texts(150)
    frame = text(60, rng)
    made = {
        "truncated": [" ".join(row.split()[:120]) for row in rows],
        "wrapped": [f"{frame} {row} {frame}" for row in rows],
        "reordered": [
            " ".join(sum(rng.sample([row.split()[i : i + 14] for i in range(0, 200, 14)], 15), [])) for row in rows
        ],
    }
    for name, variants in made.items():
        _, removals, _ = search(rows + variants)
        assert len(removals.rows) >= 0.98 * len(rows), name
        assert (np.abs(removals.rows - removals.kept_rows) == len(rows)).all(), name


def test_verified_scores_are_the_true_jaccard() -> None:
    rng = random.Random(3)
    rows = texts(60)
    rows += [edited(row, 0.05, rng) for row in rows]
    found, _, _ = search(rows)
    assert len(found.pairs.a) >= 60
    for a, b, score in zip(found.pairs.a, found.pairs.b, found.pairs.jaccard, strict=True):
        one, other = (set(itertools.pairwise(rows[row].split())) for row in (a, b))
        assert abs(score - len(one & other) / len(one | other)) < 1e-6


def test_boilerplate_loses_no_row_and_takes_linear_time() -> None:
    rng = random.Random(4)
    shared = text(300, rng).split()
    rows = []
    for _ in range(3000):
        at = rng.choice((0, 300, rng.randint(0, 300)))
        rows.append(" ".join([*shared[:at], *text(rng.randint(20, 200), rng).split(), *shared[at:]]))
    few, _, _ = search(rows[:1500])
    found, removals, _ = search(rows)
    assert len(removals.rows) == 0
    # bands propose a few pairs a row at most: this number, not the clock, is what must not grow with the square
    assert found.candidates <= 2 * max(few.candidates, 1000)


def test_boilerplate_in_a_third_of_the_rows_hides_no_duplicate() -> None:
    rng = random.Random(5)
    shared = text(300, rng)
    rows = [f"{shared} {row}" if rng.random() < 0.3 else row for row in texts(900, 120, seed=55)]
    copies = [f"{shared} {row}" for row in rows[:40]]
    _, removals, _ = search(rows + copies)
    assert len(removals.rows) == 40
    assert (np.abs(removals.rows - removals.kept_rows) == 900).all()


@pytest.mark.parametrize("copies", [80, 120, 150, 400])
def test_near_copies_are_found_however_many_they_are(copies: int) -> None:
    rng = random.Random(6)
    rows = texts(600)
    many = [edited(rows[0], 0.05, rng) for _ in range(copies)]
    _, removals, _ = search(rows[1:] + many)
    assert (removals.rows >= 599).all()
    assert len(removals.rows) >= 0.85 * copies


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("turn on the kitchen light", "turn on the bathroom light"),
        ("turn on the kitchen light", "turn off the kitchen light"),
        ("set the heating to 21 degrees", "set the heating to 22 degrees"),
        ("yes", "no"),
    ],
)
def test_commands_that_differ_in_a_word_are_no_duplicates(one: str, other: str) -> None:
    assert len(search([one, other])[1].rows) == 0


def test_a_grid_of_commands_loses_none() -> None:
    rooms, things = WORDS[:20], WORDS[20:40]
    rows = [f"turn {way} the {room} {thing}" for way in ("on", "off") for room in rooms for thing in things]
    assert len(search(rows)[1].rows) == 0


def test_letters_with_other_numbers_are_no_duplicates() -> None:
    rng = random.Random(7)
    letter = text(120, rng).split()
    rows = []
    for number in range(60):
        row = letter[:]
        row[10], row[50], row[90] = f"INV{number}", str(1000 + 7 * number), f"{number}.50"
        rows.append(" ".join(row))
    assert len(search(rows)[1].rows) == 0
    assert len(search([rows[0], edited(rows[0], 0.02, rng)])[1].rows) == 1


def test_edge_cases_have_their_answers() -> None:
    row = text(50, random.Random(8))
    expected = {
        "none": ([], 0),
        "one": ([row], 0),
        "all equal": ([row] * 500, 499),
        "all unlike": (texts(300), 0),
        "empty": ([""] * 50 + ["?!"], 0),
        "one word": (["yes", "no", "Yes.", "maybe", "yes"], 2),
        "with empty ones": ([row, "", row], 1),
    }
    for name, (rows, gone) in expected.items():
        found, removals, _ = search(rows)
        assert len(removals.rows) == gone, name
        assert found.empty == sum(not normal(row) for row in rows), name


def test_other_scripts_are_compared() -> None:
    one = "東京都は日本の首都であり、人口は約千四百万人です。多くの人が毎日電車で通勤しています。"
    _, removals, _ = search(
        [one, one.replace("多く", "大勢"), "大阪府は西日本の中心で、食べ物がとてもおいしい町として知られています。"]
    )
    assert removals.rows.tolist() == [1]


def test_the_result_does_not_depend_on_batches_or_the_run() -> None:
    rng = random.Random(9)
    rows = texts(200)
    rows += [edited(row, 0.05, rng) for row in rows]
    first, again = search(rows), search(rows)
    for one, other in zip(vars(first[0].pairs).values(), vars(again[0].pairs).values(), strict=True):
        assert np.array_equal(one, other)


# --- commons, components, candidates


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.integers(0, 30), max_size=8), min_size=1, max_size=40), st.integers(0, 10))
def test_common_shingles_are_counted_exactly(rows: list[set[int]], limit: int) -> None:
    values = np.array([value for row in rows for value in sorted(row)], np.uint32)
    offsets = shingles.offsets_of(np.array([len(row) for row in rows]))
    common = commons.common_shingles(values, offsets, np.arange(len(rows)), limit or 1)
    counts = {value: sum(value in row for row in rows) for value in set(values.tolist())}
    assert common.shingles.tolist() == sorted(value for value, count in counts.items() if count > (limit or 1))
    assert ((commons.levels(values, common) > 0) == np.isin(values, common.shingles)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40), st.integers(0, 40))
def test_components_are_those_of_a_plain_search(edges: list[tuple[int, int]], cut: int) -> None:
    label = list(range(20))
    for a, b in edges:
        low, high = sorted((label[a], label[b]))
        label = [low if one == high else one for one in label]
    ends = np.array(edges, np.int64).reshape(-1, 2)
    found = graph.components(20, ends[:cut, 0], ends[:cut, 1])
    assert graph.components(20, ends[cut:, 0], ends[cut:, 1], found).tolist() == label


def test_bucket_pairs_are_complete_if_small_and_few_if_large() -> None:
    """In a large bucket each row meets the first one and only a few neighbours."""
    keys = np.array([7] * 4 + [9] * 1000 + [1], np.uint32)
    left, right, crowded = near_duplicates.bucket_pairs(keys)
    small = {(int(a), int(b)) for a, b, big in zip(left, right, crowded, strict=True) if not big}
    assert small == set(itertools.combinations(range(4), 2))
    assert crowded.sum() <= 1000 * (near_duplicates.NEIGHBOURS + 1)
    assert set(right[left == 4].tolist()) == set(range(5, 1004))  # the head of the large one meets everybody


# --- who survives


def pairs_of(*edges: tuple[int, int, float]) -> ScoredPairs:
    a, b, score = (np.array(column) for column in zip(*edges, strict=True))
    return ScoredPairs(a, b, score.astype(np.float32), np.zeros(len(a), np.float32), np.zeros(len(a), bool))


RULES = pair_scoring.DuplicateRules(0.5, 0.3, 0.9)


def test_a_chain_is_no_cluster() -> None:
    chain = pairs_of((0, 1, 0.8), (1, 2, 0.8), (2, 3, 0.8))
    removals = clusters.resolve_clusters(chain, np.zeros(4), RULES)
    assert dict(zip(removals.rows.tolist(), removals.kept_rows.tolist(), strict=True)) == {1: 0, 3: 2}


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14), st.floats(0.3, 1)), max_size=40),
    st.lists(st.integers(0, 3), min_size=15, max_size=15),
)
def test_whoever_goes_was_held_against_a_better_row_that_stays(
    edges: list[tuple[int, int, float]], rank: list[int]
) -> None:
    edges = [(min(a, b), max(a, b), score) for a, b, score in edges if a != b] or [(0, 1, 0.9)]
    pairs = pairs_of(*edges).unique()
    removals = clusters.resolve_clusters(pairs, np.array(rank), RULES)
    judged = pairs.judged(RULES.threshold, RULES.contained)
    scores = {(int(a), int(b)): float(score) for a, b, score in zip(judged.a, judged.b, judged.jaccard, strict=True)}
    gone = set(removals.rows.tolist())
    for row, kept, score in zip(removals.rows.tolist(), removals.kept_rows.tolist(), removals.score, strict=True):
        assert scores[min(row, kept), max(row, kept)] == score
        assert kept not in gone
        assert (-rank[kept], kept) < (-rank[row], row)
    assert not [edge for edge in scores if not gone & set(edge)], "two rows that stay are alike"


def test_the_best_of_equal_rows_stays_for_the_near_ones_too() -> None:
    twins = ScoredPairs.of_exact(np.array([0, 0]), np.array([3, 4]))
    removals = clusters.resolve_clusters(
        ScoredPairs.joined([twins, pairs_of((0, 2, 0.7))]), np.array([1, 1, 0, 5, 1]), RULES
    )
    assert removals.rows.tolist() == [0, 2, 4]
    assert removals.kept_rows.tolist() == [3, 3, 3]
    assert removals.by_method() == {"exact": 2, "near": 1}
    assert removals.largest_cluster == 4


# --- guards


def removals_of(gone: int, kept: int = 0) -> clusters.Removals:
    rows = np.arange(1, gone + 1)
    return clusters.Removals(rows, np.full(gone, kept), np.full(gone, 0.8, np.float32), np.ones(gone, np.uint8))


def test_guard_stops_a_cluster_that_takes_most_of_a_source() -> None:
    """The error names the source and a pair of rows; allow or a higher limit lets the removal pass."""
    sources = np.array([0] * 10 + [1] * 30)
    gone = clusters.Removals(np.arange(11, 40), np.full(29, 10), np.full(29, 0.8, np.float32), np.ones(29, np.uint8))
    with pytest.raises(GuardError, match=r"29 of the 30 rows of b.jsonl.*row 11 for row 10") as raised:
        clusters.check_removals(gone, sources, ["a.jsonl", "b.jsonl"], clusters.RemovalLimits())
    assert "--allow b.jsonl" in raised.value.remedy
    assert raised.value.exit_code == 5
    clusters.check_removals(gone, sources, ["a.jsonl", "b.jsonl"], clusters.RemovalLimits(allow=("b.jsonl",)))
    clusters.check_removals(gone, sources, ["a.jsonl", "b.jsonl"], clusters.RemovalLimits(source_fraction=1.0))


def test_guard_stops_many_small_clusters_above_the_fraction() -> None:
    """The fraction is of all rows; a higher limit lets the removal pass."""
    rows = np.arange(95) + 5
    gone = clusters.Removals(rows, rows % 5, np.full(95, 0.8, np.float32), np.ones(95, np.uint8))
    with pytest.raises(GuardError, match="95 of 100 rows"):
        clusters.check_removals(gone, np.zeros(100, int), ["a"], clusters.RemovalLimits())
    clusters.check_removals(gone, np.zeros(100, int), ["a"], clusters.RemovalLimits(fraction=0.95))


def test_guard_allows_70_percent_of_a_source_and_few_rows() -> None:
    """Removing 70 of 100 or 4 of 5 rows passes; 80 of 100 raises GuardError."""
    for removed, of in ((70, 100), (4, 5)):
        clusters.check_removals(removals_of(removed), np.zeros(of, int), ["a"], clusters.RemovalLimits())
    with pytest.raises(GuardError):
        clusters.check_removals(removals_of(80), np.zeros(100, int), ["a"], clusters.RemovalLimits())


# --- another threshold


def test_higher_threshold_on_stored_pairs_equals_new_search() -> None:
    """Both remove the same rows in favour of the same kept rows."""
    rng = random.Random(10)
    rows = texts(300)
    rows += [edited(row, rng.uniform(0.01, 0.1), rng) for row in rows]
    found, _, rules = search(rows)
    rank = np.array([len(row) for row in rows])
    for threshold in (0.55, 0.8, 0.95):
        other = pair_scoring.DuplicateRules(threshold, rules.floor, rules.contained)
        _, anew, _ = search(rows, threshold=threshold)
        again = clusters.resolve_clusters(found.pairs, rank, other)
        assert np.array_equal(again.rows, anew.rows), threshold
        assert np.array_equal(again.kept_rows, anew.kept_rows), threshold


def test_a_threshold_below_the_floor_is_refused() -> None:
    with pytest.raises(ConfigError, match="from 0.5 up"):
        pair_store.check_threshold(0.4, 0.5)


def test_duplicates_at_lists_all_pairs_of_few_equal_rows() -> None:
    """Of many equal rows it lists only the pairs with the first one."""
    few = pair_store.duplicates_at(
        ScoredPairs.joined([ScoredPairs.of_exact(np.array([0, 0]), np.array([1, 2])), pairs_of((0, 3, 0.7))]), 4, RULES
    )
    assert list(zip(few.a.tolist(), few.b.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    many = pair_store.duplicates_at(ScoredPairs.of_exact(np.zeros(99, np.int64), np.arange(1, 100)), 100, RULES)
    assert many.a.tolist() == [0] * 99


def test_measure_sets_common_shingles_aside() -> None:
    """Rows that share 2 of 6 own shingles score 2 / 6, with the default least_own and with 4."""
    # two rows of 40 shingles: 36 common ones, 2 own ones that both have, 2 that each has alone
    common = np.arange(100, 136)
    one, other = np.array([1, 2, 3, 4]) * 2, np.array([1, 2, 5, 6]) * 2
    values = np.concatenate([np.sort(np.r_[one, common]), np.sort(np.r_[other, common])]).astype(np.uint32)
    sets = Sets(values, np.array([0, 40, 80]), ((values >= 100) * 20).astype(np.uint8))
    rules = pair_scoring.DuplicateRules(0.01, 0.01, 0.0, numbers=0.0)
    a, b = np.array([0]), np.array([1])
    assert pair_scoring.measure(sets, a, b, rules).jaccard[0] == pytest.approx(2 / 6)
    assert pair_scoring.measure(
        sets, a, b, pair_scoring.DuplicateRules(0.01, 0.01, 0.0, least_own=4, numbers=0.0)
    ).jaccard[0] == pytest.approx(2 / 6)
