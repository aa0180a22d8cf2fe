"""The page in a real browser: what it shows, and that nothing of what agents wrote runs."""

import asyncio
import dataclasses
import html
import json
import random
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from baltoro.agent.engine import Sampling
from baltoro.agent.loop import Limits, run_agent
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.agent.tool import CallContext, ToolResult
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec, pixels_of, preprocess_image
from baltoro.chat.messages import Image, ToolSpec, system, user
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.record import Record, Recording
from baltoro.rollout.viewer import write_view

CHROMIUM = Path("/usr/bin/chromium")
PAYLOAD = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{SCRIPT}}"


class Look:
    spec = ToolSpec("look", PAYLOAD, {"type": "object", "properties": {}})
    sequential = False

    def __init__(self, children: tuple[Trace, ...] = ()) -> None:
        self.children = children

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        pixels = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        return ToolResult((PAYLOAD, Image(pixels)), self.children)


@pytest.fixture(scope="module")
def recording(tokenizer: Tokenizer, media_spec: MediaSpec) -> Recording:
    """Two groups of four; the first agent of each episode started two others; every text is hostile."""

    def run(role: str, texts: list[str], tool: Look, seed: int) -> Trace:
        trace = asyncio.run(
            run_agent(
                ScriptedEngine(tokenizer, texts), tokenizer, media_spec, role=role,
                messages=[system(PAYLOAD), user("what is the capital of Zorblax?")], tools=[tool],
                limits=Limits(9, 99_999, 400), sampling=Sampling(400, seed=seed), declare_tools=True,
                trainable=role != "subagent",
            )
        )  # fmt: skip
        rng = random.Random(seed)
        logprobs = tuple(-rng.expovariate(1.0) if mask else 0.0 for mask in trace.loss_mask)
        turns = tuple(
            dataclasses.replace(turn, logprobs=logprobs[turn.prompt_len : turn.prompt_len + len(turn.ids)])
            for turn in trace.turns
        )
        return dataclasses.replace(trace, logprobs=logprobs, turns=turns)

    records: list[Record] = []
    call = completion_text("I look.", reasoning="the page says " + PAYLOAD, calls=[("look", {})])
    for seed in range(8):
        children = tuple(run("subagent", [call, completion_text(f"Mirn {n}")], Look(), seed) for n in range(2))
        trace = run("orchestrator", [call, completion_text(PAYLOAD)], Look(children), seed)
        trace = dataclasses.replace(trace, reasons={"right": PAYLOAD}).with_signals(right=seed / 8, perf=1.0)
        drift = (tuple(value - 0.3 if value else 0.0 for value in trace.logprobs), (), (), *[()] * (seed == 0))
        later = dataclasses.replace(trace, turns=(), loss_mask=(0,) * len(trace.tokens), broke="compaction " + PAYLOAD)
        later = dataclasses.replace(later, logprobs=(0.0,) * len(trace.tokens), signals={}, reasons={})
        if seed == 0:
            last = dataclasses.replace(trace.turns[1], children=(later,))
            trace = dataclasses.replace(trace, turns=(trace.turns[0], last))
        records.append(
            Record(
                "cap<b>", "1", {"gold": PAYLOAD}, f"1/{seed // 4}", seed, trace, {"right": 1.0}, seed / 8,
                seed % 4 / 8 - 3 / 16, drift,
            )
        )  # fmt: skip
    return Recording(tokenizer, media_spec, records)


def dump(page: Path, profile: Path) -> str:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=3000"]
    command = [str(CHROMIUM), *flags, "--no-first-run", f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


def test_nothing_is_loaded_and_no_text_closes_the_data(recording: Recording, tmp_path: Path) -> None:
    write_view(recording, tmp_path / "view.html", PAYLOAD)
    page = (tmp_path / "view.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert "http:" not in page
    assert "https:" not in page
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert block
    data = json.loads(block[1])
    assert data["title"] == PAYLOAD
    assert data["findings"] == []
    assert len(data["pictures"]) == 1  # the same one, forty times
    script = page.rpartition("<script>")[2]
    assert "innerHTML" not in script
    assert "insertAdjacent" not in script


def test_the_picture_is_what_the_tower_saw(media_spec: MediaSpec) -> None:
    """Patches back to pixels: exact where nothing was shrunk, padding black."""
    pixels = np.random.default_rng(0).integers(0, 256, (14, 22, 3), dtype=np.uint8)
    spec = dataclasses.replace(media_spec, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    back = pixels_of(preprocess_image(Image(pixels), spec), spec)
    assert back.shape == (1, 16, 24, 3)
    assert np.array_equal(back[0, :14, :22], pixels)
    assert not back[0, 14:].any()
    assert not back[0, :, 22:].any()


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium")
@pytest.mark.parametrize("policy", [True, False])
def test_in_a_browser(recording: Recording, tmp_path: Path, policy: bool) -> None:
    """With and without the content security policy: the text must be harmless by itself."""
    page = tmp_path / "view.html"
    write_view(recording, page, "episodes")
    if not policy:
        text = page.read_text()
        bare = re.sub(r"<meta http-equiv[^>]*>", "", text)
        assert bare != text
        page.write_text(bare)
    dom = dump(page, tmp_path / "profile")
    assert "<title>episodes</title>" in dom
    body = dom.partition('id="episode"')[2].partition("</section>")[0]
    assert body.count("<script") == 0
    assert len(re.findall("<img ", body)) == len(re.findall('<img src="data:image/png;base64,', body)) > 0
    # Every token of the agent stands there in order, its own and those around it, pictures in place of placeholders.
    trace = recording.records[0].trace
    shown = re.findall(r'<span(?: class="([^"]*)")? title="([^"]*)">(.*?)</span>', body, re.DOTALL)
    tokenizer = recording.tokenizer
    expected = [tokenizer.decode([token]) for token in trace.tokens if token != tokenizer.media_pad]
    own = shown[: len(expected)]
    assert [html.unescape(text) for _, _, text in own] == expected
    assert sum("trained" in name.split() for name, _, _ in own) == sum(trace.loss_mask)
    assert "trainer's log-probability" in own[-1][1]
    assert "The prefix broke: compaction" in body
    assert "8 episodes · verification found nothing" in dom
    assert dom.count("<figcaption>12 media tokens</figcaption>") == 2  # of the first trace, and of what followed
