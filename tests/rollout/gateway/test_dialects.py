"""One agent that looks at a screen, six turns, as a program of three different client libraries: what the gateway keeps
is what the engine saw and drew, and the trainer gets the tensors of the same episode run white-box."""

import base64
import contextlib
import dataclasses
import io
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import anthropic
import numpy as np
import pytest
from aiohttp import web
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from PIL import Image as PilImage

from baltoro.agent.engine import Completion, Sampled, Sampling
from baltoro.agent.loop import Limits, run_agent
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.agent.tool import CallContext, ToolResult
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Image, MediaItem, TokenSequence, ToolSpec, system, user
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway.api import Api, ApiConfig
from baltoro.rollout.gateway.engine import EngineUpstream

T = Tokenizer({bytes([b]): b for b in range(256)})
HALF = (0.5, 0.5, 0.5)
SPEC = MediaSpec(patch_size=4, merge=2, patch_limit=256, side_limit=64, mean=HALF, std=HALF, frames_per_chunk=4)
SYSTEM, TASK = "You work on a screen.", "Open the settings."
CLICK = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "label": {"type": "string"}},
    "required": ["x"],
}
TOOL = ToolSpec("click", "Clicks, and shows the screen.", CLICK)
TURNS = 6


def screen(x: int) -> np.ndarray:
    """Another picture, and of another size, for each place."""
    draw = np.random.default_rng(x)
    return draw.integers(0, 256, (20 + x, 30 + 3 * x, 3), np.uint8)


def png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    PilImage.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def script(prompt: str, role: str) -> str:
    """Two calls in its second turn, one in the others, and an answer in its sixth."""
    turn = prompt.count("<|im_assistant|>") - 1
    if turn == TURNS - 1:
        return completion_text("  Done.\n", reasoning="that is it ☃")
    calls = [("click", {"x": turn, "label": "☃ ü"})] + ([("click", {"x": 9})] if turn == 1 else [])
    return completion_text(
        "" if turn == 2 else f" see {turn} ", reasoning=f"think {turn}", calls=calls, first_index=turn
    )


class Priced(ScriptedEngine):
    """Log-probabilities that depend on what stands before, so that none can be confused with another."""

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        completion = await super().generate(prompt, sampling, role)
        drawn = [-random.Random(repr((len(prompt.ids), i, token))).random() for i, token in enumerate(completion.ids)]
        return dataclasses.replace(completion, logprobs=drawn, weight_version=len(self.prompts))

    async def stream(self, prompt: TokenSequence, sampling: Sampling, role: str) -> AsyncGenerator[Sampled]:
        completion = await self.generate(prompt, sampling, role)
        for token, logprob in zip(completion.ids, completion.logprobs, strict=True):
            yield Sampled(token, logprob, completion.weight_version)


class Click:
    spec = TOOL
    sequential = False

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        x = arguments["x"]
        assert isinstance(x, int)
        return ToolResult((f"clicked {x}", Image(screen(x))))


@contextlib.asynccontextmanager
async def served(engine: Priced) -> AsyncIterator[tuple[Api, str]]:
    api = Api(EngineUpstream(engine, T, SPEC, 20_000), ApiConfig("m", max_choices=8, max_body=2**22))
    runner = api.runner()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield api, f"http://127.0.0.1:{runner.addresses[0][1]}/sessions/s1"
    await runner.cleanup()


async def chat(url: str, stream: bool) -> str:
    def image(x: int) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(screen(x))}"}}

    function = {"name": TOOL.name, "description": TOOL.description, "parameters": CLICK}
    messages: list[Any] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": [image(7), {"type": "text", "text": TASK}]},
    ]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        while True:
            ask: Any = {"model": "m", "messages": messages, "tools": [{"type": "function", "function": function}]}
            if stream:
                async with client.chat.completions.stream(**ask) as events:
                    async for _ in events:
                        pass
                    message: Any = (await events.get_final_completion()).choices[0].message
            else:
                message = (await client.chat.completions.create(**ask)).choices[0].message
            if not message.tool_calls:
                return message.content
            # As most clients do: the reasoning is dropped, the rest is written anew.
            calls = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": json.dumps(json.loads(call.function.arguments)),
                    },
                }
                for call in message.tool_calls
            ]
            messages.append({"role": "assistant", "content": message.content, "tool_calls": calls})
            for call in message.tool_calls:
                x = json.loads(call.function.arguments)["x"]
                content = [{"type": "text", "text": f"clicked {x}"}, image(x)]
                messages.append({"role": "tool", "tool_call_id": call.id, "content": content})


async def messages(url: str, stream: bool) -> str:
    def image(x: int) -> dict[str, Any]:
        return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png(screen(x))}}

    history: list[Any] = [{"role": "user", "content": [image(7), {"type": "text", "text": TASK}]}]
    async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        while True:
            ask: Any = {
                "model": "m",
                "max_tokens": 500,
                "system": SYSTEM,
                "messages": history,
                "tools": [{"name": TOOL.name, "description": TOOL.description, "input_schema": CLICK}],
            }
            if stream:
                async with client.messages.stream(**ask) as events:
                    answer: Any = await events.get_final_message()
            else:
                answer = await client.messages.create(**ask)
            uses = [block for block in answer.content if block.type == "tool_use"]
            if not uses:
                assert answer.stop_reason == "end_turn"
                return next(block.text for block in answer.content if block.type == "text")
            assert answer.stop_reason == "tool_use"
            history.append({"role": "assistant", "content": [block.model_dump() for block in answer.content]})
            results = [
                {
                    "type": "tool_result",
                    "tool_use_id": use.id,
                    "content": [{"type": "text", "text": f"clicked {use.input['x']}"}, image(use.input["x"])],
                }
                for use in uses
            ]
            history.append({"role": "user", "content": results})


async def responses(url: str, stream: bool) -> str:
    def image(x: int) -> dict[str, Any]:
        return {"type": "input_image", "detail": "auto", "image_url": f"data:image/png;base64,{png(screen(x))}"}

    items: list[Any] = [{"role": "user", "content": [image(7), {"type": "input_text", "text": TASK}]}]
    tool = {
        "type": "function",
        "name": TOOL.name,
        "description": TOOL.description,
        "parameters": CLICK,
        "strict": False,
    }
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        while True:
            ask: Any = {"model": "m", "instructions": SYSTEM, "input": items, "tools": [tool]}
            if stream:
                async with client.responses.stream(**ask) as events:
                    answer: Any = await events.get_final_response()
            else:
                answer = await client.responses.create(**ask)
            assert answer.status == "completed"
            items += [item.model_dump(exclude_unset=True) for item in answer.output]
            calls = [item for item in answer.output if item.type == "function_call"]
            if not calls:
                return answer.output_text
            for call in calls:
                x = json.loads(call.arguments)["x"]
                output = [{"type": "input_text", "text": f"clicked {x}"}, image(x)]
                items.append({"type": "function_call_output", "call_id": call.call_id, "output": output})


async def white_box() -> tuple[Trace, Priced]:
    engine = Priced(T, script)
    trace = await run_agent(
        engine,
        T,
        SPEC,
        role="m",
        messages=[system(SYSTEM), user(Image(screen(7)), TASK)],
        tools=[Click()],
        limits=Limits(TURNS + 1, 20_000, 500),
        sampling=Sampling(500),
        declare_tools=True,
        trainable=True,
    )
    return trace, engine


def same(media: tuple[MediaItem, ...] | list[MediaItem], others: tuple[MediaItem, ...] | list[MediaItem]) -> bool:
    pairs = list(zip(media, others, strict=True))
    return all(a.grid_thw == b.grid_thw and np.array_equal(a.patches, b.patches) for a, b in pairs)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("agent", [chat, messages, responses])
async def test_a_screen_agent_of_any_dialect_leaves_the_tensors_of_the_white_box(
    agent: Callable[[str, bool], Awaitable[str]], stream: bool
) -> None:
    white, its_engine = await white_box()
    assert len(white.turns) == TURNS
    engine = Priced(T, script)
    async with served(engine) as (api, url):
        assert (await agent(url, stream)).strip() == "Done."
        (trace,) = await api.traces("s1")

    # What the engine was given, turn by turn, is a beginning of what is kept, and ends where its answer begins.
    assert len(engine.prompts) == TURNS
    for turn, prompt in zip(trace.turns, engine.prompts, strict=True):
        assert turn.prompt_len == len(prompt.ids)
        assert list(trace.tokens[: turn.prompt_len]) == prompt.ids
        assert trace.tokens[turn.prompt_len : turn.prompt_len + len(turn.ids)] == turn.ids
        assert same(prompt.media, trace.media[: len(prompt.media)])
    # Seven screens: the first, one a click, two clicks in the second turn. A cell of 8 x 8 pixels is one token.
    places = [7, 0, 1, 9, 2, 3, 4]
    cells = [-(-(20 + x) // 8) * -(-(30 + 3 * x) // 8) for x in places]
    assert [SPEC.tokens(item.grid_thw) for item in trace.media] == cells
    assert trace.tokens.count(T.media_pad) == sum(cells)

    assert (trace.tokens, trace.loss_mask, trace.logprobs) == (white.tokens, white.loss_mask, white.logprobs)
    assert same(trace.media, white.media)
    assert [turn.prompt_len for turn in trace.turns] == [turn.prompt_len for turn in white.turns]
    assert [turn.weight_version for turn in trace.turns] == [1, 2, 3, 4, 5, 6]
    assert [turn.calls for turn in trace.turns] == [turn.calls for turn in white.turns]
    assert (trace.status, trace.final_text, trace.broke) == ("completed", "Done.", "")
    assert [p.ids for p in engine.prompts] == [p.ids for p in its_engine.prompts]


async def test_anthropics_client_gets_its_own_errors() -> None:
    async with (
        served(Priced(T, script)) as (_, url),
        AsyncAnthropic(base_url=url, api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(anthropic.NotFoundError, match="there is no model y"):
            await client.messages.create(model="y", max_tokens=9, messages=[{"role": "user", "content": "hi"}])
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            await client.messages.create(model="m", max_tokens=0, messages=[{"role": "user", "content": "hi"}])
