"""A base's blocks over cached keys and values, in torch's operations: any device, any dtype, the reference of `native.py`.

What a row gets never depends on its neighbours, because nothing of its arithmetic does:

- a prompt is computed by itself, in chunks that begin at multiples of `page`; so a prefix from the cache has the bits that
  it would have if it were computed again;
- tokens that are decoded stand in blocks of BLOCK rows, empty ones filled up: every matrix product has one shape however
  many rows are alive, and a row of such a product depends on its own row alone;
- a row attends over its own keys, padded to a size that follows from their number alone, together with rows of that size;
- factors of adapters are padded to a power of two and multiplied in batches with others of that rank, one product a row.

That rows of a product do not depend on their place in it is checked when a base is opened (`check`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sartor.core.errors import ModelError
from sartor.models.adapters import without_peft
from sartor.models.engine.factors import Factors, Place
from sartor.models.forward import FAMILIES, Block, Fast
from sartor.models.kernels.eager import Eager, rotate

BLOCK = 16
PAGE = 64


@dataclass(frozen=True)
class Turn:
    """A row that gets its next token: `token` stands at `position`; pages hold all positions up to it."""

    slot: int
    token: int
    position: int
    pages: Sequence[int]


class Body:
    """A base with room for `pages` pages of keys and values and `slots` rows.

    page: positions of a page. chunk: tokens of a prompt that are computed at once, a multiple of `page`. keeps_replies: what
    decoding writes has the bits of a prompt's, so a reply may be the prefix of a later prompt.
    """

    page = PAGE
    chunk = PAGE
    keeps_replies = False

    def __init__(self, fast: Fast, pages: int, slots: int) -> None:
        self.fast = fast
        self.blocks = fast.blocks
        self.dtype, self.device = fast.head.dtype, fast.head.device
        self._stacks: dict[int, Stack] = {}
        self._ranks: dict[int, int] = {}
        self._slots = -(-slots // BLOCK) * BLOCK
        self._pools = [
            torch.zeros(pages, 2, block.shape.groups, PAGE, block.width, dtype=self.dtype, device=self.device)
            for block in self.blocks
        ]

    def join(self, slot: int, factors: Factors | None) -> None:
        """A row will be decoded at `slot`."""
        self.leave(slot)
        if factors is not None:
            rank = 1 << max(3, (factors.rank - 1).bit_length())
            if rank not in self._stacks:
                self._stacks[rank] = Stack(self.blocks, rank, self._slots, self.dtype, self.device)
            self._stacks[rank].put(slot, factors)
            self._ranks[slot] = rank

    def leave(self, slot: int) -> None:
        """No row is decoded at `slot`."""
        if slot in self._ranks:
            self._stacks[self._ranks.pop(slot)].clear(slot)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], first: int, pages: Sequence[int], factors: Factors | None) -> torch.Tensor:
        """(T, D): what the blocks make of the tokens `ids` at positions `first` on. Writes their keys and values.

        At most `chunk` tokens, of one page unless `first` is its beginning; all before them is written.
        """
        x = self.fast.embed(torch.tensor(ids, device=self.device))
        positions = torch.arange(first, first + len(ids), device=self.device)
        table = torch.tensor(pages[: (first + len(ids) - 1) // PAGE + 1], device=self.device)
        turns = self._turns(positions)
        for layer, block in enumerate(self.blocks):
            x = _Prefill(self, layer, factors, turns[block.rope_kind], positions, table).forward(x)
        return x

    @torch.inference_mode()
    def decode(self, turns: Sequence[Turn]) -> torch.Tensor:
        """(B, V) fp32 logits of what follows each turn's token, in their order."""
        out = [torch.empty(0)] * len(turns)
        for low in range(0, self._slots, BLOCK):
            own = {turn.slot - low: place for place, turn in enumerate(turns) if low <= turn.slot < low + BLOCK}
            if own:
                logits = self.logits(self._decode_block(low, {row: turns[place] for row, place in own.items()}))
                for row, place in own.items():
                    out[place] = logits[row]
        return torch.stack(out)

    @torch.inference_mode()
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D) last hidden states, as the head reads them."""
        return self.fast.norm.forward(x)[0]

    @torch.inference_mode()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, V) fp32, N at most BLOCK."""
        padded = x.new_zeros(BLOCK, x.shape[1])
        padded[: len(x)] = self.normed(x)
        logits = (padded @ self.fast.head.T)[: len(x)].float()
        return self.fast.softcap * torch.tanh(logits / self.fast.softcap) if self.fast.softcap else logits

    def check(self) -> None:
        """Raise ModelError if this machine's products depend on a row's place, so that replies would on their neighbours."""
        x = torch.randn(BLOCK, self.fast.head.shape[1], device=self.device).to(self.dtype)
        order = torch.arange(BLOCK - 1, -1, -1, device=self.device)
        for weight in (self.fast.head, self.blocks[0].attention_in.weight()):
            if not torch.equal((x @ weight.T)[order], x[order] @ weight.T):
                raise ModelError(
                    f"matrix products in {self.dtype} on this {self.device.type} depend on a row's place", "engine.bits: 16"
                )

    def _turns(self, positions: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """cos and sin, (N, rotary) each, by kind of layer."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        made = {}
        for kind in {block.rope_kind for block in self.blocks}:
            cos, sin = self.fast.rope(like, positions[None], *((kind,) if kind else ()))
            made[kind] = (cos[0], sin[0])
        return made

    def _decode_block(self, low: int, turns: dict[int, Turn]) -> torch.Tensor:
        """(BLOCK, D) for the rows of a block; those without a turn hold nothing of use."""
        tokens, positions = torch.zeros(2, BLOCK, dtype=torch.int64)
        for row, turn in turns.items():
            tokens[row], positions[row] = turn.token, turn.position
        tokens, positions = tokens.to(self.device), positions.to(self.device)
        groups = _groups(turns, self.device)
        stacks = [stack for stack in self._stacks.values() if stack.holds_any(low)]
        rotary = self._turns(positions)
        x = self.fast.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x = _Decode(self, layer, stacks, low, rotary[block.rope_kind], groups).forward(x)
        return x


@dataclass(frozen=True)
class Group:
    """Rows of a block whose keys are padded to one number L, filled up to BLOCK by repeating the first.

    rows: (BLOCK,); count: how many are real. table: (BLOCK, L / PAGE) pages. page, offset: (count,) where the new key goes.
    seen: (BLOCK,) number of keys.
    """

    rows: torch.Tensor
    count: int
    table: torch.Tensor
    page: torch.Tensor
    offset: torch.Tensor
    seen: torch.Tensor


def _groups(turns: dict[int, Turn], device: torch.device) -> list[Group]:
    by_size: dict[int, list[int]] = {}
    for row, turn in turns.items():
        by_size.setdefault(_padded_pages(turn.position // PAGE + 1), []).append(row)
    return [_group(rows, turns, size, device) for size, rows in by_size.items()]


def _padded_pages(pages: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, 16, ...: at most half more than there are."""
    whole = 1 << (pages - 1).bit_length()
    return whole * 3 // 4 if whole >= 4 and pages <= whole * 3 // 4 else whole


def _group(rows: list[int], turns: dict[int, Turn], size: int, device: torch.device) -> Group:
    filled = rows + [rows[0]] * (BLOCK - len(rows))
    tables = []
    for row in filled:
        held = list(turns[row].pages[:size])
        tables.append(held + held[:1] * (size - len(held)))
    positions = [turns[row].position for row in filled]
    real = len(rows)
    return Group(
        torch.tensor(filled, device=device),
        real,
        torch.tensor(tables, device=device),
        torch.tensor([tables[place][positions[place] // PAGE] for place in range(real)], device=device),
        torch.tensor([position % PAGE for position in positions[:real]], device=device),
        torch.tensor([position + 1 for position in positions], device=device),
    )


class Stack:
    """Factors of the rows of all slots, padded to one rank: for each layer and product (slots, ...)."""

    def __init__(self, blocks: Sequence[Block], rank: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rank = rank
        self._used = [False] * slots
        self._a: list[list[torch.Tensor]] = []
        self._b: list[list[list[torch.Tensor]]] = []
        self._parts: list[tuple[int, int]] = []  # of each part: the product it belongs to, and its place there
        for block in blocks:
            products = _products(block)
            self._parts = [(number, place) for number, parts in enumerate(products) for place in range(len(parts))]
            self._a.append([
                torch.zeros(slots, len(parts) * rank, parts[0][0], dtype=dtype, device=device) for parts in products
            ])  # fmt: skip
            self._b.append([
                [torch.zeros(slots, rank, outputs, dtype=dtype, device=device) for _, outputs in parts] for parts in products
            ])  # fmt: skip

    def put(self, slot: int, factors: Factors) -> None:
        """The slot's rows get these factors; the slot was clear."""
        self._used[slot] = True
        for (layer, part), factor in factors.parts.items():
            number, place = self._parts[part]
            low = place * self.rank
            self._a[layer][number][slot, low : low + len(factor.a)] = factor.a
            self._b[layer][number][place][slot, : len(factor.b)] = factor.b

    def clear(self, slot: int) -> None:
        """The slot has none."""
        self._used[slot] = False
        for a, b in zip(self._a, self._b, strict=True):
            for tensor in (*a, *(part for parts in b for part in parts)):
                tensor[slot].zero_()

    def holds_any(self, low: int) -> bool:
        """Whether a slot of a block has factors here."""
        return any(self._used[low : low + BLOCK])

    def add(self, layer: int, number: int, low: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """y (BLOCK, outs) += scale B A x, row by row in one batched product each."""
        block = slice(low, low + BLOCK)
        lowered = torch.bmm(self._a[layer][number][block], x[:, :, None])
        at = 0
        for place, b in enumerate(self._b[layer][number]):
            part = lowered[:, place * self.rank : (place + 1) * self.rank].transpose(1, 2)
            y[:, at : at + b.shape[2]] += torch.bmm(part, b[block])[:, 0]
            at += b.shape[2]


def _products(block: Block) -> list[list[tuple[int, int]]]:
    """(in, out) of each linear module of a layer, by the product that computes them together."""
    return [
        [(linear.in_features, linear.out_features) for linear in projection.modules]
        for projection in (block.attention_in, block.attention_out, block.mlp_in, block.mlp_out)
    ]


@dataclass(frozen=True)
class _Prefill:
    """One layer over a chunk of one prompt."""

    body: Body
    layer: int
    factors: Factors | None
    turn: tuple[torch.Tensor, torch.Tensor]
    positions: torch.Tensor
    table: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _layer(self.body.blocks[self.layer], x, self.attend, self.add)

    def add(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        if self.factors is None:
            return
        products = _products(self.body.blocks[self.layer])
        part, at = sum(len(parts) for parts in products[:number]), 0
        for _, outputs in products[number]:
            if (factor := self.factors.parts.get((self.layer, part))) is not None:
                y[:, at : at + outputs] += (x @ factor.a.T) @ factor.b
            part, at = part + 1, at + outputs

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        block, pool = self.body.blocks[self.layer], self.body._pools[self.layer]
        query, key, value = _heads(block, qkv, self.turn)
        page, offset = self.table[self.positions // PAGE], self.positions % PAGE
        pool[page, 0, :, offset], pool[page, 1, :, offset] = key, value
        held = pool[self.table]  # (P, 2, G, PAGE, K)
        keys, values = held.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : int(self.table.shape[0]) * PAGE]
        at = torch.arange(keys.shape[1], device=keys.device)
        hidden = _hidden(self.positions, at, block.shape.window)[None, None]  # (1, 1, T, L)
        groups, share = block.shape.groups, block.shape.heads // block.shape.groups
        q = query.transpose(0, 1).reshape(groups, share * len(qkv), -1)
        mixed = _mix(q, keys, values, hidden.expand(groups, share, -1, -1).flatten(1, 2), at > self.positions[-1], block)
        return mixed.view(groups * share, len(qkv), -1).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class _Decode:
    """One layer over a block of rows that get one token each."""

    body: Body
    layer: int
    stacks: Sequence[Stack]
    low: int
    turn: tuple[torch.Tensor, torch.Tensor]
    groups: Sequence[Group]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _layer(self.body.blocks[self.layer], x, self.attend, self.add)

    def add(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        for stack in self.stacks:
            stack.add(self.layer, number, self.low, x, y)

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        block, pool = self.body.blocks[self.layer], self.body._pools[self.layer]
        query, key, value = _heads(block, qkv, self.turn)
        out = query.new_zeros(query.shape)
        groups, share = block.shape.groups, block.shape.heads // block.shape.groups
        for group in self.groups:
            real = group.rows[: group.count]
            pool[group.page, 0, :, group.offset], pool[group.page, 1, :, group.offset] = key[real], value[real]
            held = pool[group.table]  # (BLOCK, P, 2, G, PAGE, K)
            keys, values = held.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)  # (BLOCK G, L, K)
            at = torch.arange(keys.shape[1], device=keys.device)
            hidden = _hidden(group.seen - 1, at, block.shape.window).repeat_interleave(groups, 0)
            behind = (at >= group.seen[:, None]).repeat_interleave(groups, 0)
            q = query[group.rows].reshape(BLOCK * groups, share, -1)
            mixed = _mix(q, keys, values, hidden[:, None], behind, block).view(BLOCK, groups * share, -1)
            out[real] = mixed[: group.count]
        return out.flatten(1)


def _layer(block: Block, x: torch.Tensor, attend: Any, add: Any) -> torch.Tensor:
    """(N, D) -> (N, D). attend: (N, qkv) -> (N, H K). add(number, x, y) adds the adapters to product `number`."""

    def product(number: int, given: torch.Tensor) -> torch.Tensor:
        projection = (block.attention_in, block.attention_out, block.mlp_in, block.mlp_out)[number]
        y, _ = projection.forward(given)
        add(number, given, y)
        return y

    def joined(residual: torch.Tensor, y: torch.Tensor, place: int) -> torch.Tensor:
        return residual + (block.after[place].forward(y)[0] if block.after else y)

    qkv = product(0, block.norm.forward(x)[0])
    qkv = qkv if block.head_norms is None else block.head_norms.forward(qkv)
    middle = joined(x, product(1, attend(qkv)), 0)
    glu = block.kernels.glu(product(2, block.mlp_norm.forward(middle)[0]), block.activation)
    return joined(middle, product(3, glu), 1)


def _heads(block: Block, qkv: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """(N, (H + 2 G) K) -> query (N, H, K) and key (N, G, K), rotated, and value (N, G, K)."""
    heads, groups, width = block.shape.heads, block.shape.groups, block.width
    query, key, value = (
        part.unflatten(1, (-1, width)) for part in qkv.split([heads * width, groups * width, groups * width], 1)
    )
    turned = (rotate(part.transpose(0, 1), *turn).transpose(0, 1) for part in (query, key))
    return (*turned, value)


def _hidden(positions: torch.Tensor, at: torch.Tensor, window: int | None) -> torch.Tensor:
    """(N, L), true where a query must not see a key: the future, or beyond the sliding window."""
    distance = positions[:, None] - at
    return (distance < 0) | (distance >= window) if window else distance < 0


def _mix(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor, behind: torch.Tensor, block: Block
) -> torch.Tensor:
    """q (M, Q, K), keys and values (M, L, K), hidden (M, Q, L) -> (M, Q, K).

    behind: (M, L) or (L,), places that were never written by this row. What stands there may not even be a number, so it is
    set to 0 and not only given no weight.
    """
    keys, values = (part.masked_fill(behind[..., None], 0) for part in (keys, values))
    scores = torch.bmm(q, keys.transpose(1, 2)).float() * block.shape.scale
    if block.shape.softcap:
        scores = block.shape.softcap * torch.tanh(scores / block.shape.softcap)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.bmm(weights.to(values.dtype), values)


def open_body(model: Any, pages: int, slots: int) -> Body:
    """Raises sartor.models.linear.Unsupported for a base that is not in the table of forward.py."""
    return Body(Fast(model, Eager()), pages, slots)


def places_of(model: Any) -> dict[str, Place]:
    """The linear modules in the layers of a base of the table, by name."""
    inner = without_peft(model)
    family, names = FAMILIES[inner.config.model_type], {module: name for name, module in inner.named_modules()}
    places = {}
    for layer, block in enumerate(inner.get_decoder().layers):
        attention, mlp = block.self_attn, block.mlp
        modules = [
            *(getattr(attention, name) for name in family.attention_in), attention.o_proj,
            *(getattr(mlp, name) for name in family.mlp_in), mlp.down_proj,
        ]  # fmt: skip
        for part, module in enumerate(modules):
            places[names[module]] = Place(layer, part, module.in_features, module.out_features)
    return places
