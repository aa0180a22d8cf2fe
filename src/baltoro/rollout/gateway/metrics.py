"""Counts in Prometheus' text format."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

_PREFIX = "baltoro_gateway_"
_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """requests: by dialect and status. tokens: "prompt" as engines read them, "completion". broken: calls that do not
    go on from the one before. replayed: requests answered from memory."""

    def __init__(self) -> None:
        self.requests = Counter[tuple[str, int]]()
        self.tokens = Counter[str]()
        self.recorded = 0
        self.broken = 0
        self.replayed = 0
        self._seconds = [0] * (len(_BOUNDS_S) + 1)
        self._total_s = 0.0

    def answered(self, dialect: str, status: int, seconds: float) -> None:
        self.requests[dialect, status] += 1
        self._seconds[bisect_left(_BOUNDS_S, seconds)] += 1
        self._total_s += seconds

    def text(self, gauges: Mapping[str, float]) -> str:
        """`gauges`: name to value, of what the counts do not know."""
        lines: list[str] = []

        def family(name: str, kind: str, rows: Mapping[str, float]) -> None:
            lines.append(f"# TYPE {_PREFIX}{name} {kind}")
            lines.extend(f"{_PREFIX}{name}{labels} {value:g}" for labels, value in rows.items())

        requests = {f'{{dialect="{d}",status="{s}"}}': count for (d, s), count in self.requests.items()}
        family("requests_total", "counter", requests)
        family("tokens_total", "counter", {f'{{kind="{kind}"}}': count for kind, count in self.tokens.items()})
        counts = {"calls_recorded": self.recorded, "calls_broken": self.broken, "requests_replayed": self.replayed}
        for name, count in counts.items():
            family(f"{name}_total", "counter", {"": count})
        for name, value in gauges.items():
            family(name, "gauge", {"": value})
        below, rows = 0, dict[str, float]()
        for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), self._seconds, strict=True):
            below += count
            rows[f'_bucket{{le="{bound}"}}'] = below
        family("request_seconds", "histogram", {**rows, "_sum": self._total_s, "_count": below})
        return "\n".join(lines) + "\n"
