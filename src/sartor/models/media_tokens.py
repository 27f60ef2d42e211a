"""Virtual token ids that represent media in prompts.

A virtual id is negative and encodes the media (by digest) and the index of one of its tokens. So no other part of a
model, a pack, a cache or a loop has to know that media exist. Two rows about one image begin with the same ids, so
their common beginning is computed once. A token without a feature, or a feature without a token, cannot be expressed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from sartor.core.errors import SourceError
from sartor.core.records import Part
from sartor.media import content_parts

# A virtual id has 48 bits of a digest and 14 of a token index, which with a sign fit into an int64
PLACE_BITS = 14
MOST_TOKENS = 1 << PLACE_BITS
_KEY_HEX = 12


def key_of(reader: str, content: str) -> int:
    """Return the key of a media's features. reader, content: digests of what computes them and of the media."""
    return int(hashlib.sha256(f"{reader}:{content}".encode()).hexdigest()[:_KEY_HEX], 16)


def virtual_ids(key: int, count: int) -> list[int]:
    """Return the ids of a media's `count` tokens. Raises SourceError for more tokens than ids can encode.

    >>> virtual_ids(5, 2) == [-(1 + (5 << PLACE_BITS)), -(2 + (5 << PLACE_BITS))]
    True
    """
    if count > MOST_TOKENS:
        raise SourceError(
            f"one media file has {count} tokens; {MOST_TOKENS} can be read",
            "ffmpeg -i RECORDING -f segment -segment_time 30 PART%03d.flac; of a picture: scale it down",
        )
    return [-1 - (key << PLACE_BITS | index) for index in range(count)]


def keys_in(ids: Sequence[int]) -> list[int]:
    """Return the keys of the media in token ids, each once, in order.

    >>> keys_in([7, *virtual_ids(5, 2), 8, *virtual_ids(3, 1)])
    [5, 3]
    """
    return list(dict.fromkeys((-1 - token) >> PLACE_BITS for token in ids if token < 0))


def content_of(part: Part, folder: Path | None) -> bytes:
    """Return the bytes of a media part: a file below `folder`, or a data URL.

    Raises SourceError if they cannot be read.
    """
    if part.media.startswith(content_parts.SCHEME):
        return content_parts.bytes_of(part.media, part.kind)
    if folder is None:
        raise SourceError(
            f"the {part.kind} {part.media[:60]!r} is a path, and no folder is known",
            f'"data:{part.kind}/...;base64,..." in place of the path',
        )
    try:
        return (folder / part.media).read_bytes()
    except OSError as error:
        problem = f"the {part.kind} {part.media[:80]!r} cannot be read: {error.strerror}"
        raise SourceError(problem, "curate the rows again, which copies media beside them") from None


class Media(Protocol):
    """Protocol of a base's reader for images and audio."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Media kinds that it reads, of `image` and `audio`."""
        ...

    def tower_fields(self) -> dict[str, dict[str, Any]]:
        """Return a manifest's fields of towers that are not part of the base itself, by media kind.

        The fields are name, digest, licence, ...
        """
        ...

    def ids(self, part: Part, folder: Path | None) -> list[int]:
        """Return the token ids of one media part, virtual for features. Raises SourceError for unreadable media."""
        ...

    def embedded(self, keys: Sequence[int]) -> list[torch.Tensor]:
        """Return the embeddings of each key's tokens, (T, D), in the width of the text's."""
        ...

    def inputs(self, ids: torch.Tensor, *, is_blank: bool = False) -> dict[str, torch.Tensor]:
        """Return the arguments of the model's own forward for one row of ids (1, T).

        is_blank: replace media by blank ones.
        """
        ...


class MediaEmbedding(torch.nn.Module):
    """Embedding of text ids and of virtual ids. A base with it as its input embedding accepts both."""

    def __init__(self, text: torch.nn.Module, media: Any) -> None:
        super().__init__()
        self.text, self.media = text, media
        self.is_blank = False

    @property
    def weight(self) -> torch.Tensor:
        """Weight of the text embedding, (V, D)."""
        return self.text.weight  # type: ignore[return-value]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (..., D) of ids (...)."""
        x: torch.Tensor = self.text(ids.clamp(min=0))
        virtual = ids < 0
        if not bool(virtual.any()):
            return x
        if self.is_blank:
            return x.masked_fill(virtual[..., None], 0.0)
        # id = -1 - (key << PLACE_BITS | index), so -1 - id recovers key and index
        codes = -1 - ids[virtual]
        keys, inverse = torch.unique(codes >> PLACE_BITS, return_inverse=True)
        parts = self.media.embedded(keys.tolist())
        starts = torch.tensor([0, *(len(part) for part in parts[:-1])], device=ids.device).cumsum(0)
        rows = torch.cat(parts)[starts[inverse] + (codes & (MOST_TOKENS - 1))]
        return x.index_put((virtual,), rows.to(x.dtype))


def embedding_of(model: Any) -> MediaEmbedding | None:
    """Return the MediaEmbedding of a model; None without one."""
    embedding = model.get_input_embeddings()
    return embedding if isinstance(embedding, MediaEmbedding) else None


def own_inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments of `model`'s own forward for one row of ids (1, T)."""
    embedding = embedding_of(model)
    if embedding is None:
        return {"input_ids": ids}
    result: dict[str, torch.Tensor] = embedding.media.inputs(ids, is_blank=embedding.is_blank)
    return result


@contextmanager
def blank(model: Any) -> Iterator[None]:
    """Replace every media token of `model` by a zero vector, inside the `with` block: the base without a tower."""
    embedding = embedding_of(model)
    if embedding is None:
        yield
        return
    embedding.is_blank = True
    try:
        yield
    finally:
        embedding.is_blank = False
