"""Describe this machine and process: cores, CPU flags, peak memory, and the environment record of every result."""

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

# Parts of the names of SIMD and matrix instruction sets, on which the speed of array code depends.
_SIMD = ("sse4", "ssse3", "avx", "fma", "f16c", "amx", "neon", "asimd", "sve", "i8mm", "bf16", "dotprod")


def environment() -> dict[str, object]:
    """Return the environment record of a result: commit, versions, processor, device, load, peak memory, date."""
    import jax

    name, flags = _cpu()
    return {
        **_revision(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "cpu": name,
        "cpu_flags": list(flags),
        "cores": cores(),
        "device": jax.devices()[0].device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "peak_memory_bytes": peak_memory_bytes(),
        **_peak_device_memory(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peak_memory_bytes() -> int:
    """Return the peak memory of this process in bytes, since the last forget_peak_memory() if there was one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _peak_device_memory() -> dict[str, int]:
    """Return the peak memory of this process on an accelerator, or {} for a device that does not report it (a CPU)."""
    import jax

    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {} if peak is None else {"peak_device_bytes": peak}


def forget_peak_memory() -> None:
    """Reset the peak memory to the memory in use now. Only Linux can; elsewhere this does nothing."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _revision() -> dict[str, object]:
    """Return the commit of this checkout and whether files differ from it; both None for an installed copy."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():  # else git would describe a repository that contains the installation
        return {"commit": None, "dirty": None}
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


@functools.cache
def cpu_flags() -> tuple[str, ...]:
    """Return the processor's SIMD instruction sets, by the operating system's names, in lower case."""
    return _cpu()[1]


def _cpu() -> tuple[str, tuple[str, ...]]:
    """Return the processor's name and its SIMD instruction sets, from Linux's /proc or macOS's sysctl."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        name = _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
        words = (_output("sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features") or "").split()
    else:
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name = facts.get("model name") or platform.machine()
        words = (facts.get("flags") or facts.get("Features") or "").split()  # x86, ARM
    simd = {word.lower() for word in words if any(part in word.lower() for part in _SIMD)}
    return name, tuple(sorted(simd))


def cores() -> int:
    """Return how many cores this process may use; a container may limit them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _output(*command: str) -> str | None:
    """Return what a command prints, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
