"""Paged KV cache with prefix reuse.

The key of a page is its tokens, its salt and the page before it, back to the number of the adapter that computed it.
Only rows of the same adapter and salt therefore share pages, so that no row learns what other keys sent. The pages of
a public beginning (the signed system prompt) have no salt, and rows of every salt share them. An adapter that is
attached again has a new number and never uses its old pages. A reused page has exactly the bits that recomputing it
would give (see `torch_decoder.py`). Only complete pages are kept, and only after finite logits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

PAGE_TOKENS = 64

# (the page before, or -1 - the adapter's number; the salt; the page's tokens)
_Key = tuple[int, str, tuple[int, ...]]


@dataclass(frozen=True)
class CacheScope:
    """Rows with which a row shares pages.

    number: the adapter's number.
    salt: rows with another salt share nothing beyond the public tokens.
    public_tokens: leading tokens of the prompt that rows of every salt may share.
    """

    number: int
    salt: str = ""
    public_tokens: int = 0

    def key(self, parent: int, start: int, tokens: Sequence[int]) -> _Key:
        """Return the key of the page that begins at `start`."""
        is_public = start + len(tokens) <= self.public_tokens
        return parent, "" if is_public else self.salt, tuple(tokens)


class PagedKvCache:
    """Allocator of cache pages: free, used and kept ones.

    total: number of pages.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._users = [0] * total
        self._pages_by_key: dict[_Key, int] = {}
        self._keys: dict[int, _Key] = {}
        self._numbers: dict[int, int] = {}
        self._child_counts = [0] * total  # number of kept pages that continue this one
        # kept pages without users, least recently used first; a page comes before the page that it continues
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Number of pages available now: free ones, and kept ones without users."""
        return len(self._free) + len(self._idle)

    def take(self, scope: CacheScope, prompt: Sequence[int], tokens: int) -> tuple[list[int], int] | None:
        """Return pages for a row of `tokens`, and the number of prompt tokens already in them; None without room.

        At least the last token of the prompt is left to compute, since its logits are needed.
        """
        shared: list[int] = []
        parent = -1 - scope.number
        for start in range(0, (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS, PAGE_TOKENS):
            page = self._pages_by_key.get(scope.key(parent, start, prompt[start : start + PAGE_TOKENS]))
            if page is None:
                break
            shared.append(page)
            parent = page
        for page in shared:
            self._users[page] += 1
            self._idle.pop(page, None)
        n_fresh = -(-tokens // PAGE_TOKENS) - len(shared)
        if self.free < n_fresh:
            self.give_back(shared)
            return None
        return [*shared, *(self._fresh() for _ in range(n_fresh))], len(shared) * PAGE_TOKENS

    def keep(self, scope: CacheScope, text: Sequence[int], pages: Sequence[int]) -> None:
        """Let later rows of the same scope use the complete pages of a computed text.

        The row keeps using the pages until `give_back`.
        """
        parent = -1 - scope.number
        for index in range(len(text) // PAGE_TOKENS):
            start = index * PAGE_TOKENS
            key, page = scope.key(parent, start, text[start : start + PAGE_TOKENS]), pages[index]
            if key not in self._pages_by_key and page not in self._keys:
                self._pages_by_key[key], self._keys[page], self._numbers[page] = page, key, scope.number
                if parent >= 0:
                    self._child_counts[parent] += 1
            if key not in self._pages_by_key:
                return
            parent = self._pages_by_key[key]

    def give_back(self, pages: Sequence[int]) -> None:
        """Release the pages of a finished row."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0 and page in self._keys:
                self._idle[page] = None
            elif self._users[page] == 0:
                self._free.append(page)

    def forget(self, number: int) -> None:
        """Drop all kept pages of a detached adapter.

        Pages that a row still uses are freed when the row ends.
        """
        for page in [page for page, owner in self._numbers.items() if owner == number]:
            self._unname(page)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def _fresh(self) -> int:
        if not self._free:
            page = next(page for page in self._idle if not self._child_counts[page])
            del self._idle[page]
            self._unname(page)
            self._free.append(page)
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _unname(self, page: int) -> None:
        key = self._keys.pop(page)
        parent = key[0]
        del self._pages_by_key[key], self._numbers[page]
        if parent >= 0:
            self._child_counts[parent] -= 1
