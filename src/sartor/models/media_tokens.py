"""Virtual token ids that stand for media in prompts.

A virtual id is negative and says which media (by digest) and which of its tokens: nothing else of a model, a pack, a
cache or a loop has to know that media exist. Two rows about one image begin with the same ids, so what they share is
computed once; a token without a feature, or a feature without a token, cannot be written.
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

# 48 bits of a digest and 14 of a place: with a sign they fill an int64
PLACE_BITS = 14
MOST_TOKENS = 1 << PLACE_BITS
_KEY_HEX = 12


def key_of(reader: str, content: str) -> int:
    """By which a media's features are known. reader, content: digests of what makes them and of the media."""
    return int(hashlib.sha256(f"{reader}:{content}".encode()).hexdigest()[:_KEY_HEX], 16)


def virtual_ids(key: int, count: int) -> list[int]:
    """The ids of a media's `count` tokens. Raises SourceError where they are more than ids can tell apart.

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
    """The keys of the media in token ids, each once, in order.

    >>> keys_in([7, *virtual_ids(5, 2), 8, *virtual_ids(3, 1)])
    [5, 3]
    """
    return list(dict.fromkeys((-1 - token) >> PLACE_BITS for token in ids if token < 0))


def content_of(part: Part, folder: Path | None) -> bytes:
    """The bytes of a media part: a file below `folder`, or a data URL. Raises SourceError where there are none."""
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
    """What a base reads beside text."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of `image` and `audio`, those that it reads."""
        ...

    def tower_fields(self) -> dict[str, dict[str, Any]]:
        """What a manifest says of towers that are no part of the base itself, by what they read: name, digest,
        licence, ...
        """
        ...

    def ids(self, part: Part, folder: Path | None) -> list[int]:
        """The token ids of one media part, virtual where a feature stands. Raises SourceError for media that cannot be
        read.
        """
        ...

    def embedded(self, keys: Sequence[int]) -> list[torch.Tensor]:
        """Per key (T, D) embeddings of its tokens, in the width of the text's."""
        ...

    def inputs(self, ids: torch.Tensor, *, is_blank: bool = False) -> dict[str, torch.Tensor]:
        """What the model's own forward takes for one row of (1, T) ids. is_blank: without what media show."""
        ...


class MediaEmbedding(torch.nn.Module):
    """The text's embedding, and that of virtual ids: a base with it in place of its own takes ids of both kinds."""

    def __init__(self, text: torch.nn.Module, media: Any) -> None:
        super().__init__()
        self.text, self.media = text, media
        self.is_blank = False

    @property
    def weight(self) -> torch.Tensor:
        """(V, D) of the text."""
        return self.text.weight  # type: ignore[return-value]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (...) -> (..., D)."""
        x: torch.Tensor = self.text(ids.clamp(min=0))
        virtual = ids < 0
        if not bool(virtual.any()):
            return x
        if self.is_blank:
            return x.masked_fill(virtual[..., None], 0.0)
        codes = -1 - ids[virtual]
        keys, inverse = torch.unique(codes >> PLACE_BITS, return_inverse=True)
        parts = self.media.embedded(keys.tolist())
        starts = torch.tensor([0, *(len(part) for part in parts[:-1])], device=ids.device).cumsum(0)
        rows = torch.cat(parts)[starts[inverse] + (codes & (MOST_TOKENS - 1))]
        return x.index_put((virtual,), rows.to(x.dtype))


def embedding_of(model: Any) -> MediaEmbedding | None:
    """The MediaEmbedding of a model, if it has one."""
    embedding = model.get_input_embeddings()
    return embedding if isinstance(embedding, MediaEmbedding) else None


def own_inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `model` itself takes for one row of (1, T) ids."""
    embedding = embedding_of(model)
    if embedding is None:
        return {"input_ids": ids}
    result: dict[str, torch.Tensor] = embedding.media.inputs(ids, is_blank=embedding.is_blank)
    return result


@contextmanager
def blank(model: Any) -> Iterator[None]:
    """Inside, every media token of `model` is a zero vector: the text base as it is without a tower."""
    embedding = embedding_of(model)
    if embedding is None:
        yield
        return
    embedding.is_blank = True
    try:
        yield
    finally:
        embedding.is_blank = False
