"""How parameters begin: plain random weights, and optionally the first two layers' heads wired as an induction circuit
and the patch embedding as a whitening.

Looking a token up by its context (a previous-token head followed by a matching head) is what every agentic skill here
rests on, and a small model finds it only after millions of tokens of nothing. `induction_heads` writes that circuit
into the heads of the first two layers; training is free to change it. The report trains long enough to need no
such thing, and its tower begins from SigLIP's (deviations, `docs/fidelity.md`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from baltoro.model.attention import MLA
from baltoro.model.kimi import KimiK25
from baltoro.model.vit import VisionTower


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


_LEAST_VARIANCE = 1e-3
"""Added to the variances of whitened directions, in units of normalised pixels; what varies less counts as noise."""


@torch.no_grad()
def whiten_patches(tower: VisionTower, patches: Tensor, generator: torch.Generator) -> None:
    """Begin the patch embedding as a whitening of patches [n, 3, p, p] like those to come, turned at random: its
    channels have unit variance over them and are uncorrelated, as far as the width is not above 3 p^2; a wider tower
    holds the 3 p^2 directions turned into its width, with unit variance on average. Nearly all variance of plain
    pictures is the mean colour of a patch, and edges, which tell shapes apart, would begin a hundred times fainter."""
    proj = tower.patch_embed.proj
    pixels = patches.flatten(1).double()
    variance, directions = torch.linalg.eigh(torch.cov(pixels.T))
    width = len(proj.weight)
    sphere = (directions / (variance.clamp(min=0) + _LEAST_VARIANCE).sqrt())[:, -width:]
    kept = sphere.shape[1]
    turn = torch.linalg.qr(torch.randn(width, kept, dtype=torch.float64, generator=generator))[0]
    weight = turn @ sphere.T * (width / kept) ** 0.5
    assert proj.bias is not None
    proj.weight.copy_(weight.view_as(proj.weight))
    proj.bias.copy_(-weight @ pixels.mean(0))


# Logits of the wired heads, and the sizes of what they write beside a token's embedding (whose norm is 1).
_POSITION_LOGIT = 10.0
_MATCH_LOGIT = 14.0
_SLOT_SIZE = 2.0
_OUT_SIZE = 3.0
_BRANCH_SCALE = 0.01
_ROPE_PAIRS = 6
_OFFSET = 0.7
_BACK = 3
_MARK_LOGIT = 40.0
_COLUMN_SIZE, _COLUMN_LOGIT = 0.5, 8.0
_SURE = 1.5
_RECENT_PAIRS, _RECENT_LOGIT = range(4, 11), 3.0


@torch.no_grad()
def induction_heads(model: KimiK25, labels: Sequence[int], columns: Sequence[int], generator: torch.Generator) -> None:
    """Wire the circuit into a model fresh from `initialise`. labels: the tokens that begin rows of lists and tables, so
    that rows that are alike for longer than the circuit looks back can be told apart. columns: the tokens that name a
    column of a row, so that behind a value, however long, the next column can be looked up.

    The residual stream is divided: half holds the token, one direction is the same everywhere, one marks labels and
    one columns, the rest is _BACK + 2 slots. Layer 0: heads attend to the places one to three back (through rope alone,
    from the constant direction), to the label and to the column seen last, wherever they stand, and each writes a code
    of the token there into its slot. Layer 1: heads attend to places behind the same one, two or three tokens: one and
    two in the same column as here, three anywhere and, the surest, under the same label; the last head to places behind
    the column seen last, columns before others. Each writes the token of its place, which lm_head (begun as a copy of
    the embedding) predicts. Three tokens, because two do not tell where in 2.0.0 one is. Needs q_lora_rank None, five
    heads or more, v_head_dim = qk_nope_head_dim >= hidden_size / 4 and kv_lora_rank >= hidden_size.
    """
    text = model.config.text
    count, label_slot, column_slot = _BACK + 2, _BACK, _BACK + 1
    dim, nope = text.hidden_size, text.qk_nope_head_dim
    narrow = text.kv_lora_rank < dim or text.v_head_dim != nope or 4 * nope < dim
    if text.q_lora_rank is not None or text.num_heads < count or narrow:
        raise ValueError(
            f"induction_heads needs q_lora_rank none, {count} heads or more, kv_lora_rank >= hidden_size and "
            "v_head_dim = qk_nope_head_dim >= hidden_size / 4"
        )
    for name, p in model.language_model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            p.mul_(_BRANCH_SCALE)
    half = dim // 2
    code = (half - 3) // count
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0].T
    token, constant, column, label = basis[:half], basis[half], basis[-2], basis[-1]
    slots = basis[half + 1 :][: count * code].view(count, code, dim)

    embedding = model.language_model.model.embed_tokens.weight
    embedding.copy_(embedding @ token.T @ token)
    embedding.div_(embedding.norm(dim=-1, keepdim=True))
    model.language_model.lm_head.weight.copy_(embedding)
    embedding += constant * _OFFSET
    embedding[torch.tensor(labels, dtype=torch.int64)] += label
    embedding[torch.tensor(columns, dtype=torch.int64)] += column * _COLUMN_SIZE
    first, second = [module for module in model.modules() if isinstance(module, MLA)][:2]

    # A normed input has norm sqrt(dim); its token and constant components follow from the sizes above.
    unit = dim**0.5 / (1 + _OFFSET**2) ** 0.5
    kv_a, kv_b, q, out = _views(first)
    rope = kv_a[text.kv_lora_rank :]
    kv_a.zero_()
    kv_a[:code] = token[:code]
    kv_a[code] = label * (3 * (code / half) ** 0.5)  # thrice a label's code: so all labels have nearly one norm
    frequencies = model.language_model.model.inv_freq.tolist()
    strength = (_POSITION_LOGIT / first.scale) ** 0.5 / (unit * _OFFSET)
    for pair in range(_RECENT_PAIRS.stop):
        rope[2 * pair] = constant * strength
    rope[-2] = column * strength  # the slowest turn: it hardly falls off with distance
    for h in range(count):
        q[h] = 0
        kv_b[h] = 0
        kv_b[h, nope : nope + code, :code] = torch.eye(code)
        out[:, h] = 0
        # The latent norm leaves a vector of norm sqrt(kv_lora_rank).
        out[:, h, :code] = slots[h].T * (_SLOT_SIZE / count**0.5 / text.kv_lora_rank**0.5)
    for h in range(_BACK):
        for pair in range(_ROPE_PAIRS):
            angle = torch.tensor((h + 1) * frequencies[pair])
            q[h, nope + 2 * pair] = constant * strength * angle.cos()
            q[h, nope + 2 * pair + 1] = -constant * strength * angle.sin()
    # Labels, or columns, before everything else, and of these the nearest, by slow turns that fall off with distance.
    out[:, label_slot] *= 10**0.5
    kv_b[label_slot, 0, code] = 1
    q[label_slot, 0] = constant * (_MARK_LOGIT / first.scale / (0.9 * text.kv_lora_rank) ** 0.5 / (unit * _OFFSET))
    q[column_slot, -2] = constant * (strength * _MARK_LOGIT / _POSITION_LOGIT * _OFFSET / _COLUMN_SIZE)
    for pair in _RECENT_PAIRS:
        q[_BACK:count, nope + 2 * pair] = constant * strength * (_RECENT_LOGIT / _POSITION_LOGIT)

    unit = dim**0.5 / (1 + _OFFSET**2 + _SLOT_SIZE**2) ** 0.5
    kv_a, kv_b, q, out = _views(second)
    kv_a[: count * code] = slots.flatten(0, 1)
    kv_a[count * code :] *= _BRANCH_SCALE
    kv_a[count * code] = column
    kv_a[half : 2 * half] = token
    # Norms, behind the latent norm, of one slot and of the token.
    latent = text.kv_lora_rank**0.5 / (1 + _SLOT_SIZE**2) ** 0.5
    slot = _SLOT_SIZE / count**0.5
    # What the slots of the next place hold, as this place sees it.
    one, two, three = (0, token[:code] * (slot * (half / code) ** 0.5)), (1, slots[0]), (2, slots[1])
    same_label, same_column = (label_slot, slots[label_slot]), (column_slot, slots[column_slot])
    matches = (
        (one, same_column),
        (one, two, three),
        (one, two, same_column),
        (one, two, three, same_label),
        ((0, slots[column_slot]),),
    )
    for n, match in enumerate(matches):
        q[n] = 0
        kv_b[n] = 0
        out[:, n] = 0
        width = min(code, nope // len(match))
        gain = (_MATCH_LOGIT / second.scale * code / width) ** 0.5
        for part, (source, sought) in enumerate(match):
            place = slice(part * width, (part + 1) * width)
            q[n, place] = sought[:width] * (gain / (unit * slot))
            kv_b[n, place, source * code : source * code + width] = torch.eye(width) * (gain / (latent * slot))
        size = _OUT_SIZE * (_SURE if n == label_slot else 1)
        shown = torch.arange(nope) + n * (half - nope) // (count - 1)
        kv_b[n, nope + torch.arange(nope), half + shown] = 1
        out[:, n] = token[shown].T * (size / latent * (half / nope) ** 0.5)
    gain = (_COLUMN_LOGIT / second.scale) ** 0.5
    q[column_slot, nope - 1] = constant * (gain / (unit * _OFFSET))
    kv_b[column_slot, nope - 1, count * code] = gain / (latent * _COLUMN_SIZE)


def _views(attn: MLA) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writable views: kv_a [R + rope, dim], kv_b [H, nope + v, R], q [H, nope + rope, dim], out [dim, H, v]."""
    c = attn.config
    return (
        attn.kv_a_proj_with_mqa.weight,
        attn.kv_b_proj.weight.view(c.num_heads, -1, c.kv_lora_rank),
        attn.q_proj.weight.view(c.num_heads, -1, c.hidden_size),
        attn.o_proj.weight.view(c.hidden_size, c.num_heads, -1),
    )
