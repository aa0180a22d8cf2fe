"""`baltoro gateway`: black-box agents on one side, an endpoint that somebody else runs on the other."""

import asyncio
import ipaddress
import os
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway.api import Api, ApiConfig
from baltoro.rollout.gateway.engine import EngineUpstream
from baltoro.rollout.gateway.relay import Relay
from baltoro.rollout.gateway.rendering import Rendering
from baltoro.rollout.gateway.server import serve
from baltoro.rollout.gateway.sqlite import SqliteStore
from baltoro.rollout.gateway.upstream import Upstream
from baltoro.rollout.remote import UPSTREAM_KEY, remote_engine

_API_KEYS, _ADMIN_KEY = "BALTORO_API_KEY", "BALTORO_ADMIN_KEY"


@dataclass(frozen=True)
class GatewayConfig:
    """upstream: its URL, with /v1 for chat and text, without for vllm and sglang. model: its name there and here.
    kind: chat passes requests through to an endpoint that tells token ids, text to one that does not; vllm and sglang
    are sent the token ids that the gateway renders with `tokenizer`, a tiktoken file. context: the most tokens of
    prompt and completion together. calls, key_calls: completions at once, of all and of one API key (0: no bound).
    body_mb: largest request. memory_mb: of idle sessions; the others are loaded again from the file when they go on."""

    upstream: str
    model: str
    kind: Literal["chat", "text", "vllm", "sglang"] = "chat"
    tokenizer: Path | None = None
    context: int = 262_144
    host: str = "127.0.0.1"
    port: int = 8001
    calls: int = 1024
    key_calls: int = 0
    body_mb: int = 64
    memory_mb: int = 1024


def run_gateway(file: Path, config: GatewayConfig) -> None:
    """Until it is told to stop; what is recorded goes to `file`. Raises ValueError for what cannot be served."""
    keys = tuple(filter(None, os.environ.get(_API_KEYS, "").split(",")))
    if not keys and not _is_local(config.host):
        raise ValueError(f"{config.host} can be reached by others, who would use the upstream; set {_API_KEYS}")
    limits = ApiConfig(
        config.model,
        config.calls,
        config.body_mb * 2**20,
        keys,
        config.key_calls or None,
        config.memory_mb * 2**20,
        os.environ.get(_ADMIN_KEY, ""),
    )

    async def run() -> None:
        upstream, running = _open(config)
        with SqliteStore(file) as store:
            await serve(Api(upstream, limits, store), running, config.host, config.port)

    asyncio.run(run())


def _open(config: GatewayConfig) -> tuple[Upstream, AbstractAsyncContextManager[None]]:
    key = os.environ.get(UPSTREAM_KEY, "")
    media = MediaSpec.K25
    if config.kind in ("chat", "text"):
        rendering = Rendering(Tokenizer.load(config.tokenizer), media) if config.tokenizer else None
        tells = config.kind == "chat"
        relay = Relay(config.upstream, key, config.context, tells_ids=tells, rendering=rendering)
        return relay, relay.run()
    engine, tokenizer = remote_engine(config.kind, config.upstream, config.model, config.tokenizer, key)
    return EngineUpstream(engine, tokenizer, media, config.context), engine.run()


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
