"""Partial rollout: an episode is cut at the boundary of an iteration, or by the end of the process, and goes on later,
under newer weights, with all the agents below it (appendix D).

`run_agent` takes the seed of every turn and every call from its place in the tree. So an episode that is run again asks
what it asked before, and is answered from the journal, without engine and tools, up to where it was cut. Every span of
tokens keeps the weight version that it was drawn under.
"""

import hashlib
import json
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baltoro.agent.engine import Completion, Sampling
from baltoro.agent.tool import CallContext, Tool, ToolResult
from baltoro.agent.trace import Trace
from baltoro.chat.messages import Clip, Image, Part, TokenSequence, ToolSpec, Video
from baltoro.rollout.journal import Journal
from baltoro.rollout.manager import Episode, Rollout


class Resumable:
    """The engine and the tools of one episode, answering from its journal what they have answered before.

    A call that failed is not remembered and is asked again. Where the episode asks anything else than before, because
    such a call now succeeds or because its program has changed, it goes on with the engine from there.
    """

    def __init__(self, episode: Episode, journal: Journal, records: dict[bytes, bytes]) -> None:
        self.id = episode.id
        self._episode = episode
        self._journal = journal
        self._records = records

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        grids = [item.grid_thw for item in prompt.media]
        key = _key(array("I", prompt.ids).tobytes(), [asdict(sampling), role, grids])
        if record := self.remembered(key):
            return _unpack_completion(record)
        completion = await self._episode.generate(prompt, sampling, role)
        self.remember(key, _pack_completion(completion))
        return completion

    def tool(self, tool: Tool) -> Tool:
        """The same tool, called once for every call of the episode. Not for tools that keep something in memory or in a
        sandbox, or that start agents: those are called again when the episode is run again, and so are as they were."""
        return _Remembered(tool, self)

    def remembered(self, key: bytes) -> bytes | None:
        return self._records.pop(key, None)

    def remember(self, key: bytes, value: bytes) -> None:
        self._journal.put(self.id, key, value)


def resumable(journal: Journal, rollout: Callable[[Resumable], Awaitable[Trace]]) -> Rollout:
    """A rollout that goes on from the journal whenever it is submitted again under the same id."""

    async def run(episode: Episode) -> Trace:
        return await rollout(Resumable(episode, journal, await journal.records(episode.id)))

    return run


@dataclass(frozen=True)
class _Remembered:
    tool: Tool
    episode: Resumable

    @property
    def spec(self) -> ToolSpec:
        return self.tool.spec

    @property
    def sequential(self) -> bool:
        return self.tool.sequential

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        key = _key(b"", [context.seed, self.spec.name, arguments])
        if record := self.episode.remembered(key):
            return _unpack_result(record)
        result = await self.tool.call(arguments, context)
        assert not result.children, f"{self.spec.name} starts agents: their turns are remembered, not its calls"
        self.episode.remember(key, _pack_result(result))
        return result


def _key(ids: bytes, question: object) -> bytes:
    return hashlib.blake2b(ids + json.dumps(question, sort_keys=True).encode(), digest_size=16).digest()


# A record is a line of JSON and the bytes whose lengths it names.


def _pack(head: dict[str, object], blocks: Sequence[bytes]) -> bytes:
    line = json.dumps({**head, "blocks": [len(block) for block in blocks]}).encode()
    return b"".join([line, b"\n", *blocks])


def _unpack(record: bytes) -> tuple[dict[str, Any], list[bytes]]:
    line, _, rest = record.partition(b"\n")
    head = json.loads(line)
    blocks: list[bytes] = []
    for length in head["blocks"]:
        blocks.append(rest[:length])
        rest = rest[length:]
    return head, blocks


def _pack_completion(completion: Completion) -> bytes:
    blocks = [array("I", completion.ids).tobytes(), array("d", completion.logprobs).tobytes()]
    return _pack({"reason": completion.finish_reason, "version": completion.weight_version}, blocks)


def _unpack_completion(record: bytes) -> Completion:
    head, (ids, logprobs) = _unpack(record)
    return Completion(array("I", ids).tolist(), array("d", logprobs).tolist(), head["reason"], head["version"])


def _pack_result(result: ToolResult) -> bytes:
    heads, blocks = zip(*map(_pack_part, result.content), strict=True) if result.content else ((), ())
    return _pack({"error": result.error, "steps": result.steps, "content": heads}, blocks)


def _unpack_result(record: bytes) -> ToolResult:
    head, blocks = _unpack(record)
    content = tuple(_unpack_part(part, block) for part, block in zip(head["content"], blocks, strict=True))
    return ToolResult(content, error=head["error"], steps=head["steps"])


def _pack_part(part: Part) -> tuple[dict[str, object], bytes]:
    match part:
        case str():
            return {"text": part}, b""
        case Image(pixels):
            return {"image": pixels.shape}, pixels.tobytes()
        case Clip(frames, fps):
            return {"clip": frames.shape, "fps": fps}, frames.tobytes()
        case Video(bytes() as file):
            return {"video": None}, file
        case Video(path):
            return {"video": str(path)}, b""


def _unpack_part(head: dict[str, Any], block: bytes) -> Part:
    match head:
        case {"text": text}:
            return text
        case {"image": shape}:
            return Image(np.frombuffer(block, np.uint8).reshape(shape))
        case {"clip": shape, "fps": fps}:
            return Clip(np.frombuffer(block, np.uint8).reshape(shape), fps)
        case {"video": None}:
            return Video(block)
        case _:
            return Video(Path(head["video"]))
