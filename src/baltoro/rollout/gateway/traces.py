"""A session as traces: what the trainer reads of a black-box agent is what it reads of a white-box one."""

from collections.abc import Mapping, Sequence
from typing import Any

from baltoro.agent.trace import Trace, Turn
from baltoro.chat.messages import Message
from baltoro.rollout.gateway.graph import Call, Session
from baltoro.rollout.gateway.rendering import Rendering
from baltoro.rollout.gateway.said import Said, to_messages


def session_traces(
    session: Session, rendering: Rendering | None, files: Mapping[str, bytes], *, role: str, trainable: bool
) -> tuple[Trace, ...]:
    """One trace for each end of the graph, in the order of their last calls. Each answer is trained once: where traces
    share a beginning, its answers are targets in the first of them alone.

    Raises ValueError for pictures whose model is not known here (`rendering` is None)."""
    begin = session.calls[0].started if session.calls else 0.0
    trained: set[int] = set()
    traces: list[Trace] = []
    for end in session.ends():
        chain = session.chain(end.number)
        traces.append(_trace(chain, trained, rendering, files, role, trainable, begin))
        trained.update(call.number for call in chain)
    return tuple(traces)


def _trace(
    chain: Sequence[Call],
    trained: set[int],
    rendering: Rendering | None,
    files: Mapping[str, bytes],
    role: str,
    trainable: bool,
    begin: float,
) -> Trace:
    tokens = [token for call in chain for ids in (call.prompt.ids, call.ids) for token in ids]
    shown = [one for call in chain for one in call.prompt.said]
    if rendering is None and any(one.media for one in shown):
        raise ValueError("the session has pictures; give the gateway the tokenizer and the media of its model")
    media = rendering.items(shown, files) if rendering else []
    mask: list[int] = []
    logprobs: list[float] = []
    messages: list[Message] = []
    turns: list[Turn] = []
    length = 0
    for i, call in enumerate(chain):
        target = call.number not in trained
        mask += [0] * len(call.prompt.ids) + [int(target)] * len(call.ids)
        logprobs += [0.0] * len(call.prompt.ids)
        logprobs += call.logprobs if target else [0.0] * len(call.ids)
        length += len(call.prompt.ids)
        answer = to_messages([call.answer], files)[0]
        messages += [*to_messages(call.prompt.said, files), answer]
        following = chain[i + 1].prompt.said if i + 1 < len(chain) else ()
        turns.append(
            Turn(
                prompt_len=length,
                ids=tuple(call.ids),
                logprobs=tuple(call.logprobs),
                weight_version=max(call.versions, default=0),
                message=answer,
                results=_results(following, files),
                children=(),
                started=call.started - begin,
                generated=call.ended - begin,
                ended=(chain[i + 1].started if i + 1 < len(chain) else call.ended) - begin,
            )
        )
        length += len(call.ids)
    last = chain[-1]
    broken = next((call.broke for call in chain if call.number not in trained and call.broke), "")
    return Trace(
        role=role,
        messages=tuple(messages),
        tokens=tuple(tokens),
        loss_mask=tuple(mask),
        logprobs=tuple(logprobs),
        media=tuple(media),
        turns=tuple(turns),
        status="completed" if last.finish == "stop" else "limit",
        final_text=turns[-1].message.text.strip(),
        trainable=trainable,
        broke=broken,
    )


def _results(following: Sequence[Said], files: Mapping[str, bytes]) -> tuple[Message, ...]:
    return tuple(to_messages([said for said in following if said.role == "tool"], files))


def session_json(session: Session) -> dict[str, Any]:
    """For programs that read a session over HTTP: every call with what it adds to its parent."""
    return {
        "session": session.id,
        "calls": [
            {
                "number": call.number,
                "parent": call.prompt.parent,
                "same_prompt_as": None if call.prompt.first == call.number else call.prompt.first,
                "broke": call.broke,
                "dialect": call.dialect,
                "said": [one.to_json() for one in call.prompt.said] if call.prompt.first == call.number else None,
                "prompt_ids_added": call.prompt.ids.tolist() if call.prompt.first == call.number else None,
                "answer": call.answer.to_json(),
                "completion_ids": call.ids.tolist(),
                "logprobs": call.logprobs.tolist(),
                "weight_versions": call.versions.tolist(),
                "finish_reason": call.finish,
                "started": call.started,
                "ended": call.ended,
            }
            for call in session.calls
        ],
    }
