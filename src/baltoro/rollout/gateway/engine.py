"""Answers from an engine: the gateway renders, the engine reads ids and draws ids."""

import asyncio
import secrets
from array import array
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

from baltoro.agent.engine import Sampling, StreamingEngine
from baltoro.agent.loop import derive_seed
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import TokenSequence
from baltoro.chat.render import TooLong
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway.answer import Job, Step, speak
from baltoro.rollout.gateway.dialogue import media_fault
from baltoro.rollout.gateway.errors import ApiError
from baltoro.rollout.gateway.rendering import Rendering
from baltoro.rollout.gateway.said import BrokenMedia
from baltoro.rollout.gateway.upstream import Ask

_PREPARED_AT_ONCE = 2


class EngineUpstream:
    """The engine must be running; it is asked in the role that the request names as its model."""

    def __init__(self, engine: StreamingEngine, tokenizer: Tokenizer, media: MediaSpec, max_len: int) -> None:
        self.rendering = Rendering(tokenizer, media)
        self.max_len = max_len
        self.exact = True
        self._engine = engine
        # Not asyncio's own few threads: a program's blocking tools may hold all of them.
        self._threads = ThreadPoolExecutor(_PREPARED_AT_ONCE, "gateway prepare")
        self._tokenizer = tokenizer

    async def prepare(self, ask: Ask) -> Job:
        """In a thread: decoding and encoding let other threads run meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._prepare, ask)

    def _prepare(self, ask: Ask) -> Job:
        request, limit = ask.request, self.max_len
        try:
            prompt = self._prompt(ask, limit - 1)
        except TooLong:
            raise _too_long(f"the messages take more than {limit - 1} tokens", limit) from None
        except BrokenMedia as error:
            raise media_fault(ask.dialogue.places[error.media.hash], error.media.kind, error) from None
        except (ValueError, RecursionError) as error:  # a schema without a TypeScript form; a broken video
            fault = "a schema is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ApiError(400, fault) from None
        max_tokens = request.max_completion_tokens or request.max_tokens or limit - len(prompt.ids)
        if len(prompt.ids) + max_tokens > limit:
            raise _too_long(f"the messages take {len(prompt.ids)} tokens and the completion up to {max_tokens}", limit)
        seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
        samplings = [
            Sampling(max_tokens, request.temperature, request.top_p, derive_seed(seed, i) if i else seed)
            for i in range(request.n)
        ]
        calls = "none" if request.tool_choice == "none" else "any" if request.parallel_tool_calls else "one"
        read = array("i", prompt.ids)
        return Job(request.model, prompt, read, samplings, ask.setting.tools, request.thinks, request.stops, calls)

    def speak(self, ask: Ask, job: Job, index: int) -> AsyncGenerator[Step]:
        return speak(self._engine, job, self._tokenizer, index)

    def spell(self, token: int) -> bytes:
        return self._tokenizer.decode_bytes([token])

    def _prompt(self, ask: Ask, limit: int) -> TokenSequence:
        said, files = ask.dialogue.said, ask.dialogue.files
        if ask.place is None:
            return self.rendering.begin(said, ask.setting, files, ask.request.keeps_reasoning, limit)
        if ask.place.prompt is not None:
            return self.rendering.again(ask.chain, ask.place.prompt, files)
        if not ask.chain:
            return self.rendering.begin(said, ask.setting, files, True, limit)
        return self.rendering.go_on(ask.chain, said[ask.place.begin :], ask.setting, files, limit)


def _too_long(fault: str, limit: int) -> ApiError:
    fault = f"{fault}; this model's context is {limit} tokens"
    return ApiError(400, fault, code="context_length_exceeded", param="messages")
