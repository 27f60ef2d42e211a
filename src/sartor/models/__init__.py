"""Model internals: the only package that computes with tensors of models."""

import logging

# peft imports bitsandbytes if it is installed, and bitsandbytes logs advice about packages that are not needed here
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
