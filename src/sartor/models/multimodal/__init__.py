"""Native multi-modal bases: transformers' image-text-to-text and audio models, opened by name like any base.

opening.py  which bases they are, and their processor
turns.py    the processor's chat template, and what the processor writes for each media
media.py    media as virtual ids; the model's own forward where it does more than put embeddings in their places
parts.py    which modules are the language model, the projector, the tower
replies.py  generation where the model's own forward is needed
voxtral.py  a Voxtral's processor and tokenizer, without mistral-common's
whisper.py  a Whisper, which has an encoder and a decoder

How media stand among tokens, and why, is decision 012.
"""
