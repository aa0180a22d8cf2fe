"""Recorded episodes for other trainers: JSON lines, one for each agent that may be trained on and has a reward, with
exactly the tokens that the engine read and drew. What stands before the first sampled token is the prompt.

trl: columns as a `rollout_func` of TRL's GRPOTrainer returns them (prompt_ids, completion_ids, logprobs, env_mask). The
others are handed to its reward functions, so that `def given(reward, **_): return reward` is one. It takes a fixed
number of consecutive lines for one group.

slime: `Sample.to_dict()` without what stays at its default. `torch.save({"rollout_id": 0, "samples": lines}, file)`
makes what `--load-debug-rollout-data` reads. The agents of one episode share a rollout_id, so that they count once.

Pixels do not cross: TRL's rollout_func has no place for them, slime holds tensors of a processor of its own. Agents
that saw media are left out, since their tokens alone would be another prompt.
"""

import json
from pathlib import Path
from typing import Literal

from baltoro.agent.trace import Status, Trace
from baltoro.rollout.record import Json, Recording, agents, replacing

Form = Literal["slime", "trl"]

# Cut and overflowed are one to slime.
_STATUS: dict[Status, str] = {
    "completed": "completed",
    "limit": "truncated",
    "overflow": "truncated",
    "failed": "failed",
}


def write_export(recording: Recording, target: Path, form: Form) -> tuple[int, int]:
    """The number of lines, and of agents that were left out for their media. Whole or not at all; OSError where the
    disk does not take it."""
    groups: dict[tuple[str, str], int] = {}
    lines = left_out = 0
    with replacing(target) as scratch, scratch.open("w", encoding="utf-8") as file:
        for episode, record in enumerate(recording.records):
            group = groups.setdefault((record.env, record.group), len(groups))
            for place, trace in agents(record.trace):
                if not trace.trainable or record.reward is None or not any(trace.loss_mask):
                    continue
                if trace.media:
                    left_out += 1
                    continue
                about: Json = {"env": record.env, "version": record.version, "group": record.group}
                about |= {"seed": record.seed, "episode": episode, "agent": place, "role": trace.role}
                begin = trace.loss_mask.index(1)
                if form == "trl":
                    row = _trl(trace, begin) | {"reward": record.reward} | about
                else:
                    prompt, response = (
                        recording.tokenizer.decode(ids) for ids in (trace.tokens[:begin], trace.tokens[begin:])
                    )
                    row = _slime(trace, begin) | {"reward": record.reward, "metadata": about}
                    row |= {"group_index": group, "index": lines, "rollout_id": episode}
                    row |= {"prompt": prompt, "response": response}
                file.write(json.dumps(row) + "\n")
                lines += 1
    return lines, left_out


def _trl(trace: Trace, begin: int) -> Json:
    return {
        "prompt_ids": trace.tokens[:begin],
        "completion_ids": trace.tokens[begin:],
        "logprobs": trace.logprobs[begin:],
        "env_mask": trace.loss_mask[begin:],
        "weight_versions": [turn.weight_version for turn in trace.turns],
    }


def _slime(trace: Trace, begin: int) -> Json:
    return {
        "tokens": trace.tokens,
        "response_length": len(trace.tokens) - begin,
        "loss_mask": trace.loss_mask[begin:],
        "rollout_log_probs": trace.logprobs[begin:],
        "weight_versions": [str(turn.weight_version) for turn in trace.turns],
        "status": _STATUS[trace.status],
    }
