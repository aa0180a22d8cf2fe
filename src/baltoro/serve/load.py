"""`baltoro serve`: a checkpoint folder behind the API."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from baltoro.agent.engine import Completion, Sampling
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import TokenSequence
from baltoro.chat.tokenizer import Tokenizer
from baltoro.model.kimi import KimiK25
from baltoro.model.release import Checkpoint, load_release
from baltoro.rollout.gateway.api import Api, ApiConfig
from baltoro.rollout.gateway.engine import EngineUpstream
from baltoro.rollout.gateway.server import serve
from baltoro.rollout.roll_out import Served
from baltoro.serve.local import LocalEngine
from baltoro.train.machine import prepare_machine

_API_KEY, _ADMIN_KEY = "BALTORO_API_KEY", "BALTORO_ADMIN_KEY"
_ROLE = "agent"


@dataclass(frozen=True)
class ServeConfig:
    """name: of the model in requests, by default that of the folder. stage: of a run folder, by default the last that
    is finished. context: the most tokens of prompt and completion together, by default the model's. slots: completions
    in the batch; queue: completions that may wait for one. body_mb: largest request. threads: 0 takes all cores."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    stage: str = ""
    context: int = 0
    slots: int = 16
    queue: int = 128
    body_mb: int = 64
    threads: int = 0
    dtype: str = "auto"


@dataclass(frozen=True, eq=False)
class Loaded:
    """weights: the files of them. context: the longest sequence that the model was made for."""

    folder: Path
    weights: Sequence[Path]
    model: KimiK25
    tokenizer: Tokenizer
    media: MediaSpec
    context: int


def open_release(folder: Path, config: ServeConfig) -> Loaded:
    """A folder in the released layout, with its tokenizer in tiktoken.model. Raises ValueError, OSError."""
    release = Checkpoint(folder).release
    tokenizer = Tokenizer.load(folder / "tiktoken.model")
    if (tokenizer.media_pad, tokenizer.vocab_size) != (release.media_pad, release.model.text.vocab_size):
        raise ValueError(f"{folder / 'tiktoken.model'} belongs to another model than config.json; fetch both again")
    model = KimiK25(release.model, release.media_pad, prepare_machine(threads(config), config.dtype))
    load_release(folder, model)
    vision = release.model.vision
    media = replace(MediaSpec.K25, patch_size=vision.patch_size, merge=vision.merge, frames_per_chunk=vision.max_frames)
    weights = sorted(folder.glob("*.safetensors"))
    return Loaded(folder, weights, model, tokenizer, media, release.max_position)


def threads(config: ServeConfig) -> int:
    return config.threads or os.cpu_count() or 1


def serve_model(loaded: Loaded, config: ServeConfig, name: str) -> None:
    """Until it is told to stop. BALTORO_API_KEY, where the environment sets it, is asked of every request."""
    context = config.context or loaded.context

    async def run() -> None:
        engine = LocalEngine({name: loaded.model}, loaded.tokenizer, slots=config.slots, max_len=context)
        upstream = EngineUpstream(engine, loaded.tokenizer, loaded.media, context)
        key = os.environ.get(_API_KEY, "")
        admin = os.environ.get(_ADMIN_KEY, "")
        limits = ApiConfig(
            name, config.slots + config.queue, config.body_mb * 2**20, (key,) if key else (), admin_key=admin
        )
        api = Api(upstream, limits, engine=engine.numbers)
        await serve(api, engine.run(), config.host, config.port)

    asyncio.run(run())


def local(loaded: Loaded, slots: int, context: int) -> Served:
    """For episodes: the model answers whatever role asks. context: as of `ServeConfig`."""
    context = context or loaded.context
    written = datetime.fromtimestamp(max(file.stat().st_mtime for file in loaded.weights), UTC)
    name = f"{loaded.folder.resolve()} ({loaded.weights[0].name} of {written.isoformat()})"
    engine = LocalEngine({_ROLE: loaded.model}, loaded.tokenizer, slots=slots, max_len=context)
    return Served(name, _Alone(engine), engine.run(), loaded.tokenizer, loaded.media, context, numbers=engine.numbers)


@dataclass(frozen=True, eq=False)
class _Alone:
    engine: LocalEngine

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        return await self.engine.generate(prompt, sampling, _ROLE)
