"""Settings of the process that decide speed and reproducibility."""

import ctypes
import os
import platform
import resource
import time

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ROUNDS = 10
_KERNELS = 256
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def prepare_machine(threads: int, dtype: str) -> torch.dtype:
    """Fix the thread count (results are bitwise reproducible for one count) and choose the compute dtype.

    dtype "auto" is whichever of float32 and bfloat16 is multiplied faster now. Raises ValueError for an unknown dtype.
    """
    torch.set_num_threads(threads)
    # Kernels are compiled for every size of a product and kept, 1,024 of them by default: half a GB and more.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(_KERNELS))
    torch.use_deterministic_algorithms(True)
    # Filling every fresh tensor costs a third of a step; nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if platform.libc_ver()[0] == "glibc":
        # By default every large tensor is a fresh mapping, and page faults cost more than the arithmetic on it.
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        # One heap for the forward and the backward thread: two would each keep the largest step's memory.
        libc.mallopt(_M_ARENA_MAX, 1)
    if dtype == "auto":
        dtype = _faster_dtype()
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be auto, {' or '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _faster_dtype() -> str:
    """Found in a few hundredths of a second. What the processor says of itself does not tell: of two with AVX512-BF16,
    one takes a fourth of float32's time for bfloat16, the other twice as much."""
    factors = {name: torch.ones(512, 512, dtype=dtype) for name, dtype in _DTYPES.items()}
    least = dict.fromkeys(_DTYPES, float("inf"))
    for _ in range(_ROUNDS):
        for name, factor in factors.items():
            begin = time.perf_counter()
            torch.mm(factor, factor)
            least[name] = min(least[name], time.perf_counter() - begin)
    return min(least, key=least.__getitem__)


def peak_memory_mb() -> float:
    """The most memory that this process has held at one time (resident)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def trim_memory() -> None:
    """Give the system back what the heap holds and does not use. Steps differ in size, so holes between blocks grow
    over hundreds of steps to twice what one step needs."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
