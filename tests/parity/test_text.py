"""The language model against transformers' `deepseek_v3`, which is run document by document."""

import dataclasses
from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from baltoro.model.attention import MLA, Segments
from baltoro.model.config import TextConfig, Yarn
from baltoro.model.decoder import CausalLM

from . import oracle
from .oracle import DTYPES, TOLERANCE

# Documents reach three times past the context before YaRN; its ramp covers part of the eight frequencies.
YARN = Yarn(factor=8.0, original_max_position=16, beta_fast=2.0, beta_slow=0.25)
CONFIG = TextConfig(
    vocab_size=50,
    hidden_size=24,
    num_layers=3,
    num_heads=3,
    q_lora_rank=20,
    kv_lora_rank=18,
    qk_nope_head_dim=10,
    qk_rope_head_dim=16,
    v_head_dim=14,
    intermediate_size=40,
    first_k_dense=1,
    n_routed_experts=7,
    num_experts_per_tok=3,
    n_shared_experts=2,
    moe_intermediate_size=12,
    routed_scaling_factor=2.827,
    rope_theta=500.0,
    yarn=YARN,
)
LENGTHS = [5, 1, 48, 9, 5]


def _compare(config: TextConfig, lengths: list[int], dtype: torch.dtype, seed: int) -> None:
    """Logits, and gradients of a random linear function of them, for packed documents."""
    ours = CausalLM(config).to(dtype).train()
    oracle.randomise(ours, seed)
    theirs = oracle.text_oracle(ours, config, dtype)
    our_routes, their_routes = oracle.Routes(ours), oracle.Routes(theirs)
    generator = torch.Generator().manual_seed(seed + 1)
    total = sum(lengths)
    ids = torch.randint(config.vocab_size, (total,), generator=generator)
    cotangent = torch.randn(total, config.vocab_size, dtype=dtype, generator=generator)

    our_inputs = ours.model.embed_tokens(ids)
    our_inputs.retain_grad()
    our_logits = ours.lm_head(ours.model(our_inputs, Segments(lengths)))
    (our_logits * cotangent).sum().backward()
    with oracle.precision(dtype):
        their_inputs = theirs.get_input_embeddings()(ids)
        their_inputs.retain_grad()
        documents = [theirs(inputs_embeds=x[None], use_cache=False).logits[0] for x in their_inputs.split(lengths)]
        their_logits = torch.cat(documents)
        (their_logits * cotangent).sum().backward()

    for mine, yours in zip(our_routes, their_routes, strict=True):
        assert torch.equal(mine, yours)
    got = {"logits": our_logits, "inputs": our_inputs.grad, **oracle.to_oracle(oracle.gradients(ours))}
    want = {"logits": their_logits, "inputs": their_inputs.grad, **oracle.gradients(theirs)}
    oracle.assert_equal(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("yarn", [YARN, None])
@pytest.mark.parametrize("q_lora_rank", [20, None])
def test_packed_documents(q_lora_rank: int | None, yarn: Yarn | None, dtype: torch.dtype) -> None:
    _compare(dataclasses.replace(CONFIG, q_lora_rank=q_lora_rank, yarn=yarn), LENGTHS, dtype, seed=0)


@st.composite
def _configs(draw: st.DrawFn) -> TextConfig:
    """Large enough that no gradient is nought by construction, as a sole expert's router or a norm of width 1 has."""
    experts = draw(st.integers(3, 9))
    rope_dim = 2 * draw(st.integers(1, 9))
    context = draw(st.integers(4, 40))
    yarn = Yarn(
        factor=float(draw(st.integers(2, 70))),
        original_max_position=context,
        beta_fast=draw(st.floats(1, 32)),
        beta_slow=draw(st.floats(0.1, 1)),
    )
    return TextConfig(
        vocab_size=draw(st.integers(4, 60)),
        hidden_size=draw(st.integers(4, 33)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=draw(st.integers(1, 5)),
        q_lora_rank=draw(st.none() | st.integers(4, 20)),
        kv_lora_rank=draw(st.integers(4, 20)),
        qk_nope_head_dim=draw(st.integers(4, 12)),
        qk_rope_head_dim=rope_dim,
        v_head_dim=draw(st.integers(4, 12)),
        intermediate_size=draw(st.integers(4, 30)),
        first_k_dense=draw(st.integers(0, 3)),
        n_routed_experts=experts,
        num_experts_per_tok=draw(st.integers(2, experts)),
        n_shared_experts=draw(st.integers(1, 3)),
        moe_intermediate_size=draw(st.integers(4, 12)),
        routed_scaling_factor=draw(st.floats(0.5, 3)),
        rope_theta=draw(st.sampled_from([100.0, 10000.0, 50000.0, 800000.0])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        yarn=draw(st.sampled_from([None, yarn])),
    )


@settings(max_examples=60)
@given(config=_configs(), lengths=st.lists(st.integers(1, 40), max_size=5), seed=st.integers(0, 2**16))
def test_any_configuration(config: TextConfig, lengths: list[int], seed: int) -> None:
    _compare(config, [*lengths, 12], torch.float64, seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_logit_of_qk_clip(dtype: torch.dtype) -> None:
    """S_h (report, MuonClip) is the largest visible logit that the oracle's attention sees, YaRN's scale included."""
    ours = CausalLM(CONFIG).to(dtype).train()
    oracle.randomise(ours, 2)
    theirs = oracle.text_oracle(ours, CONFIG, dtype)
    largest: dict[nn.Module, list[Tensor]] = defaultdict(list)

    def record(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        logits = (q @ k.mT * scaling)[0]
        hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
        largest[module].append(logits.masked_fill(hidden, -torch.inf).amax((1, 2)))
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)

    AttentionInterface.register("recording", record)
    AttentionMaskInterface.register("recording", sdpa_mask)
    theirs.set_attn_implementation("recording")
    ids = torch.randint(CONFIG.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours.model(ours.model.embed_tokens(ids), Segments(LENGTHS))
        with oracle.precision(dtype):
            for document in ids.split(LENGTHS):
                theirs(document[None], use_cache=False)
    got = {str(i): m.max_logits for i, m in enumerate(m for m in ours.modules() if isinstance(m, MLA))}
    want = {str(i): torch.stack(documents).amax(0) for i, documents in enumerate(largest.values())}
    oracle.assert_equal(got, want, TOLERANCE[dtype])
