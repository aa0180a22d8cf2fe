"""Python in confinement: what it can do for vision, and what it cannot do to the machine."""

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from baltoro.agent.tool import CallContext
from baltoro.chat.messages import Image
from baltoro.tools import confine
from baltoro.tools.python import Python, Sandbox, SandboxUnavailable

CONTEXT = CallContext(None, 0, 0.0)


@pytest.fixture
async def sandbox() -> Sandbox:
    sandbox = Sandbox(processes=2, timeout_s=10)
    try:
        await sandbox.run("")
    except SandboxUnavailable as error:
        pytest.skip(f"this kernel does not allow the confinement: {error}")
    return sandbox


async def seen(sandbox: Sandbox, code: str, image: Image | None = None) -> str:
    [part] = (await Python(sandbox, image).call({"code": code}, CONTEXT)).shown
    assert isinstance(part, str)
    return part


async def test_image_operations(sandbox: Sandbox) -> None:
    pixels = np.zeros((12, 16, 3), np.uint8)
    pixels[2:5, 3:7] = (200, 0, 0)  # 12 red pixels
    pixels[8:10, 10:15] = (0, 0, 200)  # 10 blue pixels
    code = """
import numpy as np
image = np.load("image.npy")
bright = image.max(-1) > 100
left = image[:, :8]
print(image.shape, image.dtype, int(bright.sum()), int((left.max(-1) > 100).sum()))
rows, columns = np.nonzero(image[..., 2] > 100)
print(rows.min(), rows.max(), columns.min(), columns.max())
"""
    assert await seen(sandbox, code, Image(pixels)) == "(12, 16, 3) uint8 22 12\n8 9 10 14\n"


async def test_errors_and_exit_are_seen(sandbox: Sandbox) -> None:
    assert (await seen(sandbox, "print(1)\n1 / 0")).endswith("ZeroDivisionError: division by zero\n\n[exit status 1]")
    assert await seen(sandbox, "raise SystemExit(7)") == "\n[exit status 7]"
    assert await seen(sandbox, "def") != ""
    assert await seen(sandbox, "x = 1") == "(no output)"
    assert await seen(sandbox, "print('é', '\\ud800'.encode(errors='replace'))") == "é b'?'\n"


async def test_calls_share_nothing(sandbox: Sandbox) -> None:
    assert await seen(sandbox, "open('kept', 'w').write('x')\nprint('ok')") == "ok\n"
    assert "FileNotFoundError" in await seen(sandbox, "open('kept')")


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.sendto(b'x', ('10.255.255.255', 9))",
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect({unix!r})",
        "open({secret!r}).read()",
        "open('/..' + {secret!r}).read()",
        "open('/usr/written', 'w')",
        "open('/written', 'w')",
        "open({python!r}, 'ab')",
        "import os; os.kill({pid}, 9)",
        "open('/proc/self/status').read()",
        "import ctypes; e = ctypes.CDLL(None).mount(b't', b'/usr', b'tmpfs', 0, None); assert e == 0",
        "import os; os.setuid(0)",
        "bytearray(4 << 30)",
        "f = open('big', 'wb')\nfor _ in range(200): f.write(bytes(1 << 20))",
    ],
)
async def test_confinement(sandbox: Sandbox, tmp_path: Path, code: str) -> None:
    connected: list[object] = []

    async def accept(reader: object, writer: asyncio.StreamWriter) -> None:
        connected.append(reader)
        writer.close()

    secret = tmp_path / "secret"
    secret.write_text("gold")
    tcp = await asyncio.start_server(accept, "127.0.0.1", 0)
    unix = await asyncio.start_unix_server(accept, tmp_path / "socket")
    async with tcp, unix:
        port = tcp.sockets[0].getsockname()[1]
        names = {
            "port": port,
            "unix": str(tmp_path / "socket"),
            "secret": str(secret),
            "python": str(Path(sys.executable).resolve()),
            "pid": os.getpid(),
        }
        text = await seen(sandbox, code.format(**names) + "\nprint('DONE')")
    assert "DONE" not in text
    assert text.endswith("[exit status 1]")
    assert "gold" not in text
    assert not connected


async def test_the_environment_is_not_inherited(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "hunter2")
    text = await seen(sandbox, "import os; print(dict(os.environ))")
    assert "hunter2" not in text


async def test_output_is_cut(sandbox: Sandbox) -> None:
    text = await seen(sandbox, "print('é' * 10**7)")
    assert text == "é" * 4000 + "\n[output cut]"


def alive(marker: str) -> list[str]:
    """Processes of this machine whose command line has the marker."""
    found: list[str] = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in entry.read_bytes():
                found.append(entry.parent.name)
        except OSError:
            continue
    return found


# A child in a session of its own, which a kill of the process group does not reach.
STRAY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "{marker}"], start_new_session=True)
print("begun", flush=True)
{then}
"""


async def test_out_of_time_ends_every_process(sandbox: Sandbox) -> None:
    marker = f"stray-timeout-{os.getpid()}"
    short = Sandbox(processes=1, timeout_s=1.5)
    text = await seen(short, STRAY.format(marker=marker, then="time.sleep(600)"))
    assert text == "begun\n\n[stopped: out of time]"
    await gone(marker)


async def test_the_end_of_the_code_ends_its_children(sandbox: Sandbox) -> None:
    marker = f"stray-end-{os.getpid()}"
    assert await seen(sandbox, STRAY.format(marker=marker, then="time.sleep(0.2)")) == "begun\n"
    await gone(marker)


async def test_cancelling_ends_every_process(sandbox: Sandbox) -> None:
    marker = f"stray-cancel-{os.getpid()}"
    async with asyncio.TaskGroup() as group:
        run = group.create_task(seen(sandbox, STRAY.format(marker=marker, then="time.sleep(600)")))
        while not alive(marker):
            await asyncio.sleep(0.01)
        run.cancel()
    await gone(marker)


async def test_killing_us_ends_every_process(sandbox: Sandbox) -> None:
    marker = f"stray-kill-{os.getpid()}"
    ours = f"""
import asyncio
from baltoro.tools.python import Sandbox
asyncio.run(Sandbox(processes=1, timeout_s=600).run({STRAY.format(marker=marker, then="time.sleep(600)")!r}))
"""
    path = os.pathsep.join(filter(None, sys.path))
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", ours, env={"PYTHONPATH": path})
    while len(alive(marker)) < 2:  # ours, whose command line has the marker too, and the stray
        await asyncio.sleep(0.02)
    process.kill()
    await process.wait()
    await gone(marker)


async def gone(marker: str) -> None:
    """The kernel ends a pid namespace soon after its first process."""
    async with asyncio.timeout(5):
        while alive(marker):
            await asyncio.sleep(0.01)


async def test_waiting_for_a_slot_costs_no_time(sandbox: Sandbox) -> None:
    narrow = Sandbox(processes=1, timeout_s=2)
    code = "import time; time.sleep(0.5); print('ok')"
    async with asyncio.TaskGroup() as group:
        runs = [group.create_task(seen(narrow, code)) for _ in range(4)]
    assert [run.result() for run in runs] == ["ok\n"] * 4


async def test_a_kernel_that_refuses_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Real refusal: a launcher that may not create namespaces, as where user.max_user_namespaces is 0.
    source = Path(confine.__file__).read_text()
    refused = source.replace("_libc.unshare(_NEWUSER | ", "_libc.unshare(1 | ")  # an invalid flag: EINVAL
    assert refused != source
    launcher = tmp_path / "confine.py"
    launcher.write_text(refused)
    monkeypatch.setattr(confine, "__file__", str(launcher))
    result = await Python(Sandbox(processes=1)).call({"code": "print('ran')"}, CONTEXT)
    assert result.error == "python cannot be confined on this machine (unshare: Invalid argument); nothing was run"
    assert not result.content


def test_an_interpreter_below_tmp_and_behind_a_link_is_found(sandbox: Sandbox) -> None:
    """The new root is mounted on /tmp; an environment may lie there, and may be a link."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        real, link = Path(folder, "real"), Path(folder, "link")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", real], check=True)
        link.symlink_to(real)
        code = b"print(6 * 7)"
        for place in (real, link):
            done = subprocess.run(
                [place / "bin" / "python", "-I", "-S", confine.__file__, "10", str(1 << 30), str(1 << 20), str(place)],
                input=len(code).to_bytes(8, "big") + code,
                capture_output=True,
                check=False,
            )
            assert (done.stdout, done.stderr) == (b"42\n", b"")
