"""One model with its paged cache, and which of its requests reads how many tokens next.

A request is its tokens, of which the first `read` have latents in the cache. A step reads more of them for everybody:
the one token just drawn, or a chunk of a prompt (or of a context that lost its pages). Who has read all of them draws
the next token. So prompts, continued turns and preempted requests take one path.
"""

import bisect
import hashlib
import random
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from baltoro.agent.engine import Sampling
from baltoro.chat.messages import MediaItem, TokenSequence
from baltoro.model.attention import CachePlan
from baltoro.model.kimi import KimiK25
from baltoro.model.layers import wide
from baltoro.serve.draw import draw
from baltoro.serve.pages import Key, PagePool, Prefix

# Media tokens whose features are remembered for other requests that show the same.
_FEATURE_TOKENS = 16384


class MediaNames:
    """Names media by content, each object once."""

    def __init__(self) -> None:
        self._names: WeakKeyDictionary[MediaItem, bytes] = WeakKeyDictionary()

    def __getitem__(self, item: MediaItem) -> bytes:
        if item not in self._names:
            digest = hashlib.blake2b(repr(item.grid_thw).encode(), digest_size=16)
            digest.update(item.patches.tobytes())
            self._names[item] = digest.digest()
        return self._names[item]


class Request:
    """tokens: the prompt and what was drawn; keys: the same, with media by content. path: the full pages of the first
    tokens; tail: pages that only this request writes to. row: its line of the page tables, while it runs."""

    def __init__(self, prompt: TokenSequence, sampling: Sampling, merge: int, pad: int, names: MediaNames):
        """Raises ValueError where placeholders and media do not fit."""
        self.prompt_len = len(prompt.ids)
        self.sampling = sampling
        self.rng = random.Random(sampling.seed)
        self.tokens = list(prompt.ids)
        self.media = {names[item]: item for item in prompt.media}
        self.keys: list[Key] = list(prompt.ids)
        places = [i for i, token in enumerate(prompt.ids) if token == pad] if pad in prompt.ids else []
        shown = [
            (names[item], k)
            for item in prompt.media
            for k in range((item.grid_thw[1] // merge) * (item.grid_thw[2] // merge))
        ]
        if len(places) != len(shown):
            raise ValueError(f"{len(places)} media placeholders for {len(shown)} media tokens")
        for place, key in zip(places, shown, strict=True):
            self.keys[place] = key
        self.logprobs: list[float] = []
        self.read = 0
        self.path: list[Prefix] = []
        self.tail: list[int] = []
        self.row = -1
        self.rank: tuple[int, int] = (0, 0)

    @property
    def ids(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def unread(self) -> int:
        return len(self.keys) - self.read


class Lane:
    def __init__(self, model: KimiK25, slots: int, cache_tokens: int, max_len: int, page: int, chunk: int):
        """max_len: longest sequence, which cache_tokens must hold. chunk: most prompt tokens read in one step."""
        self.model = model
        self.max_len = max_len
        self.chunk = chunk
        self.pool = PagePool(-(-cache_tokens // page), page)
        text = model.config.text
        self.device = model.language_model.lm_head.weight.device
        shape = (0, page, text.kv_lora_rank + text.qk_rope_head_dim)
        self.cache = [torch.zeros(shape, dtype=model.dtype, device=self.device) for _ in range(text.num_layers)]
        self.tables = torch.zeros(slots, -(-max_len // page), dtype=torch.int64)
        self.rows = list(range(slots))
        self.features: dict[bytes, Tensor] = {}  # least recently shown first
        self.arrivals = 0
        self.waiting: list[Request] = []  # by rank
        self.running: list[Request] = []  # in order of admission

    def enter(self, request: Request) -> None:
        # Who finds much of the context cached overtakes as many others as tokens were found: agents that have begun
        # finish before others begin, yet nobody is overtaken for ever.
        self._adopt(request)
        self.arrivals += 1
        request.rank = (self.arrivals - request.read, self.arrivals)
        self._drop_pages(request)
        self._queue(request)

    def leave(self, request: Request) -> None:
        """Its full pages stay as a cached prefix."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._stop(request)

    def forget(self) -> None:
        """Drop everything computed with the present weights. Nothing may be running."""
        assert not self.running
        self.pool.forget()
        self.features.clear()

    def step(self) -> list[Request]:
        """Read the next tokens of everyone whose turn it is; draw for those that have read all, who are returned."""
        self._admit()
        turns = self._turns()
        if not turns:
            return []
        # Neighbours of similar shape share a tile of attention.
        turns.sort(key=lambda turn: (turn[1], turn[0].read))
        hidden = self._read(turns)
        ends: list[int] = []
        drawing: list[Request] = []
        at = 0
        for request, new in turns:
            at += new
            request.read += new
            self._publish(request)
            if request.unread == 0:
                ends.append(at - 1)
                drawing.append(request)
        if drawing:
            logits = self.model.logits(hidden[torch.tensor(ends, device=self.device)])
            logits = logits.to(wide(logits.dtype))
            samplings = [r.sampling for r in drawing]
            uniforms = [r.rng.random() if r.sampling.temperature > 0 else 0.0 for r in drawing]
            for request, token, logprob in zip(
                drawing, *draw(logits, samplings, uniforms, self.model.media_pad), strict=True
            ):
                request.tokens.append(token)
                request.keys.append(token)
                request.logprobs.append(logprob)
        return drawing

    def _read(self, turns: list[tuple[Request, int]]) -> Tensor:
        spans = [(r.read, r.read + new) for r, new in turns]
        ids = [token for (r, _), (a, b) in zip(turns, spans, strict=True) for token in r.tokens[a:b]]
        shown: list[tuple[int, tuple[bytes, int]]] = []
        media: dict[bytes, MediaItem] = {}
        at = 0
        for (request, new), (a, b) in zip(turns, spans, strict=True):
            if request.media:
                here = [(at + i, key) for i, key in enumerate(request.keys[a:b]) if isinstance(key, tuple)]
                media.update((name, request.media[name]) for _, (name, _) in here)
                shown += here
            at += new
        decoder = self.model.language_model.model
        weight = decoder.embed_tokens.weight
        x = torch.nn.functional.embedding(torch.tensor(ids, device=self.device), weight).to(self.model.dtype)
        if shown:
            self._encode(media)
            starts: dict[bytes, int] = {}
            size = 0
            for name in media:
                starts[name] = size
                size += len(self.features[name])
            bank = torch.cat([self.features[name] for name in media])
            places, rows = torch.tensor([(i, starts[name] + k) for i, (name, k) in shown], device=self.device).unbind(1)
            x.index_copy_(0, places, bank.index_select(0, rows))
        tables = self.tables[[r.row for r, _ in turns]]
        plan = CachePlan(spans, tables, self.pool.page, self.model.config.text, self.device)
        return decoder.extend(x, self.cache, plan)

    def _encode(self, media: dict[bytes, MediaItem]) -> None:
        """Features of these items, most of them remembered; then forget the oldest others."""
        new = {name: item for name, item in media.items() if name not in self.features}
        if new:
            patches = torch.from_numpy(np.concatenate([item.patches for item in new.values()])).to(self.device)
            grids = [item.grid_thw for item in new.values()]
            merge = self.model.config.vision.merge
            sizes = [(h // merge) * (w // merge) for _, h, w in grids]
            self.features.update(zip(new, self.model.encode_media(patches, grids).split(sizes), strict=True))
        for name in media:
            self.features[name] = self.features.pop(name)
        while len(self.features) > len(media) and sum(map(len, self.features.values())) > _FEATURE_TOKENS:
            del self.features[next(iter(self.features))]

    def _admit(self) -> None:
        while self.waiting and self.rows:
            request = self.waiting[0]
            self._adopt(request)
            need = self._pages(len(request.keys)) - len(request.path)
            # Beside the whole request, a page for each running one to grow: else it would soon be preempted again.
            if self.running and self.pool.available < need + len(self.running):
                self._drop_pages(request)
                return
            del self.waiting[0]
            request.row = self.rows.pop()
            self._write_table(request, 0)
            self.running.append(request)

    def _turns(self) -> list[tuple[Request, int]]:
        """Who reads how many tokens now. A page that another request is about to fill is waited for, not filled again:
        agents that begin together with one prompt read it once."""
        turns: list[tuple[Request, int]] = []
        left = self.chunk
        claimed: set[tuple[Prefix, tuple[Key, ...]]] = set()
        for request in list(self.running):
            if request.row < 0:
                continue  # preempted by an earlier one
            new = 1
            if request.unread > 1:
                self._adopt(request)
                start, end = len(request.path) * self.pool.page, (len(request.path) + 1) * self.pool.page
                claim = (request.path[-1] if request.path else self.pool.root, tuple(request.keys[start:end]))
                new = min(request.unread, left)
                if new == 0 or claim in claimed:
                    continue
                if end < len(request.keys):
                    claimed.add(claim)
                left -= new
            if self._reserve(request, request.read + new):
                turns.append((request, new))
        return turns

    def _reserve(self, request: Request, end: int) -> bool:
        """Pages for the tokens before `end`; where there are none, the youngest running request gives up its own. False
        where that is this one."""
        held = len(request.path) + len(request.tail)
        while len(request.path) + len(request.tail) < self._pages(end):
            page = self.pool.take()
            if page is not None:
                request.tail.append(page)
                continue
            youngest = self.running[-1]
            self._stop(youngest)
            self._queue(youngest)
            if youngest is request:
                return False
        self._write_table(request, held)
        if self.pool.made > len(self.cache[0]):
            # Storage doubles, one layer after another.
            pages = min(max(self.pool.made, 2 * len(self.cache[0])), self.pool.capacity)
            for i, old in enumerate(self.cache):
                self.cache[i] = old.new_zeros(pages, *old.shape[1:])
                self.cache[i][: len(old)] = old
        return True

    def _adopt(self, request: Request) -> None:
        """Go on from cached pages as far as they go; the last token is always read, for what follows it."""
        page = self.pool.page
        while request.read == len(request.path) * page and request.unread > page:
            parent = request.path[-1] if request.path else self.pool.root
            node = self.pool.find(parent, request.keys[request.read : request.read + page])
            if node is None:
                break
            request.path.append(node)
            request.read += page
            if request.row >= 0:
                self._write_table(request, len(request.path) - 1)

    def _publish(self, request: Request) -> None:
        page = self.pool.page
        while (len(request.path) + 1) * page <= request.read:
            start = len(request.path) * page
            parent = request.path[-1] if request.path else self.pool.root
            request.path.append(self.pool.publish(parent, request.keys[start : start + page], request.tail.pop(0)))
            self.tables[request.row, len(request.path) - 1] = request.path[-1].page

    def _write_table(self, request: Request, first: int) -> None:
        pages = [node.page for node in request.path[first:]] + request.tail[max(first - len(request.path), 0) :]
        self.tables[request.row, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int64)

    def _stop(self, request: Request) -> None:
        self.running.remove(request)
        self.rows.append(request.row)
        request.row = -1
        self._drop_pages(request)

    def _drop_pages(self, request: Request) -> None:
        for page in request.tail:
            self.pool.give_back(page)
        self.pool.let_go(request.path)
        request.path, request.tail, request.read = [], [], 0

    def _queue(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=lambda r: r.rank)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.pool.page)
