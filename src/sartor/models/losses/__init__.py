"""Losses and gradients of a pack: hand-written passes where they agree, transformers where not."""
