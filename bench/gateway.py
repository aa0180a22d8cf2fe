"""Requests per second and added latency of LLM gateways that record token ids: ours, rllm-model-gateway, Agent
Lightning and LiteLLM (which records none), before one constant upstream.

All pass chat completions through to the same mock of vLLM's chat endpoint (return_token_ids, logprobs of 96 tokens),
which answers at once: what is measured is the gateway. Every answer bears ids of its own; at the end of each round
what was captured is compared with them, call by call. The load generator speaks HTTP on bare asyncio; direct, without
a gateway, it shows its own limit. Gateways take turns, round by round; the median round counts. Ours runs with both of
its stores; "durable" acknowledges only what survives kill -9, which no peer offers at its default.

    python bench/gateway.py [seconds for each measurement] [rounds]
    python bench/gateway.py figure results/gateway.json results/gateway.png
"""

import asyncio
import base64
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
PEERS = HERE.parents[1] / ".venv-bench"
TOKENS = 96
MOCK_PORT, GATEWAY_PORT = 18900, 18901
ANSWER = "The answer is long enough to be one. " * 10


# --- payloads -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """history: characters of text. connections: requests at once for the throughput. prompt: ids that the upstream
    says it read."""

    name: str
    history: int
    screenshots: int
    connections: int
    prompt: int


ROWS = (
    Row("1 KB", 1000, 0, 16, 250),
    Row("100 KB", 100_000, 0, 8, 25_000),
    Row("1 MB", 1_000_000, 0, 4, 250_000),
    Row("4 screenshots of 500 KB", 1000, 4, 4, 11_000),
)


def payload(row: Row) -> tuple[bytes, bytes]:
    """The body before and behind the number that makes a request unlike all others."""
    draw = random.Random(row.name)
    turns = max(row.history // 2000, 1)
    words = ["alpha", "beta", "gamma", "delta", "click", "open", "window", "file"]

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length // 6))[:length]

    messages: list[dict[str, Any]] = [{"role": "system", "content": text(200)}]
    for i in range(turns):
        messages.append({"role": "user", "content": text(row.history // turns // 2)})
        messages.append({"role": "assistant", "content": text(row.history // turns // 2) + f" {i}"})
    for i in range(row.screenshots):
        url = "data:image/png;base64," + base64.b64encode(draw.randbytes(500_000 * 3 // 4)).decode()
        messages.append({"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]})
        messages.append({"role": "assistant", "content": f"I see {i}."})
    messages.append({"role": "user", "content": "nonce-########"})
    body = json.dumps({"model": "m", "messages": messages, "temperature": 1.0, "max_tokens": TOKENS}).encode()
    head, tail = body.split(b"########")
    return head, tail


def completion_ids(nonce: int) -> list[int]:
    return [nonce % 90_000 + i * 7 % 1000 for i in range(TOKENS)]


# --- the upstream ---------------------------------------------------------------------------------------------------


class Mock(asyncio.Protocol):
    """HTTP/1.1 as far as clients of this benchmark speak it."""

    def __init__(self, prompts: dict[int, bytes]) -> None:
        self._prompts = prompts
        self._parts: list[bytes] = []
        self._held = 0
        self._wanted = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        self._held += len(data)
        while self._held >= self._wanted:
            whole = b"".join(self._parts)
            end = whole.find(b"\r\n\r\n")
            if end < 0:
                self._parts = [whole]
                return
            length = content_length(whole[:end])
            self._wanted = end + 4 + length
            if len(whole) < self._wanted:
                self._parts = [whole]
                return
            self._transport.write(self._answer(whole[end + 4 : self._wanted]))
            rest = whole[self._wanted :]
            self._parts, self._held, self._wanted = [rest], len(rest), 1

    def _answer(self, body: bytes) -> bytes:
        at = body.rfind(b"nonce-")
        if at < 0:  # health checks and lists of models
            text = b'{"object": "list", "data": [{"id": "m", "object": "model"}]}'
        else:
            ids = completion_ids(int(body[at + 6 : at + 14]))
            entries = ",".join(
                f'{{"token":"t{i}","logprob":-0.{i % 9000 + 1000},"bytes":[116],"top_logprobs":[]}}' for i in ids
            )
            size = min(self._prompts, key=lambda length: abs(length - len(body)))
            text = self._prompts[size] % (str(ids).encode(), entries.encode())
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)


def content_length(head: bytes) -> int:
    lower = head.lower()
    at = lower.find(b"content-length:")
    return int(lower[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0


async def mock(port: int) -> None:
    prompts: dict[int, bytes] = {}
    for row in ROWS:
        head, tail = payload(row)
        body = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "prompt_token_ids": [i % 150_000 for i in range(row.prompt)],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": ANSWER},
                    "finish_reason": "stop",
                    "token_ids": "IDS",
                    "logprobs": {"content": "ENTRIES"},
                }
            ],
            "usage": {"prompt_tokens": row.prompt, "completion_tokens": TOKENS, "total_tokens": row.prompt + TOKENS},
        }
        text = json.dumps(body).replace("%", "%%").replace('"IDS"', "%b").replace('"ENTRIES"', "[%b]")
        prompts[len(head) + len(tail) + 8] = text.encode()
    server = await asyncio.get_running_loop().create_server(lambda: Mock(prompts), "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


# --- the load -------------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One connection: a request, its answer, the next request."""

    def __init__(self, path: str, parts: tuple[bytes, bytes], nonces: Iterator[int], stop: Callable[[], bool]) -> None:
        self._parts = parts
        length = len(parts[0]) + len(parts[1]) + 8
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAccept: */*\r\n"
            f"Authorization: Bearer sk-bench\r\nContent-Length: {length}\r\n\r\n"
        ).encode()
        self._nonces = nonces
        self._stop = stop
        self._buffer = bytearray()
        self.latencies: list[float] = []
        self.done = asyncio.get_running_loop().create_future()
        self.sent: list[int] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError("the gateway closed the connection"))

    def _ask(self) -> None:
        if self._stop():
            self.done.set_result(None)
            self._transport.close()
            return
        nonce = next(self._nonces)
        self.sent.append(nonce)
        self._begun = time.perf_counter()
        self._transport.writelines([self._head, self._parts[0], b"%08d" % nonce, self._parts[1]])

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end])
        if b"chunked" in head.lower():
            if not self._buffer.endswith(b"0\r\n\r\n"):
                return
        elif len(self._buffer) < end + 4 + content_length(head):
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(ConnectionError(bytes(self._buffer[:600]).decode("utf-8", "replace")))
            return
        self.latencies.append(time.perf_counter() - self._begun)
        self._buffer.clear()
        self._ask()


async def load(port: int, paths: list[str], row: Row, first: int, seconds: float) -> dict[str, Any]:
    """One connection for each path. Gives latencies and, by path, the numbers of its requests."""
    end = time.perf_counter() + seconds
    nonces = iter(range(first, 10**8))
    parts = payload(row)
    clients: list[Client] = []
    for path in paths:
        make = lambda path=path: Client(path, parts, nonces, lambda: time.perf_counter() > end)  # noqa: E731
        clients.append((await asyncio.get_running_loop().create_connection(make, "127.0.0.1", port))[1])
    begun = time.perf_counter()
    await asyncio.gather(*(client.done for client in clients))
    took = time.perf_counter() - begun
    sent: dict[str, list[int]] = {}
    for path, client in zip(paths, clients, strict=True):  # one path may be that of several connections
        sent.setdefault(path, []).extend(client.sent)
    latencies = sorted(latency for client in clients for latency in client.latencies)
    return {
        "rate": len(latencies) / took,
        "p50_ms": latencies[len(latencies) // 2] * 1e3,
        "p99_ms": latencies[len(latencies) * 99 // 100] * 1e3,
        "sent": sent,
    }


# --- the gateways ---------------------------------------------------------------------------------------------------


def ours(port: int, folder: str) -> None:
    from baltoro.rollout.gateway.api import Api, ApiConfig
    from baltoro.rollout.gateway.relay import Relay
    from baltoro.rollout.gateway.server import serve
    from baltoro.rollout.gateway.sqlite import SqliteStore

    async def main() -> None:
        relay = Relay(f"http://127.0.0.1:{MOCK_PORT}/v1", "", max_len=2**20)
        config = ApiConfig("m", max_choices=1000, max_body=2**24, api_keys=("sk-bench",), admin_key="sk-admin")
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(SqliteStore(Path(folder) / "calls.db")) if folder else None
            await serve(Api(relay, config, store), relay.run(), "127.0.0.1", port)

    asyncio.run(main())


@dataclass(frozen=True)
class Gateway:
    """requirement: of the peer's own environment. command: to start it in `folder`. path: of a session. captured: the
    completion ids on record for it, or None where it records none."""

    name: str
    requirement: str
    health: str
    command: Callable[[str], list[str]]
    path: Callable[[str], str]
    open: Callable[[str], None]
    captured: Callable[[str], list[list[int]]] | None


def fetch(path: str, body: Any = None, key: str = "sk-bench") -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{GATEWAY_PORT}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def _own(folder: str) -> Gateway:
    return Gateway(
        f"ours ({'durable' if folder else 'memory'})",
        "",
        "/health",
        lambda scratch: [sys.executable, str(HERE), "ours", str(GATEWAY_PORT), scratch if folder else ""],
        lambda session: f"/sessions/{session}/v1/chat/completions",
        lambda session: None,
        lambda session: [call["completion_ids"] for call in fetch(f"/sessions/{session}", key="sk-admin")["calls"]],
    )


def _rllm_traces(session: str) -> list[list[int]]:
    traces = fetch(f"/sessions/{session}/traces")
    return [trace["completion_token_ids"] for trace in sorted(traces, key=lambda trace: trace["timestamp"])]


def _lightning_open(session: str) -> None:
    upstream = f"http://127.0.0.1:{MOCK_PORT}/v1"
    fetch("/api/models", [{"model": "m", "endpoint": upstream}])
    fetch("/api/rollouts", [{"input": {}, "rollout_id": session}])


def _lightning_events(session: str) -> list[list[int]]:
    events = fetch(f"/api/rollouts/{session}/events")
    return [event["data"]["response"]["choices"][0]["token_ids"] for event in events]


def _litellm(scratch: str) -> list[str]:
    config = Path(scratch) / "litellm.yaml"
    params = {"model": "openai/m", "api_base": f"http://127.0.0.1:{MOCK_PORT}/v1", "api_key": "x"}
    models = [{"model_name": "m", "litellm_params": params}]
    config.write_text(json.dumps({"model_list": models, "general_settings": {"master_key": "sk-bench"}}))
    return [_peer("litellm", "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(GATEWAY_PORT)]


def _peer(name: str, program: str) -> str:
    return str(PEERS / name / "bin" / program)


GATEWAYS = (
    _own(""),
    _own("durable"),
    Gateway(
        "rllm-model-gateway 0.1.0",
        "rllm-model-gateway==0.1.0",
        "/health",
        lambda scratch: [
            _peer("rllm-model-gateway", "rllm-model-gateway"),
            *("--host", "127.0.0.1", "--port", str(GATEWAY_PORT), "--store", "memory", "--log-level", "WARNING"),
            *("--worker", f"http://127.0.0.1:{MOCK_PORT}/v1"),
        ],
        lambda session: f"/sessions/{session}/v1/chat/completions",
        lambda session: None,
        _rllm_traces,
    ),
    Gateway(
        "agentlightning 1.0.2",
        "agentlightning==1.0.2",
        "/healthz",
        lambda scratch: [
            _peer("agentlightning", "agl-server"),
            *("host=127.0.0.1", f"port={GATEWAY_PORT}", "default_proxy.model_name=m", f"hydra.run.dir={scratch}"),
        ],
        lambda session: f"/proxy/rollout/{session}/attempt/0/mode/train/openai/v1/chat/completions",
        _lightning_open,
        _lightning_events,
    ),
    Gateway(
        "litellm 1.108.7",
        "litellm[proxy]==1.108.7",
        "/health/liveliness",
        _litellm,
        lambda session: "/v1/chat/completions",
        lambda session: None,
        None,
    ),
)


def install(gateway: Gateway) -> None:
    """Peers want versions that exclude each other, so each has an environment of its own. Agent Lightning declares
    Python 3.12 and runs on 3.11."""
    name = gateway.requirement.partition("==")[0].partition("[")[0]
    if not name or (PEERS / name / "installed").exists():
        return
    print(f"installing {gateway.requirement} ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", PEERS / name], check=True)
    # Only there: what LiteLLM depends on would then come in versions that do not run.
    declared = ["--ignore-requires-python"] if name == "agentlightning" else []
    subprocess.run([_peer(name, "python"), "-m", "pip", "install", "-q", *declared, gateway.requirement], check=True)
    (PEERS / name / "installed").touch()


# --- the measurement ------------------------------------------------------------------------------------------------

CORES = sorted(os.sched_getaffinity(0))
QUIET = os.getloadavg()[0] < 1.0


def pinned(core: int) -> list[str]:
    """The gateway has a core to itself, where the machine has two and nothing else to do."""
    taskset = shutil.which("taskset") if QUIET else None
    return [taskset, "-c", str(CORES[core % len(CORES)])] if taskset else []


@contextlib.contextmanager
def running(
    command: list[str], core: int, scratch: str, healthy: Callable[[], bool]
) -> Iterator[subprocess.Popen[bytes]]:
    log = Path(scratch) / "log"
    ours = {"PYTHONPATH": str(HERE.parents[1] / "src")}  # this checkout, wherever the package is installed from
    environment = {**os.environ, **ours, "LITELLM_LOG": "ERROR", "PYTHONWARNINGS": "ignore"}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*pinned(core), *command], stdout=output, stderr=output, env=environment, cwd=scratch
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 120
            while not healthy():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command} did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield process
        finally:
            process.kill()


def is_open(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def resident_mb(process: subprocess.Popen[bytes]) -> float:
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    """User and system time of the process and all its threads."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(port: int, paths: list[str], row: int, first: int, seconds: float) -> dict[str, Any]:
    command = [sys.executable, str(HERE), "load", json.dumps([port, paths, row, first, seconds])]
    done = subprocess.run([*pinned(1), *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def check(gateway: Gateway, sent: dict[str, list[int]], sessions: list[str]) -> int:
    """Every request that was answered was captured once, with its own ids. Gives their number."""
    if gateway.captured is None:
        return 0
    checked = 0
    for session in sessions:
        expected = sorted(completion_ids(nonce) for nonce in sent[gateway.path(session)])
        captured = sorted(gateway.captured(session))
        if captured != expected:
            raise RuntimeError(f"{gateway.name} captured {len(captured)} calls of {len(expected)}, or other ids")
        checked += len(captured)
    return checked


def round_of(gateway: Gateway, seconds: float, turn: int) -> dict[str, dict[str, float]]:
    """A fresh process; all rows. One connection gives the latency, several give the throughput."""
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        healthy = lambda: is_open(GATEWAY_PORT, gateway.health)  # noqa: E731
        with running(gateway.command(scratch), 0, scratch, healthy) as process:
            for i, row in enumerate(ROWS):
                sessions = [f"r{turn}-{i}-{c}" for c in range(row.connections + 1)]
                for session in sessions:
                    gateway.open(session)
                paths = [gateway.path(session) for session in sessions]
                one = measure(GATEWAY_PORT, paths[:1], i, 10**7 * (i + 1), seconds)
                before = cpu_s(process)
                many = measure(GATEWAY_PORT, paths[1:], i, 10**7 * (i + 1) + 5 * 10**6, seconds)
                answered = sum(len(many["sent"][path]) for path in set(paths[1:]))
                spent = (cpu_s(process) - before) / answered
                checked = check(gateway, {**one["sent"], **many["sent"]}, sessions)
                results[row.name] = {
                    "rate": many["rate"],
                    "p50_ms": one["p50_ms"],
                    "p99_ms": one["p99_ms"],
                    "cpu_ms": spent * 1e3,
                    "checked": checked,
                    "rss_mb": resident_mb(process),
                }
                say = {name: round(value, 2) for name, value in results[row.name].items()}
                print(f"{gateway.name:26} {row.name:24} {say}", file=sys.stderr)
    return results


def main(seconds: float, rounds: int) -> None:
    for gateway in GATEWAYS:
        install(gateway)
    kept: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        upstream = [sys.executable, str(HERE), "mock", str(MOCK_PORT)]
        with running(upstream, 1, scratch, lambda: is_open(MOCK_PORT, "/v1/models")):
            for turn in range(rounds):
                for i, row in enumerate(ROWS):
                    direct = "/v1/chat/completions"
                    one = measure(MOCK_PORT, [direct], i, 0, seconds)
                    many = measure(MOCK_PORT, [direct] * row.connections, i, 0, seconds)
                    result = {"rate": many["rate"], "p50_ms": one["p50_ms"], "p99_ms": one["p99_ms"]}
                    kept.setdefault("direct", {}).setdefault(row.name, []).append(result)
                    print(f"{'direct':26} {row.name:24} {result}", file=sys.stderr)
                for gateway in GATEWAYS:
                    for name, result in round_of(gateway, seconds, turn).items():
                        kept.setdefault(gateway.name, {}).setdefault(name, []).append(result)
    print(json.dumps(summary(kept, seconds, rounds)))


def summary(kept: dict[str, dict[str, list[dict[str, float]]]], seconds: float, rounds: int) -> dict[str, Any]:
    def median(name: str, row: str, what: str) -> float:
        return statistics.median(result[what] for result in kept[name][row])

    rows: dict[str, Any] = {}
    for row in ROWS:
        rows[row.name] = {
            name: {
                "requests_per_s": round(median(name, row.name, "rate"), 1),
                "p50_ms": round(median(name, row.name, "p50_ms"), 3),
                "p99_ms": round(median(name, row.name, "p99_ms"), 3),
                "added_p50_ms": round(median(name, row.name, "p50_ms") - median("direct", row.name, "p50_ms"), 3),
                "added_p99_ms": round(median(name, row.name, "p99_ms") - median("direct", row.name, "p99_ms"), 3),
                "cpu_ms": round(statistics.median(result.get("cpu_ms", 0) for result in kept[name][row.name]), 3),
                "ids_verified": int(sum(result.get("checked", 0) for result in kept[name][row.name])),
                "rss_mb": round(max(result.get("rss_mb", 0) for result in kept[name][row.name]), 1),
            }
            for name in kept
        }
    peers = [gateway.name for gateway in GATEWAYS if gateway.requirement]
    ratios = {
        row.name: {
            own: round(
                rows[row.name][own]["requests_per_s"] / max(rows[row.name][p]["requests_per_s"] for p in peers), 2
            )
            for own in ("ours (memory)", "ours (durable)")
        }
        for row in ROWS
    }
    first = rows[ROWS[0].name]
    best = max(peers, key=lambda peer: first[peer]["requests_per_s"])
    return {
        "bench": "gateway",
        "ours": first["ours (durable)"]["requests_per_s"],
        "peer": first[best]["requests_per_s"],
        "best_peer": best,
        "ratio": ratios[ROWS[0].name]["ours (durable)"],
        "ratios": ratios,
        "rows": rows,
        "seconds": seconds,
        "rounds": rounds,
        "cores": len(CORES),
        "pinned": QUIET,
        "load_average": os.getloadavg()[0],
    }


def figure(results: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = json.loads(results.read_text())
    names = [gateway.name for gateway in GATEWAYS]
    drawn, axes = pyplot.subplots(1, 2, figsize=(13, 4.5))
    for axis, what, title in zip(
        axes,
        ("requests_per_s", "added_p50_ms"),
        ("requests per second", "added latency at one connection, p50, ms"),
        strict=True,
    ):
        for i, name in enumerate(names):
            values = [result["rows"][row][name][what] for row in result["rows"]]
            places = [x + (i - 2) * 0.16 for x in range(len(values))]
            bars = axis.bar(places, values, 0.16, label=name)
            axis.bar_label(bars, fmt="{:.3g}", fontsize=6)
        axis.set_yscale("log")
        axis.set_xticks(range(len(result["rows"])), list(result["rows"]), fontsize=8)
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=7)
    drawn.tight_layout()
    drawn.savefig(picture, dpi=110)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["figure", results, picture]:
            figure(Path(results), Path(picture))
        case ["mock", port]:
            asyncio.run(mock(int(port)))
        case ["ours", port, folder]:
            ours(int(port), folder)
        case ["load", what]:
            port, paths, row, first, seconds = json.loads(what)
            print(json.dumps(asyncio.run(load(port, paths, ROWS[row], first, seconds))))
        case [seconds, rounds]:
            main(float(seconds), int(rounds))
        case _:
            main(3.0, 3)
