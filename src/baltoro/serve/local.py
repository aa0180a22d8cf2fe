"""The embedded engine: a torch model answering hundreds of agents in one process, by continuous batching.

Requests join and leave the running batch between two tokens (`lane`). The model runs on the event loop itself; so a
program without real clocks or sockets is scheduled, batched and therefore computed the same way every time.
"""

import asyncio
import contextlib
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from baltoro.agent.engine import Completion, Sampled, Sampling
from baltoro.chat.messages import TokenSequence
from baltoro.chat.tokenizer import Tokenizer
from baltoro.model.kimi import KimiK25
from baltoro.model.layers import Linear, wide
from baltoro.model.moe import Experts
from baltoro.serve.lane import Lane, MediaNames, Request
from baltoro.serve.pages import Key

_BFLOAT16_WIDTH = 512
"""From this width on bfloat16 products are faster than float32 on a CPU; in narrower ones most time is packing."""


def snapshot(model: KimiK25) -> KimiK25:
    """A frozen copy whose matrices are already in the compute dtype (norms and routers stay in float32). On a CPU a
    narrow model computes in float32, whatever it is trained in."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    weight = frozen.language_model.lm_head.weight
    if weight.device.type == "cpu" and weight.shape[1] < _BFLOAT16_WIDTH:
        frozen.dtype = wide(model.dtype)
    for module in frozen.modules():
        if isinstance(module, Linear | Experts | nn.Embedding):
            module.to(frozen.dtype)
    return frozen


@dataclass(eq=False)
class _Ticket:
    """A request as the one who waits for it sees it. drawn: a token came, or none will come any more."""

    request: Request
    drawn: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    weight_version: int | None = None  # of the finished turn; None when the engine stopped before


_REMEMBERED = 4096
"""Greedy completions that are kept."""
_Greedy = tuple[int, int, tuple[Key, ...]]
"""Lane, most tokens, prompt."""


class LocalEngine:
    """Serves one model per role. `run` must be entered before `generate` is awaited."""

    def __init__(
        self,
        models: Mapping[str, KimiK25],
        tokenizer: Tokenizer,
        *,
        slots: int,
        max_len: int,
        cache_tokens: int | None = None,
        page: int = 16,
        chunk: int = 2048,
    ):
        """models: by role; roles that share one model object share one batch and one cache. slots: sequences at once
        per model. max_len: longest sequence, prompt and completion together. cache_tokens: most cached tokens per
        model, by default enough for every slot; memory grows up to it with use. page: tokens per page. chunk: most
        prompt tokens read in one step, so that a long prompt does not hold the others up."""
        self.tokenizer = tokenizer
        self.weight_version = 0
        self.sampled_tokens = 0
        self._names = MediaNames()
        whole = -(-max_len // page) * page
        lanes: dict[int, Lane] = {}
        self._lanes: dict[str, Lane] = {}
        self._tickets: dict[Request, _Ticket] = {}
        self._greedy: dict[_Greedy, Completion] = {}
        self._asked: dict[_Greedy, asyncio.Event] = {}  # of greedy completions that are being computed
        self._running = False
        for role, model in models.items():
            if id(model) not in lanes:
                lanes[id(model)] = Lane(
                    snapshot(model), slots, max(whole, cache_tokens or slots * whole), max_len, page, chunk
                )
            self._lanes[role] = lanes[id(model)]

    @property
    def _distinct(self) -> list[Lane]:
        return list({id(lane): lane for lane in self._lanes.values()}.values())

    def numbers(self) -> dict[str, float]:
        """Of all models together: requests in the batches and those that wait for a place, and how many of the caches'
        pages hold what they have read."""
        lanes = self._distinct
        return {
            "running": sum(len(lane.running) for lane in lanes),
            "waiting": sum(len(lane.waiting) for lane in lanes),
            "pages_used": sum(lane.pool.capacity - lane.pool.available for lane in lanes),
            "pages": sum(lane.pool.capacity for lane in lanes),
        }

    @torch.no_grad()
    def update(self, role: str, model: KimiK25) -> None:
        """New weights for a role, copied in place; cached contexts of the old ones are dropped. Nobody may be in the
        middle of a turn."""
        lane = self._lanes[role]
        assert not any(r.logprobs for r in lane.waiting)
        lane.forget()
        self._greedy.clear()
        for old, new in zip(_tensors(lane.model), _tensors(model), strict=True):
            old.copy_(new)
        self.weight_version += 1

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        """Raises ValueError when prompt and completion cannot fit or media are missing, KeyError for a role that has no
        model, RuntimeError when the engine stops before the completion ends.

        A greedy completion is computed once for all who ask for it before the next update: the rollouts of a group give
        frozen subagents the same subtasks, and an evaluation under several budgets asks the same agents."""
        request = self._request(prompt, sampling, role)
        if sampling.temperature > 0:
            return await self._complete(request, role)
        key = id(self._lanes[role]), sampling.max_tokens, tuple(request.keys)
        while key in self._asked:
            await self._asked[key].wait()  # whoever asked first may have been cancelled
        if key not in self._greedy:
            self._asked[key] = asyncio.Event()
            try:
                completion = await self._complete(request, role)
            finally:
                self._asked.pop(key).set()
            if len(self._greedy) == _REMEMBERED:
                del self._greedy[next(iter(self._greedy))]
            self._greedy[key] = completion
        return self._greedy[key]

    async def _complete(self, request: Request, role: str) -> Completion:
        with self._enter(request, role) as ticket:
            await ticket.ended.wait()
            if ticket.weight_version is None:
                raise RuntimeError("the engine stopped")
            reason = "stop" if request.tokens[-1] == self.tokenizer.im_end else "length"
            return Completion(request.ids, request.logprobs, reason, ticket.weight_version)

    def stream(self, prompt: TokenSequence, sampling: Sampling, role: str) -> AsyncGenerator[Sampled]:
        """The completion of `generate` token by token, the stop token included; raises what it raises. Closing the
        generator takes the request out of the engine before the next step."""
        return self._stream(self._request(prompt, sampling, role), role)

    async def _stream(self, request: Request, role: str) -> AsyncGenerator[Sampled]:
        with self._enter(request, role) as ticket:
            given = 0
            while given < len(request.logprobs) or not ticket.ended.is_set():
                await ticket.drawn.wait()
                ticket.drawn.clear()
                while given < len(request.logprobs):
                    token, logprob = request.tokens[request.prompt_len + given], request.logprobs[given]
                    yield Sampled(token, logprob, self.weight_version)
                    given += 1
            if ticket.weight_version is None:
                raise RuntimeError("the engine stopped")

    def _request(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Request:
        lane = self._lanes[role]
        if len(prompt.ids) + sampling.max_tokens > lane.max_len:
            raise ValueError(f"{len(prompt.ids)} + {sampling.max_tokens} tokens exceed the engine's {lane.max_len}")
        return Request(prompt, sampling, lane.model.config.vision.merge, self.tokenizer.media_pad, self._names)

    @contextlib.contextmanager
    def _enter(self, request: Request, role: str) -> Iterator[_Ticket]:
        if not self._running:
            raise RuntimeError("the engine stopped")
        lane = self._lanes[role]
        ticket = self._tickets[request] = _Ticket(request)
        lane.enter(request)
        self._wake.set()
        try:
            yield ticket
        finally:
            lane.leave(request)
            del self._tickets[request]

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        self._wake = asyncio.Event()  # it belongs to the event loop of this run
        async with asyncio.TaskGroup() as group:
            driver = group.create_task(self._drive())
            self._running = True
            try:
                yield
            finally:
                self._running = False
                driver.cancel()
                for ticket in self._tickets.values():
                    ticket.ended.set()
                    ticket.drawn.set()
                for lane in self._lanes.values():
                    for request in lane.running + lane.waiting:
                        lane.leave(request)

    async def _drive(self) -> None:
        lanes = self._distinct
        while True:
            if not any(lane.waiting or lane.running for lane in lanes):
                self._wake.clear()
                await self._wake.wait()
            # Agents that were just answered get the chance to ask again before the next token is computed.
            for _ in range(8):
                await asyncio.sleep(0)
            for lane in lanes:
                self._step(lane)

    @torch.inference_mode()
    def _step(self, lane: Lane) -> None:
        for request in lane.step():
            self.sampled_tokens += 1
            ticket = self._tickets[request]
            stopped = request.tokens[-1] == self.tokenizer.im_end
            if stopped or len(request.logprobs) == request.sampling.max_tokens:
                lane.leave(request)
                ticket.weight_version = self.weight_version
                ticket.ended.set()
            ticket.drawn.set()


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
