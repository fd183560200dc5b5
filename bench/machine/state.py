"""The machine before, during and after a case: load, clocks, CPU time taken away, what throttles the GPU.

A pair that was measured while the machine was busy elsewhere is no evidence; :class:`Watch` says so and why.
Try: ``python -c "from bench.machine.state import sample; print(sample())"``.
"""

from __future__ import annotations

import datetime
import os
import resource
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil

from reports.comparison import GpuState, MachineState

REASONS = {
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
"""NVML's bits; an idle GPU (0x1) and clocks that its user set (0x2) disturb nothing."""


@dataclass(frozen=True)
class Limits:
    """Beyond which a pair is disturbed: shares of all the cores' time, stolen and used by other processes."""

    steal: float = 0.02
    others: float = 0.10


@cache
def _nvml() -> Any:
    """NVML, or None where there is no nvidia-ml-py or no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # the library's own error class is not there without it
        return None
    return pynvml


def _gpus() -> list[GpuState]:
    nvml = _nvml()
    found = []
    for index in range(nvml.nvmlDeviceGetCount() if nvml else 0):
        device = nvml.nvmlDeviceGetHandleByIndex(index)

        def ask(name: str, *arguments: Any, device: Any = device) -> float | None:
            try:
                return float(getattr(nvml, name)(device, *arguments))
            except nvml.NVMLError:
                return None

        newer = hasattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons")  # the name since driver 535
        bits = int(ask(f"nvmlDeviceGetCurrentClocks{'Event' if newer else 'Throttle'}Reasons") or 0)
        power = ask("nvmlDeviceGetPowerUsage")
        name = nvml.nvmlDeviceGetName(device)
        found.append(
            GpuState(
                index=index,
                name=name if isinstance(name, str) else name.decode(),
                sm_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
                memory_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
                power_w=None if power is None else power / 1000,
                temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
                throttle_reasons=[text for bit, text in REASONS.items() if bits & bit],
            )
        )
    return found


def _cpu_mhz() -> float | None:
    """Mean clock of the cores; None where the system does not tell."""
    try:
        found = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return None
    return float(found.current) if found and found.current else None


def sample() -> MachineState:
    """The machine now."""
    return MachineState(
        at_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        load_1m=os.getloadavg()[0],
        cpu_mhz=_cpu_mhz(),
        available_memory_bytes=psutil.virtual_memory().available,
        gpus=_gpus(),
    )


def _cpu_seconds() -> tuple[float, float]:
    """Seconds since boot, over all cores: working for anybody here, and stolen by the hypervisor."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq, times.steal


def _own_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


@dataclass(frozen=True)
class Disturbance:
    """What the machine did between two moments; ``reason`` is empty when the case counts."""

    steal: float
    others: float
    reason: str


class Watch:
    """Between its making and :meth:`stop`, one child of this process is run and waited for."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.before = limits, sample()
        self._cpu, self._own, self._wall = _cpu_seconds(), _own_seconds(), time.perf_counter()

    def stop(self) -> tuple[MachineState, Disturbance]:
        """The machine after, and whether it was disturbed meanwhile."""
        wall = (time.perf_counter() - self._wall) * (os.cpu_count() or 1)
        busy, steal = (now - before for now, before in zip(_cpu_seconds(), self._cpu, strict=True))
        others = max(0.0, busy - (_own_seconds() - self._own)) / wall
        steal = max(0.0, steal) / wall
        after = sample()
        return after, Disturbance(steal, others, disturbance(self.limits, steal, others, self.before, after))


def disturbance(limits: Limits, steal: float, others: float, before: MachineState, after: MachineState) -> str:
    """Why a case is not to be trusted; empty when it is."""
    said = []
    for title, value, limit in (("steal", steal, limits.steal), ("load from others", others, limits.others)):
        if value > limit:
            said.append(f"{title} {100 * value:.1f} % above {100 * limit:g} %")
    throttled = {
        f"GPU {g.index} throttled ({', '.join(g.throttle_reasons)})"
        for g in before.gpus + after.gpus
        if g.throttle_reasons
    }
    return "; ".join([*said, *sorted(throttled)])
