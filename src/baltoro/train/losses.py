"""Losses of the descending stages."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from baltoro.model.kimi import KimiK25
from baltoro.model.layers import wide
from baltoro.train.packing import TrainingBatch

# Rows of logits that exist at one time: 1,024 x 163,840 in float32 are 0.7 GB, where a sequence's would be 20 and more.
_ROWS = 1024


def next_token_loss(model: KimiK25, batch: TrainingBatch) -> Tensor:
    """Mean cross-entropy over the marked tokens; only their logits are computed. For captions this is L_caption."""
    hidden = model(batch.batch).index_select(0, batch.sources)
    return head_cross_entropy(hidden, model.language_model.lm_head.weight, batch.targets)


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of hidden [M, dim] through the output head weight [vocab, dim] against targets int64 [M],
    without ever holding the logits of more than _ROWS rows."""
    loss: Tensor = _HeadCrossEntropy.apply(hidden, weight, targets)  # pyright: ignore[reportAssignmentType]
    return loss


def head_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [M], in the wide dtype, of targets int64 [M] given hidden [M, dim] through the output head
    weight [vocab, dim]. The logits of a block of _ROWS rows are computed again in the backward pass, never all held."""

    def block(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = (rows @ weight.to(rows.dtype).T).to(wide(rows.dtype))
        return logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]

    blocks = zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
    return torch.cat([checkpoint(block, rows, wanted, use_reentrant=False) for rows, wanted in blocks])


class _HeadCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, while the logits of a block exist, and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        head = weight.to(hidden.dtype)
        trained = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for begin in range(0, len(hidden), _ROWS):
            rows, wanted = hidden[begin : begin + _ROWS], targets[begin : begin + _ROWS, None]
            logprobs = (rows @ head.T).to(total.dtype).log_softmax(-1)
            total -= logprobs.gather(-1, wanted).sum()
            if trained:
                slope = logprobs.exp_().scatter_add_(-1, wanted, -torch.ones_like(wanted, dtype=total.dtype))
                slope = slope.div_(len(hidden)).to(hidden.dtype)
                torch.mm(slope, head, out=hidden_grad[begin : begin + _ROWS])
                weight_grad += slope.T @ rows
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total / len(hidden)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * gradients[0].to(hidden_grad.dtype), weight_grad * gradients[0].to(weight_grad.dtype), None


def siglip_loss(images: Tensor, texts: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343), L_siglip of section 4.3. images, texts [n, dim], row i of both
    belong together; logits are temperature * cosine + bias. Mean over the n images."""
    logits = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * temperature + bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)
