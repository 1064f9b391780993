"""This machine and process: cores, CPU flags, peak memory, and the environment record of every result."""

import contextlib
import functools
import os
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

# Instruction sets that decide how fast array code can be; the rest of a processor's flags is noise.
_SIMD = ("sse4", "ssse3", "avx", "fma", "f16c", "amx", "neon", "asimd", "sve", "i8mm", "bf16", "dotprod")


def environment() -> dict[str, object]:
    """The record that every JSON of ours carries: what ran, on what, how busy it was."""
    import jax

    return {
        **_revision(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        **_cpu(),
        "cores": cores(),
        "device": jax.devices()[0].device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "peak_memory_bytes": peak_memory_bytes(),
        **_peak_device_memory(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peak_memory_bytes() -> int:
    """The most memory that this process has held, since the last forget_peak_memory() where there is one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _peak_device_memory() -> dict[str, int]:
    """The most that this process has held on an accelerator; nothing where the device does not tell, as a CPU."""
    import jax

    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {} if peak is None else {"peak_device_bytes": peak}


def forget_peak_memory() -> None:
    """Let the peak begin at what is held now, where the system can (Linux); elsewhere it stays the process's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _revision() -> dict[str, object]:
    """The commit of this checkout and whether it was changed since; both None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (
        root / ".git"
    ).exists():  # else git would answer for whatever repository we are installed inside of
        return {"commit": None, "dirty": None}
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


@functools.cache
def cpu_flags() -> tuple[str, ...]:
    """The processor's SIMD instruction sets, in the operating system's words, lower case."""
    return tuple(_cpu()["cpu_flags"])


def _cpu() -> dict[str, object]:
    """The processor's name and its SIMD instruction sets: from Linux's /proc, else from macOS's sysctl."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        name = _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
        words = (_output("sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features") or "").split()
    else:
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name = facts.get("model name") or platform.machine()
        words = (facts.get("flags") or facts.get("Features") or "").split()  # x86, ARM
    simd = sorted({word.lower() for word in words if any(part in word.lower() for part in _SIMD)})
    return {"cpu": name, "cpu_flags": simd}


def cores() -> int:
    """Cores that this process may use, which a container may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
