"""Tensors: the only package that knows model internals."""

import logging

# peft imports bitsandbytes wherever it is installed, and that advises packages which nothing here needs
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
