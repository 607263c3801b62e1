"""Devices that one CPU simulates. Imports no JAX: what it returns has to be set before JAX is imported."""

import os
import re
from collections.abc import Mapping

# A device holds a thread while it waits for others in a collective, and collectives that do not depend on one another
# wait at the same time. With one thread a device all of them can come to wait, and XLA ends the process.
THREADS_PER_DEVICE = 4


def simulated_devices(count: int, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables under which JAX takes the CPU for several devices.

    Args:
        count: number of devices.
        environment: its other `XLA_FLAGS` are kept, and so is its `NPROC` if that is more; None is this process's.

    Returns:
        `JAX_PLATFORMS`, `XLA_FLAGS`, and `NPROC`, XLA's number of threads on a CPU. Left to itself, XLA makes as many
        as there are cores or devices, and a program with several independent collectives can wait for itself.

    Example:
        >>> simulated_devices(2, {"XLA_FLAGS": "--xla_dump_to=out"})
        {'JAX_PLATFORMS': 'cpu',
         'XLA_FLAGS': '--xla_dump_to=out --xla_force_host_platform_device_count=2',
         'NPROC': '8'}
    """
    environment = os.environ if environment is None else environment
    others = re.sub(r"\s*--xla_force_host_platform_device_count=\d+", "", environment.get("XLA_FLAGS", ""))
    threads = max(THREADS_PER_DEVICE * count, int(environment.get("NPROC", 0)))
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{others} --xla_force_host_platform_device_count={count}".strip(),
        "NPROC": str(threads),
    }
