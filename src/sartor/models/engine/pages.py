"""Room for keys and values in pages of a fixed number of tokens, and prompts whose pages may be used again.

A page of a prompt is known by the adapter that computed it and by every token up to its end, so it is shared among rows of one
adapter alone; an adapter that is attached again has another number, and never meets what was computed before. Pages are filled
in chunks that end where pages do: what is taken over is bit for bit what would have been computed. Only whole pages of prompts
are kept, and only once the prompt's logits were finite.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

PAGE_TOKENS = 64


@dataclass
class _Kept:
    page: int
    users: int = 0


class Pages:
    """Which pages are free, used and kept. `total`: how many there are."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        # (adapter's number, tokens up to the page's end) -> page, the least recently used first
        self._kept: OrderedDict[tuple[int, tuple[int, ...]], _Kept] = OrderedDict()
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}

    @property
    def free(self) -> int:
        """Pages that could be had now: free ones and kept ones that no row uses."""
        return len(self._free) + sum(not kept.users for kept in self._kept.values())

    def take(self, number: int, prompt: Sequence[int], tokens: int) -> tuple[list[int], int] | None:
        """Pages for a row of `tokens`, and how many of the prompt's tokens are in them already. None: no room now.

        At least the prompt's last token is left to be computed: its logits are wanted.
        """
        shared: list[_Kept] = []
        for end in range(PAGE_TOKENS, len(prompt), PAGE_TOKENS):
            kept = self._kept.get((number, tuple(prompt[:end])))
            if kept is None:
                break
            shared.append(kept)
        for kept in shared:
            kept.users += 1
        fresh = -(-tokens // PAGE_TOKENS) - len(shared)
        if self.free < fresh:
            for kept in shared:
                kept.users -= 1
            return None
        for kept in shared:
            self._kept.move_to_end(self._keys[kept.page])
        return [*(kept.page for kept in shared), *(self._fresh() for _ in range(fresh))], len(shared) * PAGE_TOKENS

    def keep(self, number: int, prompt: Sequence[int], pages: Sequence[int]) -> None:
        """Let later rows use the whole pages of a computed prompt. The row goes on using them, until `give_back`."""
        for place, end in enumerate(range(PAGE_TOKENS, len(prompt) + 1, PAGE_TOKENS)):
            key = (number, tuple(prompt[:end]))
            if key not in self._kept and pages[place] not in self._keys:
                self._kept[key] = _Kept(pages[place], 1)
                self._keys[pages[place]] = key

    def give_back(self, pages: Sequence[int]) -> None:
        """A row is over."""
        for page in pages:
            if page in self._keys:
                self._kept[self._keys[page]].users -= 1
            else:
                self._free.append(page)

    def forget(self, number: int) -> None:
        """An adapter was detached: nothing of it is used again. Its rows must be over."""
        for key in [key for key in self._kept if key[0] == number]:
            self._release(key)

    def _fresh(self) -> int:
        if not self._free:
            self._release(next(key for key, kept in self._kept.items() if not kept.users))
        return self._free.pop()

    def _release(self, key: tuple[int, tuple[int, ...]]) -> None:
        page = self._kept.pop(key).page
        del self._keys[page]
        self._free.append(page)
