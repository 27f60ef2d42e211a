"""Callable package: `sartor.synthesize(...)`.

recipe.py     what is made, by whom
teachers.py   the teachers of a recipe; endpoint.py one by HTTP, stream.py what it reads, pace.py its limits
answers.py    answers on disk, and what they cost
seeds.py      what rows are made from
contract.py   what a way is; ways/ those that there are
reading.py    what a teacher said -> JSON that fits, or why not
making.py     the verb
writing.py    the files of the Dataset; synthesized.py what is handed back
"""

from sartor.core.lazy_import import callable_package

callable_package(__name__, "sartor.synthesize.synthesis")
