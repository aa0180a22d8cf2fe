"""Greedy decoding of many sequences at once: our engine against transformers' `generate` on DeepseekV3ForCausalLM.

Equal weights, prompts and lengths in float32; all prompts differ, so no prefix is shared. The peer decodes with the
faster of its two caches. A rate counts the tokens behind the first of each sequence; the first closes the prompt.
"""

import asyncio
import dataclasses
import json
import random
import time
import warnings
from dataclasses import dataclass

import torch
import transformers
from peers.deepseek_v3 import deepseek_v3

from baltoro.agent.engine import Sampling
from baltoro.chat.messages import TokenSequence
from baltoro.chat.tokenizer import Tokenizer
from baltoro.model.config import NANO, TextConfig
from baltoro.model.init import initialise
from baltoro.model.kimi import KimiK25
from baltoro.serve.local import LocalEngine
from baltoro.train.machine import prepare_machine

TOKENIZER = Tokenizer({bytes([b]): b for b in range(256)})
MID = dataclasses.replace(
    NANO.text,
    vocab_size=8192,
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    kv_lora_rank=192,
    qk_nope_head_dim=64,
    v_head_dim=64,
    intermediate_size=1536,
    n_routed_experts=16,
    moe_intermediate_size=256,
    initializer_range=0.04,
)


@dataclass(frozen=True)
class Size:
    model: str
    sequences: int
    prompt: int
    new: int


SIZES = [
    Size("nano", 1, 256, 65),
    Size("nano", 16, 256, 33),
    Size("nano", 128, 256, 33),
    Size("nano", 512, 64, 17),
    Size("mid", 16, 128, 17),
]


@dataclass(frozen=True)
class Timing:
    """first: seconds until every sequence has its first token; rest: seconds for all the others."""

    first: float
    rest: float
    ids: list[list[int]]


def build(text: TextConfig) -> KimiK25:
    model = KimiK25(dataclasses.replace(NANO, text=text), TOKENIZER.media_pad)
    initialise(model, torch.Generator().manual_seed(0))
    model.eval().requires_grad_(False)
    # Logits of 0 never win, so neither side stops early or has to suppress a token.
    model.language_model.lm_head.weight[[TOKENIZER.media_pad, TOKENIZER.im_end]] = 0
    return model


def run_ours(model: KimiK25, prompts: list[list[int]], new: int) -> tuple[Timing, int]:
    """Also returns the bytes of the cache per cached token."""
    slots = len(prompts)
    engine = LocalEngine({"a": model}, TOKENIZER, slots=slots, max_len=len(prompts[0]) + new, chunk=1 << 20)

    async def run() -> Timing:
        firsts: list[float] = []

        async def one(prompt: list[int]) -> list[int]:
            ids: list[int] = []
            async for sampled in engine.stream(TokenSequence(prompt), Sampling(new, temperature=0.0), "a"):
                if not ids:
                    firsts.append(time.perf_counter())
                ids.append(sampled.token)
            return ids

        async with engine.run():
            begin = time.perf_counter()
            ids = await asyncio.gather(*(one(p) for p in prompts))
            end = time.perf_counter()
        return Timing(max(firsts) - begin, end - max(firsts), ids)

    timing = asyncio.run(run())
    page = engine._lanes["a"].cache  # pyright: ignore[reportPrivateUsage]
    return timing, sum(layer[0, 0].nbytes for layer in page)


def run_peer(
    peer: transformers.DeepseekV3ForCausalLM, prompts: list[list[int]], new: int, cache: str
) -> tuple[Timing, int]:
    x = torch.tensor(prompts)
    mask = torch.ones_like(x)
    stamps: list[float] = []

    class Clock(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return scores

    begin = time.perf_counter()
    out = peer.generate(
        x,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        cache_implementation=cache,
        return_dict_in_generate=True,
        logits_processor=transformers.LogitsProcessorList([Clock()]),
    )
    end = time.perf_counter()
    layers = out.past_key_values.layers
    length = layers[0].keys.shape[2]
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // (len(prompts) * length)
    return Timing(stamps[0] - begin, end - stamps[0], out.sequences[:, x.shape[1] :].tolist()), size


def main() -> None:
    prepare_machine(torch.get_num_threads(), "float32")
    torch.use_deterministic_algorithms(False)  # the peer does without, too
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    models = {"nano": build(NANO.text), "mid": build(MID)}
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": TOKENIZER.im_end}
    peers = {name: deepseek_v3(model, **ends).eval().requires_grad_(False) for name, model in models.items()}
    ratios: dict[str, float] = {}
    record: dict[str, object] = {}
    for size in SIZES:
        rng = random.Random(0)
        model, peer = models[size.model], peers[size.model]
        prompts = [[rng.randrange(256) for _ in range(size.prompt)] for _ in range(size.sequences)]
        run_ours(model, prompts[:2], 2)
        run_peer(peer, prompts[:2], 2, "dynamic")
        mine, bytes_ours = run_ours(model, prompts, size.new)
        theirs = {cache: run_peer(peer, prompts, size.new, cache) for cache in ("dynamic", "static")}
        mine = min(mine, run_ours(model, prompts, size.new)[0], key=lambda t: t.rest)
        best, (other, bytes_peer) = min(theirs.items(), key=lambda item: item[1][0].rest)
        agree = sum(a == b for x, y in zip(mine.ids, other.ids, strict=True) for a, b in zip(x, y, strict=True))
        assert agree >= 0.99 * size.sequences * size.new, f"only {agree} equal tokens"
        work = size.sequences * (size.new - 1)
        ours, theirs_rate = work / mine.rest, work / other.rest
        whole = (other.first + other.rest) / (mine.first + mine.rest)
        print(
            f"{size.model:4} x {size.sequences:3}: {ours:8.0f} tokens/s, peer {theirs_rate:7.0f} ({best}),"
            f" ratio {ours / theirs_rate:5.2f}, with prompts {whole:5.2f};"
            f" prompts {size.sequences * size.prompt / mine.first:6.0f} tokens/s,"
            f" peer {size.sequences * size.prompt / other.first:6.0f};"
            f" cache {bytes_ours} bytes/token, peer {bytes_peer}; equal tokens {agree}/{work + size.sequences}",
            flush=True,
        )
        key = f"{size.model} {size.sequences}"
        ratios[key] = round(ours / theirs_rate, 2)
        if key == "nano 128":
            text = model.config.text
            limit = (text.kv_lora_rank + text.qk_rope_head_dim) * 4 * text.num_layers
            record = {"ours": round(ours), "peer": round(theirs_rate), "ratio": ratios[key], "with_prompts": whole}
            record |= {"unit": "tokens/s", "cache_bytes": bytes_ours, "limit_bytes": limit, "peer_bytes": bytes_peer}
    record |= {"ratios": ratios, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({**record, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
