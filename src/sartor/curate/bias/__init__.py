"""Bias in data: who is spoken of, what becomes of them, and what is done about it.

membership.py  groups of people that a row speaks of, by lexicon and by fields
outcomes.py    what becomes of them: the label of the reply
rates.py       outcome rates by group with intervals, ratios, tests
words.py       what stands beside a group: PMI with intervals
weights.py     mitigation: weights that make group and outcome independent
pairs.py       mitigation: counterfactual pairs
cells.py       mitigation: rows dropped, or rows still to be made
verb.py        the verb
"""
