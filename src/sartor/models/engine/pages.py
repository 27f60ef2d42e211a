"""Keys and values in pages: who holds which, and which of them an earlier prompt of the same adapter left behind.

A page holds `size` positions. Written pages are known by what they hold: the page before them and their own tokens, back to
a root that stands for one attachment of one adapter. So a prefix is only ever found by calls of the same attachment, and by
equal tokens, never by a digest. Pages that nobody holds stay until their room is wanted, the longest unused first, ends of
prefixes before their beginnings. No torch: a page is a number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

Key = tuple[int, tuple[int, ...]]


@dataclass
class Lease:
    """Pages of one call, in the order of positions; the first `cached` positions are written already."""

    root: int
    pages: list[int]
    cached: int


class Pages:
    """`count` pages of `size` positions."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._children = [0] * count
        self._found: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._roots: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._last_root = 0

    @property
    def room(self) -> int:
        """Positions that no call holds."""
        return (len(self._free) + len(self._idle)) * self.size

    def root(self) -> int:
        """A new root, unlike every one before: negative, so that it is no page."""
        self._last_root -= 1
        return self._last_root

    def lease(self, root: int, ids: Sequence[int], positions: int) -> Lease | None:
        """Pages for a prompt `ids` and its reply, `positions` together; None while there is no room.

        The prompt's last token is never taken from the cache: its logits are wanted.
        """
        shared = self._match(root, ids)
        wanted = -(-positions // self.size) - len(shared)
        for page in shared:
            self._hold(page)
        if wanted > len(self._free) + len(self._idle):
            self._let_go(shared)
            return None
        own = [self._take() for _ in range(wanted)]
        return Lease(root, [*shared, *own], len(shared) * self.size)

    def store(self, lease: Lease, ids: Sequence[int]) -> None:
        """Say that the lease's first positions hold `ids`, so that others may share the pages that they fill."""
        above = lease.root
        for place in range(len(ids) // self.size):
            key = (above, tuple(ids[place * self.size : (place + 1) * self.size]))
            page = lease.pages[place]
            if key not in self._found and page not in self._keys:
                self._found[key], self._keys[page], self._roots[page] = page, key, lease.root
                if above >= 0:
                    self._children[above] += 1
            if key not in self._found:
                return  # the page is known under other tokens: a lease is stored in the order in which it grows
            above = self._found[key]

    def give_back(self, lease: Lease) -> None:
        """End a lease: what was stored stays until its room is wanted."""
        self._let_go(lease.pages)
        lease.pages = []

    def forget(self, root: int) -> None:
        """Forget what was stored under a root. Pages that a call still holds go when it ends."""
        for page in [page for page, own in self._roots.items() if own == root]:
            self._unname(page)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def _match(self, root: int, ids: Sequence[int]) -> list[int]:
        pages: list[int] = []
        above = root
        for place in range((len(ids) - 1) // self.size):
            page = self._found.get((above, tuple(ids[place * self.size : (place + 1) * self.size])))
            if page is None:
                break
            pages.append(page)
            above = page
        return pages

    def _hold(self, page: int) -> None:
        self._holders[page] += 1
        self._idle.pop(page, None)

    def _let_go(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):  # the end of a prefix becomes the oldest, and goes before its beginning
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def _take(self) -> int:
        if not self._free:
            page = next(page for page in self._idle if not self._children[page])
            del self._idle[page]
            self._unname(page)
            self._free.append(page)
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _unname(self, page: int) -> None:
        above, _ = key = self._keys.pop(page)
        del self._found[key], self._roots[page]
        if above >= 0:
            self._children[above] -= 1
