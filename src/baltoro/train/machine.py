"""Settings of the process that decide speed and reproducibility."""

import ctypes
import os
import platform
import resource
from pathlib import Path

import torch

_KERNELS = 256
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def prepare_machine(threads: int, dtype: str) -> torch.dtype:
    """Fix the thread count (results are bitwise reproducible for one count) and choose the compute dtype.

    dtype "auto" is bfloat16 where the processor multiplies it in hardware, else float32. Raises ValueError for an
    unknown dtype.
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
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16() else torch.float32
    if dtype not in choices:
        raise ValueError(f"dtype is {dtype}; it must be auto, float32 or bfloat16")
    return choices[dtype]


def peak_memory_mb() -> float:
    """The most memory that this process has held at one time (resident)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def trim_memory() -> None:
    """Give the system back what the heap holds and does not use. Steps differ in size, so holes between blocks grow
    over hundreds of steps to twice what one step needs."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _has_bfloat16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text() for flag in ("avx512_bf16", "amx_bf16"))
