"""Feedback -> a better version of an agent, or a refusal with reasons: the verbs of one retrain, in order.

news.py     what was said since, and whether a retrain is due
work.py     one retrain on disk: what stands of it, and what it came to
rows.py     what is learnt from: feedback by kind, and the live version's own rows beside it
stages.py   curate, tune, evaluate, gate, release, canary
beside.py   the new version and the live one, compared
suspects.py keys whose ratings are unlike everybody else's
verb.py     the verb: begins, goes on, settles
watch.py    --due and --watch

`sartor.retrain(...)` calls the verb.
"""

from sartor.core.verb import callable_package

callable_package(__name__, "sartor.retrain.verb")
