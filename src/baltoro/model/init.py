"""How parameters begin: plain random weights, and optionally the first two layers' heads wired as an induction circuit.

Looking a token up by its context (a previous-token head followed by a matching head) is what every agentic skill here
rests on, and a small model finds it only after millions of tokens of nothing. `induction_heads` writes that circuit
into the heads of the first two layers; training is free to change it. The report trains long enough to need no
such thing (deviation, `docs/fidelity.md`).
"""

import torch
from torch import Tensor

from baltoro.model.attention import MLA
from baltoro.model.kimi import KimiK25


@torch.no_grad()
def initialise(model: KimiK25, generator: torch.Generator) -> None:
    """Normal weights of `initializer_range` (vision: 1/sqrt fan-in, its position table 1), zero biases, unit norms, in
    a fixed order."""
    std = model.config.text.initializer_range
    for name, p in model.named_parameters():
        if name.startswith("language_model") and p.dim() >= 2:
            p.normal_(0, std, generator=generator)
        elif "pos_emb" in name:
            p.normal_(0, 1, generator=generator)
        elif p.dim() >= 2:
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            p.zero_()


# Logits of the wired heads, and the sizes of what they write beside a token's embedding (whose norm is 1).
_POSITION_LOGIT = 10.0
_MATCH_LOGIT = 14.0
_SLOT_SIZE = 2.0
_OUT_SIZE = 3.0
_BRANCH_SCALE = 0.01
_ROPE_PAIRS = 6
_OFFSET = 0.7
_CONTEXT = 4


@torch.no_grad()
def induction_heads(model: KimiK25, generator: torch.Generator) -> None:
    """Wire the circuit into a model fresh from `initialise`.

    The residual stream is divided: half holds the token, one direction is the same everywhere, the rest is _CONTEXT
    slots. Layer 0, head o: attend to the place o + 1 back (through rope alone, from the constant direction) and write
    a code of its token into slot o. Layer 1, head n: attend to places behind the same n + 1 tokens as the last ones
    here, and write the token of that place, which lm_head (begun as a copy of the embedding) predicts. The longer
    match is the rarer and the surer one. Needs q_lora_rank None, v_head_dim = qk_nope_head_dim >= hidden_size / 4 and
    kv_lora_rank >= hidden_size.
    """
    text = model.config.text
    dim, nope = text.hidden_size, text.qk_nope_head_dim
    if text.q_lora_rank is not None or text.kv_lora_rank < dim or text.v_head_dim != nope or 4 * nope < dim:
        raise ValueError(
            "induction_heads needs q_lora_rank none, kv_lora_rank >= hidden_size and "
            "v_head_dim = qk_nope_head_dim >= hidden_size / 4"
        )
    for name, p in model.language_model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            p.mul_(_BRANCH_SCALE)
    half = dim // 2
    code = (half - 1) // _CONTEXT
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0].T
    token, constant, slots = basis[:half], basis[half], basis[half + 1 :][: _CONTEXT * code].view(_CONTEXT, code, dim)

    embedding = model.language_model.model.embed_tokens.weight
    embedding.copy_(embedding @ token.T @ token)
    embedding.div_(embedding.norm(dim=-1, keepdim=True))
    model.language_model.lm_head.weight.copy_(embedding)
    embedding += constant * _OFFSET
    first, second = [module for module in model.modules() if isinstance(module, MLA)][:2]

    # A normed input has norm sqrt(dim); its token and constant components follow from the sizes above.
    unit = dim**0.5 / (1 + _OFFSET**2) ** 0.5
    kv_a, kv_b, q, out = _views(first)
    kv_a.zero_()
    kv_a[:code] = token[:code]
    for h in range(_CONTEXT):
        q[h] = 0
        kv_b[h] = 0
        kv_b[h, nope : nope + code, :code] = torch.eye(code)
        out[:, h] = 0
        # The latent norm leaves a vector of norm sqrt(kv_lora_rank).
        out[:, h, :code] = slots[h].T * (_SLOT_SIZE / _CONTEXT**0.5 / text.kv_lora_rank**0.5)
    strength = (_POSITION_LOGIT / first.scale) ** 0.5 / (unit * _OFFSET)
    for pair, frequency in enumerate(model.language_model.model.inv_freq[:_ROPE_PAIRS].tolist()):
        kv_a[text.kv_lora_rank + 2 * pair] = constant * strength
        for h in range(_CONTEXT):
            angle = torch.tensor((h + 1) * frequency)
            q[h, nope + 2 * pair] = constant * strength * angle.cos()
            q[h, nope + 2 * pair + 1] = -constant * strength * angle.sin()

    unit = dim**0.5 / (1 + _OFFSET**2 + _SLOT_SIZE**2) ** 0.5
    kv_a, kv_b, q, out = _views(second)
    kv_a[: _CONTEXT * code] = slots.flatten(0, 1)
    kv_a[_CONTEXT * code :] *= _BRANCH_SCALE
    kv_a[half : 2 * half] = token
    # Norms, behind the latent norm, of one slot and of the token.
    latent = text.kv_lora_rank**0.5 / (1 + _SLOT_SIZE**2) ** 0.5
    slot = _SLOT_SIZE / _CONTEXT**0.5
    for n in range(_CONTEXT):
        q[n] = 0
        kv_b[n] = 0
        out[:, n] = 0
        width = min(code, nope // (n + 1))
        for part in range(n + 1):
            place = slice(part * width, (part + 1) * width)
            seen = slots[part - 1] if part else token[:code] * (slot * (half / code) ** 0.5)
            gain = (_MATCH_LOGIT / second.scale * code / width) ** 0.5
            q[n, place] = seen[:width] * (gain / (unit * slot))
            kv_b[n, place, part * code : part * code + width] = torch.eye(width) * (gain / (latent * slot))
        shown = torch.arange(nope) + n * (half - nope) // max(_CONTEXT - 1, 1)
        kv_b[n, nope + torch.arange(nope), half + shown] = 1
        out[:, n] = token[shown].T * (_OUT_SIZE / latent * (half / nope) ** 0.5)


def _views(attn: MLA) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writable views: kv_a [R + rope, dim], kv_b [H, nope + v, R], q [H, nope + rope, dim], out [dim, H, v]."""
    c = attn.config
    return (
        attn.kv_a_proj_with_mqa.weight,
        attn.kv_b_proj.weight.view(c.num_heads, -1, c.kv_lora_rank),
        attn.q_proj.weight.view(c.num_heads, -1, c.hidden_size),
        attn.o_proj.weight.view(c.hidden_size, c.num_heads, -1),
    )
