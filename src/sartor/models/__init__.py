"""Tensors: the only package that knows model internals."""
