"""Media embeddings of prompts per adapter.

A tower takes longer than a decoding step, so it runs in its own thread while other rows continue. The result is the
prompt's token ids and the embeddings of its media; they belong to the call and are dropped with it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sartor.core.errors import BudgetError, RequestError, SartorError
from sartor.inference.engine import GenerateCall
from sartor.inference.prompts import PromptReader
from sartor.models import composed_model
from sartor.models.base import Base
from sartor.models.composed_model import ComposedMedia, TowerFeatureCache
from sartor.models.media_tokens import MOST_TOKENS, PLACE_BITS, keys_in
from sartor.models.towers.tower import Tower

# limit on cached features of recent media, which a conversation sends again with each turn
HELD_BYTES = 64 << 20


@dataclass(frozen=True)
class MediaPrompt:
    """A prompt with media.

    ids: token ids; the M ids of media are negative.
    rows: (M, D) fp32 embeddings of the media ids, in order.
    """

    ids: list[int]
    rows: torch.Tensor

    def of(self, start: int, chunk: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (positions (K,) in the chunk, embeddings (K, D)) of its K media ids; None without any.

        start: position of the chunk in the prompt.
        """
        positions = [index for index, token in enumerate(chunk) if token < 0]
        if not positions:
            return None
        first = sum(token < 0 for token in self.ids[:start])
        return torch.tensor(positions, device=self.rows.device), self.rows[first : first + len(positions)]


class MediaAdapters:
    """Adapters that read media."""

    def __init__(self, base: Base, reader: PromptReader) -> None:
        self._base, self._reader = base, reader
        self._towers: dict[str, Tower] = {}
        self._media: dict[str, ComposedMedia] = {}
        self._readers: dict[str, PromptReader] = {}
        self._thread = ThreadPoolExecutor(1, "sartor-towers")

    def attach(self, adapter: str, path: Path) -> int:
        """Open the towers and projectors of the adapter in `path`; return the projectors' bytes, 0 for text only.

        Raises ModelError if they do not fit, and what `open_tower` raises.
        """
        entries = composed_model.read_towers(path)
        if not entries:
            return 0
        for kind, tower in entries.items():
            if tower.digest not in self._towers:
                self._towers |= {
                    opened.digest: opened
                    for opened in composed_model.open_towers(
                        {kind: tower.name}, self._base.device, lambda line: None
                    ).values()
                }
        by_digest = {tower.digest: tower for tower in self._towers.values()}
        if missing := [tower for tower in entries.values() if tower.digest not in by_digest]:
            raise composed_model.another_tower(path, missing[0])
        towers = {kind: by_digest[tower.digest] for kind, tower in entries.items()}
        media = composed_model.new_projectors(
            self._base, TowerFeatureCache(towers, None, held_bytes=HELD_BYTES), seed=0
        )
        composed_model.load_projectors(media, path)
        self._media[adapter] = media
        self._readers[adapter] = replace(self._reader, chat=self._reader.chat.with_media(media))
        return sum(part.nbytes for part in media.parameters())

    def detach(self, adapter: str) -> None:
        """Forget an adapter."""
        self._media.pop(adapter, None)
        self._readers.pop(adapter, None)

    def read(self, call: GenerateCall) -> Future[MediaPrompt]:
        """Return a future of the prompt of a call with media parts.

        The future raises RequestError as `PromptReader.prompt` does, and BudgetError. A failure of a decoder or a
        tower affects only this call: other rows continue.
        """
        return self._thread.submit(self._read_apart, call)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read_apart(self, call: GenerateCall) -> MediaPrompt:
        try:
            return self._read(call)
        except SartorError:
            raise
        except MemoryError:
            raise BudgetError(
                "there is no memory to look at the media", "send smaller ones, or ask again later"
            ) from None
        except Exception as error:
            problem = f"the media of the request cannot be looked at: {type(error).__name__}"
            raise RequestError(
                problem, "send other media, and the request with this message to the maintainers"
            ) from None
        finally:
            if media := self._media.get(call.adapter):
                media.features.let_go()

    def _read(self, call: GenerateCall) -> MediaPrompt:
        media = self._media.get(call.adapter)
        if media is None:
            raise RequestError(
                "this agent reads text alone, and the request holds media", "send text, or ask an agent that sees"
            )
        ids = self._readers[call.adapter].prompt(call)
        with torch.inference_mode():
            keys = keys_in(ids)
            parts = dict(zip(keys, media.embedded(keys), strict=True))
            codes = [-1 - token for token in ids if token < 0]
            rows = [parts[code >> PLACE_BITS][code & (MOST_TOKENS - 1)] for code in codes]
        return MediaPrompt(ids, torch.stack(rows).float())
