"""Serving: one base, many adapters, replies made side by side.

contract.py   what an engine is asked and what it answers; torch-free
local.py      ours: a queue, prompts in chunks, a token a step for every row
rows.py       one reply in work: the next token, the text that is certain, the end
blocks.py     the base's blocks over a paged cache, every row with factors of its own
factors.py    the adapters' factors, stacked
pages.py      which pages are free, used and kept for later prompts
reading.py    a base without its weights; prompts.py, tools.py, grammar.py, schemas.py: a call -> prompt and constraint
llamacpp.py   llama.cpp in this process; inner.py is its library (no torch), base_file.py a base as it reads one
remote.py     servers that speak OpenAI's protocol; streams.py is what both share
"""
