"""Runs Python that the model wrote, in a process of its own without network or files (see confine.py)."""

import asyncio
import io
import sys
from dataclasses import dataclass

import numpy as np

from baltoro.agent.tool import CallContext, ToolResult
from baltoro.chat.messages import Image, ToolSpec
from baltoro.tools import confine

_WORK_BYTES = 64 << 20


@dataclass(frozen=True)
class Output:
    """What a program printed (standard output and error together, the first `output_chars`), and how it ended:
    its exit status, 128 + n where signal n ended it, None where the time was over."""

    text: str
    exit_code: int | None


class SandboxUnavailable(Exception):
    """This machine's kernel does not allow the confinement, so nothing was run."""


class Sandbox:
    """Bounds of a program, and how many run at once; later ones wait, and their time runs only once they run.

    timeout_s: wall seconds. memory_bytes: address space per process.
    """

    def __init__(
        self, *, processes: int, timeout_s: float = 10.0, memory_bytes: int = 1 << 30, output_chars: int = 4000
    ) -> None:
        self._slots = asyncio.Semaphore(processes)
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._output_chars = output_chars

    async def run(self, code: str, image: Image | None = None) -> Output:
        """`image` lies beside the code as image.npy. Raises SandboxUnavailable."""
        encoded = code.encode("utf-8", "replace")
        payload = len(encoded).to_bytes(8, "big") + encoded + (_npy(image) if image else b"")
        arguments = [str(max(1, round(self._timeout_s))), str(self._memory_bytes), str(_WORK_BYTES), sys.prefix]
        async with self._slots:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                confine.__file__,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in a terminal is for us, not for the code
            )
            printed = bytearray()
            try:
                async with asyncio.timeout(self._timeout_s):
                    refusal = await self._exchange(process, payload, printed)
                    exit_code: int | None = await process.wait()
            except TimeoutError:
                refusal, exit_code = b"", None
            finally:
                if process.returncode is None:
                    process.kill()  # confine.py: everything below it dies with it, whatever its process group
                    await process.wait()
        if refusal:
            raise SandboxUnavailable(refusal.decode("utf-8", "replace"))
        text = printed.decode("utf-8", "replace")
        if len(text) > self._output_chars:
            text = text[: self._output_chars] + "\n[output cut]"
        return Output(text, exit_code)

    async def _exchange(self, process: asyncio.subprocess.Process, payload: bytes, printed: bytearray) -> bytes:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        try:
            process.stdin.write(payload)
            await process.stdin.drain()
            process.stdin.close()
        except ConnectionError:  # it ended before reading everything; standard error says why
            pass
        keep = 4 * self._output_chars + 4  # bytes; enough for one character more than is shown
        while chunk := await process.stdout.read(1 << 16):
            printed += chunk[: keep - len(printed)] if len(printed) < keep else b""
        return await process.stderr.read()


def _npy(image: Image) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image.pixels)
    return buffer.getvalue()


class Python:
    """python(code): what the code prints. Every call is a fresh process; nothing is kept between calls."""

    spec = ToolSpec(
        "python",
        "Run Python code and return what it prints. The image under discussion is image.npy, uint8 RGB.",
        {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    )
    sequential = False

    def __init__(self, sandbox: Sandbox, image: Image | None = None) -> None:
        self._sandbox = sandbox
        self._image = image

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        try:
            output = await self._sandbox.run(str(arguments["code"]), self._image)
        except SandboxUnavailable as error:
            return ToolResult(error=f"python cannot be confined on this machine ({error}); nothing was run")
        if output.exit_code is None:
            return ToolResult((output.text + "\n[stopped: out of time]",))
        if output.exit_code:
            return ToolResult((output.text + f"\n[exit status {output.exit_code}]",))
        return ToolResult((output.text,) if output.text else ())
