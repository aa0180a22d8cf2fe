"""Drawing one token for each of many requests, each by its own temperature, top_p and random number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from baltoro.agent.engine import Sampling


def draw(
    logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float], never: int
) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities at temperature 1.

    logits float [requests, vocabulary]; the column of the token `never`, which is not drawn, is overwritten. uniforms:
    a random number in [0, 1) per request, not looked at where the temperature is 0.
    """
    norm = logits.logsumexp(-1)
    logits[:, never] = float("-inf")
    chosen = logits.argmax(-1)
    warm = [i for i, s in enumerate(samplings) if s.temperature > 0]
    if warm:
        columns = [(samplings[i].temperature, samplings[i].top_p, uniforms[i]) for i in warm]
        temperature, top_p, uniform = torch.tensor(columns, dtype=torch.float64, device=logits.device).T[..., None]
        rows = torch.tensor(warm, device=logits.device)
        probabilities = (logits[rows] / temperature.to(logits.dtype)).softmax(-1).double()
        cut = [j for j, i in enumerate(warm) if samplings[i].top_p < 1]
        if cut:
            probabilities[cut] = _nucleus(probabilities[cut], top_p[cut])
        chosen[rows] = _inverse_cdf(probabilities, uniform)
    logprobs = logits.gather(-1, chosen[:, None])[:, 0] - norm
    return chosen.tolist(), logprobs.tolist()


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The smallest set of the likeliest tokens that has the mass top_p [rows, 1]; the others become 0."""
    ordered, order = probabilities.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(probabilities).scatter(-1, order, ordered)


def _inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token of each row at which the running sum passes uniform [rows, 1] of the whole."""
    running = probabilities.cumsum(-1)
    token = torch.searchsorted(running, uniform * running[:, -1:], right=True)[:, 0]
    return token.clamp(max=probabilities.shape[-1] - 1)
