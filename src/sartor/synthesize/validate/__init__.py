"""Synthetic rows against reality that the generator never saw.

Every test compares two sets of rows by one statistic, and all share one null: which units (rows of one group, or of one seed)
are the synthetic ones is permuted. So a statistic is a function of membership, computed for all permutations at once.

    options.py   limits, seed, how many permutations
    sides.py     the rows of both sides, what is left out, units
    verdicts.py  permutations -> p and effect; one correction over the family
    space.py     vectors, kernel, neighbours, topics of both sides together
    apart.py     told apart: classifier two-sample test, MMD
    spread.py    coverage, novelty, outside; diversity.py distinct-n, self-BLEU, Vendi
    drift.py     lengths, labels, topics
    copies.py    near-copies of seeds, of held-out rows, of one another
    spans.py     answers against the span that they cite
    shift.py     outcomes by group
    outcome.py   what is handed back; review.py what a person is to look at
    verb.py      the verb
"""
