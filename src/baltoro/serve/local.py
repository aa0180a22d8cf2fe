"""The embedded engine: a torch model answering hundreds of agents in one process, by continuous batching.

Requests join and leave the running batch between two tokens. A finished request's cache slot is kept until its place is
needed, and an agent's next turn continues there: only the new tokens are read. The model runs on the event loop itself;
so a program without real clocks or sockets is scheduled, batched and therefore computed the same way every time.
"""

import asyncio
import contextlib
import copy
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from baltoro.agent.engine import Completion, Sampled, Sampling
from baltoro.chat.messages import MediaItem, TokenSequence
from baltoro.chat.tokenizer import Tokenizer
from baltoro.model.attention import CachePlan
from baltoro.model.kimi import KimiK25
from baltoro.model.layers import Linear
from baltoro.model.moe import Experts


def snapshot(model: KimiK25) -> KimiK25:
    """A frozen copy whose matrices are already in the compute dtype (norms and routers stay in float32)."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for module in frozen.modules():
        if isinstance(module, Linear | Experts | nn.Embedding):
            module.to(model.dtype)
    return frozen


@dataclass(eq=False)
class _Request:
    prompt: TokenSequence
    sampling: Sampling
    rng: random.Random
    drawn: asyncio.Event = field(default_factory=asyncio.Event)  # something was appended to ids, or nothing will be
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    left: bool = False  # nobody waits for it any more
    slot: int = -1
    read: int = 0  # tokens whose latents are in the cache
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _Lane:
    """One model with its cache: the slots, who is using them, and which finished contexts they still hold."""

    def __init__(self, model: KimiK25, stop: int, slots: int, max_len: int):
        self.model = model
        self.stop = stop
        self.max_len = max_len
        text = model.config.text
        width = text.kv_lora_rank + text.qk_rope_head_dim
        device = model.language_model.lm_head.weight.device
        self.cache = [
            torch.zeros(slots, max_len, width, dtype=model.dtype, device=device) for _ in range(text.num_layers)
        ]
        self.free = list(range(slots))
        # Finished contexts -> slot, oldest first. Contexts with equal ids may show different pictures.
        self.kept: dict[tuple[tuple[int, ...], tuple[MediaItem, ...]], int] = {}
        self.arrived: list[_Request] = []
        self.waiting: list[_Request] = []  # without a slot, in order of arrival
        self.running: list[_Request] = []

    def admit(self) -> list[_Request]:
        """Give waiting requests a slot: first those that go on from a kept context, so that agents which have begun
        finish before others begin; then the others, in the place of the oldest kept contexts if need be."""
        # What a request may go on from exists when it arrives, so each is looked up once.
        fresh = [r for r in self.arrived if self._continue(r)]
        self.waiting += [r for r in self.arrived if r.slot < 0]
        self.arrived = []
        for request in self.waiting:
            if not self.free and self.kept:
                self.free.append(self.kept.pop(next(iter(self.kept))))
            if not self.free:
                break
            request.slot = self.free.pop()
            fresh.append(request)
        self.waiting = [r for r in self.waiting if r.slot < 0]
        return fresh

    def _continue(self, request: _Request) -> bool:
        prompt = request.prompt
        for end in range(len(prompt.ids) - 1, 0, -1):
            # A kept context ends with a sampled stop token, so only those places are looked up.
            if prompt.ids[end - 1] == self.stop:
                media = prompt.media[: len(prompt.media) - len(self.unread_media(prompt, end))]
                slot = self.kept.pop((tuple(prompt.ids[:end]), tuple(media)), None)
                if slot is not None:
                    request.slot = slot
                    request.read = end - 1  # the stop token itself was sampled but never read
                    return True
        return False

    def release(self, request: _Request) -> None:
        context = ((*request.prompt.ids, *request.ids), tuple(request.prompt.media))
        if request.ids[-1] == self.stop and context not in self.kept:
            self.kept[context] = request.slot
        else:
            self.free.append(request.slot)

    def forget(self) -> None:
        self.free += self.kept.values()
        self.kept.clear()

    def abandon(self) -> None:
        """Drop every request; whoever still waits for one is told."""
        self.free += [request.slot for request in self.running]
        for request in self.running + self.waiting + self.arrived:
            request.left = True
            request.drawn.set()
            request.ended.set()
        self.running, self.waiting, self.arrived = [], [], []

    def unread_media(self, prompt: TokenSequence, read: int) -> list[MediaItem]:
        """The items whose placeholders stand behind the first `read` tokens."""
        merge = self.model.config.vision.merge
        skip = prompt.ids[:read].count(self.model.media_pad)
        for i, item in enumerate(prompt.media):
            if skip == 0:
                return prompt.media[i:]
            _, h, w = item.grid_thw
            skip -= (h // merge) * (w // merge)
        return []


class LocalEngine:
    """Serves one model per role. `run` must be entered before `generate` is awaited."""

    def __init__(self, models: Mapping[str, KimiK25], tokenizer: Tokenizer, *, slots: int, max_len: int):
        """models: by role; roles that share one model object share one batch and one cache. slots: sequences at once
        per model. max_len: longest sequence, prompt and completion together."""
        self.tokenizer = tokenizer
        self.weight_version = 0
        self.sampled_tokens = 0
        lanes: dict[int, _Lane] = {}
        self._lanes: dict[str, _Lane] = {}
        for role, model in models.items():
            if id(model) not in lanes:
                lanes[id(model)] = _Lane(snapshot(model), tokenizer.im_end, slots, max_len)
            self._lanes[role] = lanes[id(model)]

    def update(self, role: str, model: KimiK25) -> None:
        """New weights for a role, between turns; cached contexts of the old ones are dropped."""
        lane = self._lanes[role]
        assert not lane.running
        lane.model = snapshot(model)
        lane.forget()
        self.weight_version += 1

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        """Raises ValueError when prompt and completion cannot fit, KeyError for a role that has no model, RuntimeError
        when the engine stops before the completion ends."""
        self._check(prompt, sampling, role)
        with self._enter(prompt, sampling, role) as request:
            await request.ended.wait()
            if request.left:
                raise RuntimeError("the engine stopped")
            reason = "stop" if request.ids[-1] == self.tokenizer.im_end else "length"
            return Completion(request.ids, request.logprobs, reason, self.weight_version)

    def stream(self, prompt: TokenSequence, sampling: Sampling, role: str) -> AsyncGenerator[Sampled]:
        """The completion of `generate` token by token, the stop token included; raises what it raises. Closing the
        generator takes the request out of the engine before the next step."""
        self._check(prompt, sampling, role)
        return self._stream(prompt, sampling, role)

    async def _stream(self, prompt: TokenSequence, sampling: Sampling, role: str) -> AsyncGenerator[Sampled]:
        with self._enter(prompt, sampling, role) as request:
            given = 0
            while given < len(request.ids) or not request.ended.is_set():
                await request.drawn.wait()
                request.drawn.clear()
                while given < len(request.ids):
                    yield Sampled(request.ids[given], request.logprobs[given])
                    given += 1
                if request.left:
                    raise RuntimeError("the engine stopped")

    def _check(self, prompt: TokenSequence, sampling: Sampling, role: str) -> None:
        limit = self._lanes[role].max_len
        if len(prompt.ids) + sampling.max_tokens > limit:
            raise ValueError(f"{len(prompt.ids)} + {sampling.max_tokens} tokens exceed the engine's {limit}")

    @contextlib.contextmanager
    def _enter(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Iterator[_Request]:
        request = _Request(prompt, sampling, random.Random(sampling.seed))
        self._lanes[role].arrived.append(request)
        self._wake.set()
        try:
            yield request
        finally:
            request.left = True

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        self._wake = asyncio.Event()  # it belongs to the event loop of this run
        async with asyncio.TaskGroup() as group:
            driver = group.create_task(self._drive())
            try:
                yield
            finally:
                driver.cancel()
                for lane in self._lanes.values():
                    lane.abandon()

    async def _drive(self) -> None:
        lanes = list({id(lane): lane for lane in self._lanes.values()}.values())
        while True:
            if not any(lane.arrived or lane.waiting or lane.running for lane in lanes):
                self._wake.clear()
                await self._wake.wait()
            # Agents that were just answered get the chance to ask again before the next token is computed.
            for _ in range(8):
                await asyncio.sleep(0)
            for lane in lanes:
                self._step(lane)

    @torch.inference_mode()
    def _step(self, lane: _Lane) -> None:
        """Read every newcomer's prompt, or else one token of everyone; then draw one token for each of these."""
        for request in [r for r in lane.running if r.left]:
            lane.running.remove(request)
            lane.free.append(request.slot)
        lane.waiting = [r for r in lane.waiting if not r.left]
        lane.arrived = [r for r in lane.arrived if not r.left]
        active = lane.admit()
        lane.running += active
        active = active or list(lane.running)
        if not active:
            return
        spans: list[tuple[int, int, int]] = []
        ids: list[int] = []
        media: list[MediaItem] = []
        for r in active:
            new = r.ids[-1:] if r.ids else r.prompt.ids[r.read :]
            spans.append((r.slot, r.read, r.read + len(new)))
            ids += new
            if not r.ids and r.prompt.media:
                media += lane.unread_media(r.prompt, r.read)
            r.read += len(new)
        model = lane.model
        patches = torch.from_numpy(np.concatenate([m.patches for m in media])) if media else torch.empty(0)
        x = model.embed(torch.tensor(ids), patches, [m.grid_thw for m in media])
        hidden = model.language_model.model.extend(x, lane.cache, CachePlan(spans))
        last = torch.tensor([b - a for _, a, b in spans]).cumsum(0) - 1
        self._draw(model.logits(hidden[last]).float(), active)
        for r in active:
            stopped = r.ids[-1] == lane.stop
            if stopped or len(r.ids) == r.sampling.max_tokens:
                lane.running.remove(r)
                lane.release(r)
                r.ended.set()
            r.drawn.set()

    def _draw(self, logits: Tensor, active: list[_Request]) -> None:
        logprobs = logits.log_softmax(-1)
        logits[:, self.tokenizer.media_pad] = float("-inf")  # a placeholder stands for media, which no model can write
        chosen = logits.argmax(-1)
        warm = [i for i, r in enumerate(active) if r.sampling.temperature > 0]
        if warm:
            temperature = torch.tensor([active[i].sampling.temperature for i in warm])[:, None]
            top_p = torch.tensor([active[i].sampling.top_p for i in warm])[:, None]
            uniform = torch.tensor([active[i].rng.random() for i in warm], dtype=torch.float64)[:, None]
            chosen[warm] = _sample(logits[warm] / temperature, top_p, uniform)
        picked = logprobs.gather(-1, chosen[:, None])[:, 0].tolist()
        for r, token, logprob in zip(active, chosen.tolist(), picked, strict=True):
            r.ids.append(token)
            r.logprobs.append(logprob)
        self.sampled_tokens += len(active)


def _sample(logits: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw, one given uniform number per row; with top_p < 1 from the smallest set of that mass."""
    probabilities = logits.double().softmax(-1)
    if bool((top_p < 1).any()):
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    cumulative = probabilities.cumsum(-1)
    target = uniform * cumulative[:, -1:]
    return (cumulative <= target).sum(-1).clamp(max=logits.shape[-1] - 1)
