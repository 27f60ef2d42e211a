"""Feedback -> a better version of an agent, or a refusal with reasons: the verbs of one retrain, in order.

    news.py     what was said since, and whether a retrain is due
    work.py     one retrain on disk: what stands of it, and what it came to; job.py what its stages see
    learnt.py   what is learnt from: feedback by kind, and the live version's own rows beside it; suspects.py whose is doubtful
    stages.py   curate, tune, evaluate, gate, release, bring in
    verdicts.py the new version held against the live one, which evaluate/evaluation.py asks
    verb.py     the verb: begins, goes on, looks after a trial
    watch.py    --due and --watch

`sartor.learn(...)` calls the verb.
"""

from sartor.core.lazy_import import callable_package

callable_package(__name__, "sartor.learn.retrain")
