"""Losses of the descending stages."""

import torch
import torch.nn.functional as F
from torch import Tensor

from baltoro.model.kimi import KimiK25
from baltoro.train.packing import TrainingBatch


def next_token_loss(model: KimiK25, batch: TrainingBatch) -> Tensor:
    """Mean cross-entropy over the marked tokens; only their logits are computed. For captions this is L_caption."""
    hidden = model(batch.batch)
    return F.cross_entropy(model.logits(hidden.index_select(0, batch.sources)).float(), batch.targets)


def siglip_loss(images: Tensor, texts: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343), L_siglip of section 4.3. images, texts [n, dim], row i of both
    belong together; logits are temperature * cosine + bias. Mean over the n images."""
    logits = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * temperature + bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)
