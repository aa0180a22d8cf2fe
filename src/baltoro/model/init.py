"""How parameters begin: plain random weights, and optionally four attention heads wired as an induction circuit.

Looking a token up by its context (a previous-token head followed by a matching head) is what every agentic skill here
rests on, and a small model finds it only after millions of tokens of nothing. `induction_heads` writes that circuit
into heads 0 and 1 of the first two layers; training is free to change it. The report trains long enough to need no
such thing (deviation, `docs/fidelity.md`).
"""

import torch
from torch import Tensor

from baltoro.model.attention import MLA
from baltoro.model.kimi import KimiK25


@torch.no_grad()
def initialise(model: KimiK25, generator: torch.Generator) -> None:
    """Normal weights of `initializer_range` (vision: 1/sqrt fan-in), zero biases, unit norms, in a fixed order."""
    std = model.config.text.initializer_range
    for name, p in model.named_parameters():
        if name.startswith("language_model") and p.dim() >= 2:
            p.normal_(0, std, generator=generator)
        elif "pos_emb" in name:
            p.normal_(0, 0.02, generator=generator)
        elif p.dim() >= 2:
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            p.zero_()


# Logits of the wired heads: about +3 from a token to its neighbour, about +15 from a match to the rest. The other
# branches start small, so that they do not drown what the circuit writes to the residual stream.
_POSITION_GAIN = 5.4
_MATCH_GAIN = 3.2
_OUT_GAIN = 12.0
_BRANCH_SCALE = 0.01
_ROPE_PAIRS = 6
_OFFSET = 0.7


@torch.no_grad()
def induction_heads(model: KimiK25, generator: torch.Generator) -> None:
    """Wire the circuit into a model fresh from `initialise`.

    Layer 0, heads 0 and 1: attend to the previous position (through rope alone, from a constant direction that is
    added to all embeddings) and write a code of its token. Layer 1, heads 0 and 1: attend to positions whose previous
    token has the code of the current token, and write that position's token, which the head (begun as a copy of the
    embedding) predicts. Needs q_lora_rank None and kv_lora_rank >= 3 * qk_nope_head_dim, v_head_dim = qk_nope_head_dim.
    """
    text = model.config.text
    dim, code_dim = text.hidden_size, text.qk_nope_head_dim
    if text.q_lora_rank is not None or text.kv_lora_rank < 3 * code_dim or text.v_head_dim != code_dim:
        raise ValueError(
            "induction_heads needs q_lora_rank none, v_head_dim = qk_nope_head_dim, kv_lora_rank >= 3 of it"
        )
    for name, p in model.language_model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            p.mul_(_BRANCH_SCALE)

    embedding = model.language_model.model.embed_tokens.weight
    constant = torch.randn(dim, generator=generator)
    constant /= constant.norm()
    embedding -= torch.outer(embedding @ constant, constant)
    std = float(embedding.std())
    model.language_model.lm_head.weight.copy_(embedding)
    embedding += constant * (std * dim**0.5 * _OFFSET)
    # The component of a normed embedding along `constant`.
    seen = dim**0.5 * _OFFSET / (1 + _OFFSET**2) ** 0.5

    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0].T
    codes = [basis[h * code_dim : (h + 1) * code_dim] for h in range(2)]
    content = basis[2 * code_dim : 3 * code_dim]
    written = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0].T
    slots = [written[h * code_dim : (h + 1) * code_dim] for h in range(2)]
    eye = torch.eye(code_dim)
    first, second = [module for module in model.modules() if isinstance(module, MLA)][:2]

    kv_a, kv_b, q, out = _views(first)
    kv_a.zero_()
    for h in range(2):
        kv_a[h * code_dim : (h + 1) * code_dim] = codes[h]
        q[h] = 0
        kv_b[h] = 0
        kv_b[h, code_dim:, h * code_dim : (h + 1) * code_dim] = eye
        out[:, h] = slots[h].T * std
    direction = constant * (_POSITION_GAIN / seen)
    for pair, frequency in enumerate(model.language_model.model.inv_freq[:_ROPE_PAIRS].tolist()):
        kv_a[text.kv_lora_rank + 2 * pair] = direction
        angle = torch.tensor(frequency)
        for h in range(2):
            q[h, code_dim + 2 * pair] = direction * angle.cos()
            q[h, code_dim + 2 * pair + 1] = -direction * angle.sin()

    kv_a, kv_b, q, out = _views(second)
    kv_a[: 3 * code_dim] = torch.cat([*slots, content])
    kv_a[text.kv_lora_rank :] *= _BRANCH_SCALE
    for h in range(2):
        q[h] = 0
        q[h, :code_dim] = codes[h] * _MATCH_GAIN
        kv_b[h] = 0
        kv_b[h, :code_dim, h * code_dim : (h + 1) * code_dim] = eye * _MATCH_GAIN
        kv_b[h, code_dim:, 2 * code_dim : 3 * code_dim] = eye
        out[:, h] = content.T * (std * _OUT_GAIN)


def _views(attn: MLA) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writable views: kv_a [R + rope, dim], kv_b [H, nope + v, R], q [H, nope + rope, dim], out [dim, H, v]."""
    c = attn.config
    return (
        attn.kv_a_proj_with_mqa.weight,
        attn.kv_b_proj.weight.view(c.num_heads, -1, c.kv_lora_rank),
        attn.q_proj.weight.view(c.num_heads, -1, c.hidden_size),
        attn.o_proj.weight.view(c.hidden_size, c.num_heads, -1),
    )
