"""Forward and backward of the language model on documents of mixed length: ours, packed, against transformers'
DeepseekV3ForCausalLM on equal weights, tokens and losses.

The peer gets the best of three forms that it offers (one padded batch, accumulated batches of documents of like length,
one packed sequence) and of its two implementations of experts, chosen by a first round. Then rounds alternate; medians.
float32 on a CPU, bfloat16 on CUDA.
"""

import dataclasses
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import transformers
from peers.deepseek_v3 import deepseek_v3
from torch import Tensor

from baltoro.chat.messages import TokenSequence
from baltoro.model.config import NANO, TextConfig
from baltoro.model.init import initialise
from baltoro.model.kimi import KimiK25, count_parameters
from baltoro.train.losses import next_token_loss
from baltoro.train.machine import prepare_machine
from baltoro.train.packing import pack

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
# The norms inside the peer's attention know no other epsilon.
EPSILON = 1e-6
MID = dataclasses.replace(
    NANO.text,
    vocab_size=16384,
    hidden_size=512,
    num_layers=10,
    num_heads=8,
    kv_lora_rank=192,
    qk_nope_head_dim=64,
    v_head_dim=64,
    intermediate_size=1536,
    n_routed_experts=16,
    moe_intermediate_size=256,
    initializer_range=0.04,
)
LARGE = dataclasses.replace(
    MID,
    vocab_size=65536,
    hidden_size=1536,
    num_layers=12,
    num_heads=16,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=6144,
    moe_intermediate_size=768,
    initializer_range=0.02,
)
# Model, tokens of a step, rounds.
SIZES = {"1B": (LARGE, 32768, 10)} if CUDA else {"nano": (NANO.text, 6144, 9), "100M": (MID, 2560, 3)}


def documents(tokens: int, vocabulary: int) -> list[list[int]]:
    """Lengths as nano's pre-training has them: half below 90 tokens, the longest of 48 about 700."""
    rng = random.Random(0)
    out: list[list[int]] = []
    while (left := tokens - sum(map(len, out))) > 1:
        length = min(max(round(rng.lognormvariate(4.5, 0.75)), 28), left)
        out.append([rng.randrange(vocabulary) for _ in range(length)])
    return out


Forms = dict[str, list[dict[str, Tensor]]]


def forms(texts: list[list[int]]) -> Forms:
    """The peer's inputs: each form is a list of batches whose gradients are accumulated. Padding stands at the right,
    where causal attention needs no mask for it, and has no label."""
    like: list[list[list[int]]] = []
    for text in sorted(texts, key=len):
        if not like or len(text) > 1.3 * len(like[-1][0]) + 16:
            like.append([])
        like[-1].append(text)
    joined = torch.tensor([[i for text in texts for i in text]])
    positions = torch.tensor([[p for text in texts for p in range(len(text))]])
    packed = {"input_ids": joined, "labels": joined.masked_fill(positions == 0, -100), "position_ids": positions}
    return {
        "padded": [_padded(texts)],
        "padded by length": [_padded(batch) for batch in like],
        "packed": [{name: x.to(DEVICE) for name, x in packed.items()}],
    }


def _padded(texts: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    labels = torch.tensor([text + [-100] * (width - len(text)) for text in texts])
    return {"input_ids": ids.to(DEVICE), "labels": labels.to(DEVICE)}


def seconds(step: Callable[[], float]) -> tuple[float, float]:
    if CUDA:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    loss = step()  # reading the loss waits for the device, but not for the gradients
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, loss


def matmul_rate() -> float:
    """FLOP/s of a large matrix product in the compute dtype."""
    n = 8192 if CUDA else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: float((a @ b)[0, 0]))[0] for _ in range(5))


def useful_flops(model: KimiK25, texts: list[list[int]]) -> float:
    """Of one step: 6 per token and active weight of a product, and causal attention without its hidden half."""
    c = model.config.text
    towers = sum(p.numel() for m in (model.vision_tower, model.mm_projector) for p in m.parameters())
    active = count_parameters(model)[1] - towers - c.vocab_size * c.hidden_size
    pairs = sum(len(text) * (len(text) + 1) / 2 for text in texts)
    attention = 6 * pairs * c.num_layers * c.num_heads * (c.qk_head_dim + c.v_head_dim)
    return 6 * active * sum(map(len, texts)) + attention


def compare(name: str, text: TextConfig, tokens: int, rounds: int) -> dict[str, object]:
    model = KimiK25(dataclasses.replace(NANO, text=dataclasses.replace(text, rms_norm_eps=EPSILON)), 0, DTYPE)
    initialise(model, torch.Generator().manual_seed(0))
    model.to(DEVICE).train()
    peer = deepseek_v3(model, use_cache=False).to(DEVICE, DTYPE).train()
    texts = documents(tokens, text.vocab_size)
    batch = pack([TokenSequence(ids, [], [1] * len(ids)) for ids in texts], NANO.vision.patch_size, DEVICE)
    # The picture of a document that has none must not be looked for where an id happens to be the placeholder's.
    model.media_pad = -1
    predicted = len(batch.targets)

    def ours() -> float:
        model.zero_grad()
        loss = next_token_loss(model, batch)
        loss.backward()
        return loss.item()

    def theirs(batches: list[dict[str, Tensor]]) -> float:
        peer.zero_grad()
        total = 0.0
        for inputs in batches:
            loss = peer(**inputs, num_items_in_batch=predicted).loss
            loss.backward()
            total += loss.item()
        return total

    def timed(deterministic: bool, step: Callable[[], float]) -> tuple[float, float]:
        # Ours trains deterministically; the peer need not.
        torch.use_deterministic_algorithms(deterministic)
        return seconds(step)

    first: dict[tuple[str, str], float] = {}
    offered = forms(texts)
    for experts in ("grouped_mm", "eager"):
        peer.set_experts_implementation(experts)
        for form, batches in offered.items():
            timed(False, lambda batches=batches: theirs(batches[:1]))
            first[experts, form] = timed(False, lambda batches=batches: theirs(batches))[0]
    experts, form = min(first, key=first.__getitem__)
    peer.set_experts_implementation(experts)
    timed(True, ours)
    pairs = [(timed(True, ours), timed(False, lambda: theirs(offered[form]))) for _ in range(rounds)]
    (_, loss), (_, other) = pairs[-1]
    assert abs(loss - other) < (2e-2 if CUDA else 1e-4) * loss, f"losses differ: {loss} and {other}"
    mine, best = (statistics.median(run[i][0] for run in pairs) for i in (0, 1))
    rate = matmul_rate()
    print(f"{name}: peer's first steps in s:", {" ".join(key): round(value, 3) for key, value in first.items()})
    return {
        "ours": round(tokens / mine),
        "peer": round(tokens / best),
        "ratio": round(best / mine, 2),
        "peer_form": f"{form}, {experts}",
        "losses": (loss, other),
        "share_of_matmul_rate": round(useful_flops(model, texts) / mine / rate, 2),
        "gflops_matmul": round(rate / 1e9),
        "parameters_M": round(sum(p.numel() for p in model.language_model.parameters()) / 1e6, 1),
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    prepare_machine(torch.get_num_threads(), "float32")
    results: dict[str, dict[str, object]] = {}
    for name, (text, tokens, rounds) in SIZES.items():
        results[name] = compare(name, text, tokens, rounds)
        print(f"{name}: {results[name]}", flush=True)
    worst = min(results.values(), key=lambda r: float(str(r["ratio"])))
    record = {key: worst[key] for key in ("ours", "peer", "ratio")} | {"unit": "tokens/s forward and backward"}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    threads, device = torch.get_num_threads(), torch.cuda.get_device_name() if CUDA else "cpu"
    print(json.dumps({**record, **results, "threads": threads, "device": device, **versions}))


if __name__ == "__main__":
    main()
