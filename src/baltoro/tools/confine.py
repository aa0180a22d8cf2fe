"""Runs untrusted Python so that it sees an interpreter, its own files and nothing else. Linux, no privileges needed.

Started as a script by `tools/python.py`: `python -I -S confine.py CPU_S MEMORY WORK PREFIX`, where PREFIX is the
sys.prefix of the interpreter, which -S hides. Standard input: 8 bytes (big endian, length of the code), the code, then
the content of image.npy, which may be empty.

The code gets new user, network, mount, pid, ipc and uts namespaces: no network device, no process but its own, and a
root that holds the interpreter and the system's libraries read-only and a folder /sandbox of WORK bytes in memory. It
runs without capabilities and with limits on CPU seconds and address space per process. When it ends, or when this
process or its parent is killed, the kernel kills every process that it left behind. Where the kernel refuses any of
this, nothing runs: the reason goes to standard error and the exit status is 1. (The code's own standard error goes to
standard output.)

Not bounded here: the sum of memory over many processes where the user is root (RLIMIT_NPROC does not hold for root).
"""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 1 << 12, 1 << 14, 1 << 18
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_SYS_MOUNT_SETATTR = 442  # the same on every architecture
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_NOBODY = 65534
_SYSTEM = (Path("/usr"), Path("/lib"), Path("/lib64"), Path("/bin"))

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    _check(
        _libc.mount(source.encode(), bytes(target), kind.encode(), ctypes.c_ulong(flags), options.encode()),
        f"mount {target}",
    )


def _read_only(target: Path) -> None:
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, bytes(target), _AT_RECURSIVE, attributes, 32), "mount_setattr")


def _enter_namespaces() -> None:
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEWUSER | _NEWNET | _NEWNS | _NEWPID | _NEWIPC | _NEWUTS), "unshare")
    # Not uid 0 inside: so the exec below drops every capability, and read-only mounts stay read-only.
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{_NOBODY} {uid} 1"),
        ("gid_map", f"{_NOBODY} {gid} 1"),
    ):
        Path(f"/proc/self/{name}").write_text(line)


def _die_with_parent() -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")


def _enter_root(work_bytes: int, prefix: str) -> None:
    _mount("none", Path("/"), "", _MS_REC | _MS_PRIVATE)
    interpreter = {path for each in (prefix, sys.base_prefix) for path in (Path(each), Path(each).resolve())}
    # Opened before anything is mounted, for they may lie where the new root will.
    held = {folder: os.open(folder, os.O_PATH) for folder in sorted({*_SYSTEM, *interpreter}) if folder.exists()}
    links = {folder: folder.readlink() for folder in held if folder.is_symlink()}
    root = Path("/tmp")
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m")
    # A folder that lies in another one of the list comes with it.
    bound: list[Path] = []
    for folder, descriptor in held.items():
        if any(folder.is_relative_to(other) for other in bound):
            continue
        inside = root / folder.relative_to("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        if folder in links:
            inside.symlink_to(links[folder])
            continue
        inside.mkdir()
        _mount(f"/proc/self/fd/{descriptor}", inside, "", _MS_BIND | _MS_REC)
        bound.append(folder)
    work = root / "sandbox"
    work.mkdir()
    _read_only(root)
    _mount("tmpfs", work, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={work_bytes}")
    os.chdir(root)
    # The new root over the old one, which is then let go (pivot_root(2), notes).
    _check(_libc.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/sandbox")


def _run(cpu_s: int, memory_bytes: int) -> None:
    for kind, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_NPROC, 64),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    environment = {"HOME": "/sandbox", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    refusals = os.dup(2)  # not inherited by the code
    os.dup2(1, 2)
    try:
        os.execve(sys.executable, [sys.executable, "-I", "-B", "main.py"], environment)
    except OSError as error:
        os.write(refusals, str(error).encode())
        os._exit(1)


def _forward(pid: int) -> int:
    """Reap until `pid` ends; its exit status, 128 + n for signal n."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main() -> None:
    cpu_s, memory_bytes, work_bytes = map(int, sys.argv[1:4])
    payload = sys.stdin.buffer.read()
    end = 8 + int.from_bytes(payload[:8], "big")
    _enter_namespaces()
    _die_with_parent()  # after unshare, which would undo it
    first = os.fork()
    if first:
        sys.exit(_forward(first))
    # Process 1 of the new pid namespace. It stays between: trusted, unreachable from the code, and the end of all.
    _die_with_parent()
    _enter_root(work_bytes, sys.argv[4])
    for name, content in (("main.py", payload[8:end]), ("image.npy", payload[end:])):
        if content:
            Path(name).write_bytes(content)
    second = os.fork()
    if second:
        os._exit(_forward(second))
    _run(cpu_s, memory_bytes)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.stderr.write(str(error))
        sys.stderr.flush()
        os._exit(1)
