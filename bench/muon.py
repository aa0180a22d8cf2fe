"""One optimiser step on nano's hidden matrices: ours (all matrices of one shape in one batch) against torch.optim.Muon.

Both orthogonalise in bfloat16 with the same five iterations; interleaved rounds, medians of milliseconds a step.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from baltoro.model.config import NANO
from baltoro.model.init import initialise
from baltoro.model.kimi import KimiK25
from baltoro.optim.muon import MuonAdamW, MuonConfig, uses_muon
from baltoro.train.machine import prepare_machine

ROUNDS = 15


def milliseconds(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    prepare_machine(torch.get_num_threads(), "auto")
    model = KimiK25(NANO, media_pad=0)
    initialise(model, torch.Generator().manual_seed(0))
    matrices = {
        f"{name}.{i}": torch.nn.Parameter(matrix.clone())
        for name, p in model.named_parameters()
        if uses_muon(name, p)
        for i, matrix in enumerate(p.detach().flatten(0, -3) if p.dim() == 3 else p.detach().flatten(1)[None])
    }
    copies = [torch.nn.Parameter(p.detach().clone()) for p in matrices.values()]
    ours = MuonAdamW(matrices.items(), MuonConfig(clip_norm=float("inf")))
    peer = torch.optim.Muon(copies, lr=1e-3, adjust_lr_fn="match_rms_adamw")

    def run_ours() -> None:
        for p in matrices.values():
            p.grad = p.detach().clone()
        ours.step(1e-3)

    def run_peer() -> None:
        for p in copies:
            p.grad = p.detach().clone()
        peer.step()

    run_ours()
    run_peer()
    times = [(milliseconds(run_ours), milliseconds(run_peer)) for _ in range(ROUNDS)]
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    record = {"ours": mine, "peer": theirs, "ratio": theirs / mine, "unit": "ms a step", "matrices": len(matrices)}
    print(json.dumps({**record, "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
