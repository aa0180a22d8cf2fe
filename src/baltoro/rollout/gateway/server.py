"""The process that serves."""

import asyncio
import signal
from contextlib import AbstractAsyncContextManager

from aiohttp import web

from baltoro.rollout.collector import collecting_rarely
from baltoro.rollout.gateway.api import Api


async def serve(api: Api, running: AbstractAsyncContextManager[None], host: str, port: int) -> None:
    """Serves until SIGTERM or Ctrl-C, then drains; a second signal ends at once. `running`: while it is entered, the
    engine works. Raises what ends the engine, after every request that waited for it was answered with 500."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        stop.set()
        for number in signals:
            loop.remove_signal_handler(number)

    runner = api.runner()
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ValueError(f"{error.strerror}; choose another host= or port=") from None
        for number in signals:
            loop.add_signal_handler(number, on_signal)
        shown = f"[{host}]" if ":" in host else host
        with collecting_rarely():
            async with running, api.lag.watch():
                print(f"listening on http://{shown}:{runner.addresses[0][1]}/v1", flush=True)
                await stop.wait()
                await api.drain()
    finally:
        await runner.cleanup()
