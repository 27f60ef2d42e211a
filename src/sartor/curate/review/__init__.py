"""The person's queue: what labels, bias checks, validation and searches for personal data found, and what people decided.

items.py      Item, Decision: one line of `review.jsonl` each
findings.py   what a Dataset's own files say: `review.jsonl`, the queue of suspicious labels
queue.py      items and decisions in SQL, appended to by several people at once
standing.py   what becomes of an item by the decisions of one, two or more people
view.py       a Dataset's files and the queue as one list
agreement.py  percent agreement and Cohen's kappa of two reviewers
sampling.py   how many rows to look at for a bound on the fraction of bad ones, and the bound that came of it
changing.py   a row as an edit leaves it
applying.py   a new Dataset in which the decisions are done
desk.py       the verbs
"""
