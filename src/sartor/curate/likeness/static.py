"""Static embeddings in model2vec's layout: one vector per token, read from a directory. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sartor.core.errors import ModelError, need


def fits(path: Path) -> bool:
    """Whether a directory holds a model2vec model, also one that was saved as a sentence-transformers module."""
    for file, word in (("config.json", "model2vec"), ("modules.json", "StaticEmbedding")):
        if (path / file).is_file() and word in (path / file).read_text(encoding="utf-8", errors="replace"):
            return True
    return False


class StaticEncoder:
    """The mean of a text's token vectors, scaled to length 1. No text is cut."""

    cut = 0
    tokens = 0

    def __init__(self, path: Path) -> None:
        try:
            from model2vec import StaticModel
        except ImportError:
            raise need("model2vec", "static") from None
        try:
            self._model = StaticModel.from_pretrained(path, force_download=False)
        except Exception as error:  # its readers raise several kinds for files that are cut or absent
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise ModelError(
                f"{path} cannot be opened as a model2vec model: {said}",
                "check that its files are whole",
            ) from None
        self.name = f"model2vec {path.name}"

    def encode(self, texts: Sequence[str]) -> Any:
        """See Encoder."""
        import numpy as np

        vectors = self._model.encode(list(texts), max_length=None, use_multiprocessing=False).astype(np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1)
