import random
import re

import pytest

from baltoro.agent.scripted import Script, completion_text
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.swarm.demonstrations import Demonstrator
from baltoro.world.entities import World


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Knows the words of code on pictures well enough for a program to fit a turn."""
    rng, expert = random.Random(0), Demonstrator(World(0, "train", per_kind=2))
    dialogues = [expert.pixels(rng) for _ in range(20)]
    texts = [message.text for dialogue in dialogues for message in dialogue]
    texts += [call.arguments for dialogue in dialogues for message in dialogue for call in message.tool_calls]
    return Tokenizer.train(texts, 640)


@pytest.fixture(scope="session")
def media_spec() -> MediaSpec:
    """That of configs/nano.toml."""
    half = (0.5, 0.5, 0.5)
    return MediaSpec(
        patch_size=8,
        merge=2,
        patch_limit=256,
        side_limit=64,
        mean=half,
        std=half,
        frames_per_chunk=4,
        sample_fps=4.0,
    )


@pytest.fixture(scope="session")
def swarm_script() -> Script:
    """Agents without a flaw that know only what they see. The orchestrator assigns every row in one turn; the single
    agent works through the rows and answers with what it has when it is told to."""
    return _perfect


def _returns(prompt: str) -> list[str]:
    return re.findall(r"## Return of [^\n]*\n(.*?)<\|im_end\|>", prompt, re.DOTALL)


def _row(page: str, columns: list[str]) -> str:
    name, *facts = page.split("\n")
    values = dict(fact.removeprefix("|").split("=", 1) for fact in facts)
    return "|".join([name, *(f"{column}={values[column]}" for column in columns)])


def _perfect(prompt: str, role: str) -> str:
    step = prompt.count("<|im_assistant|>") - 1
    first, *lines = prompt.split("<|im_user|>user<|im_middle|>")[1].split("<|im_end|>")[0].split("\n")
    name, *columns = first.split("|")
    names = [name] if role == "subagent" else [line[1:].split("|")[0] for line in lines]  # between a label and a count
    found = _returns(prompt)
    if role == "orchestrator":
        if step == 0:
            create: dict[str, object] = {"name": "r", "system_prompt": "Fill in the row."}
            return completion_text(calls=[("create_subagent", create)])
        if step == 1:
            rows = ["|".join([name, *columns]) for name in names]
            return completion_text(calls=[("assign_task", {"agent": "r", "prompt": row}) for row in rows])
        return completion_text("\n".join(found[1:]))
    pages = found[1::2]
    if len(pages) == len(names) or "<|im_middle|>Answer now.<|im_end|>" in prompt:
        return completion_text("\n".join(_row(page, columns) for page in pages))
    name = names[step // 2]
    if step % 2 == 0:
        return completion_text(calls=[("search", {"query": name})])
    return completion_text(calls=[("open", {"url": name if name in found[-1].split("\n") else "absent"})])
