"""Devices that one CPU simulates. Imports no JAX: what it returns has to be set before JAX is imported."""

import os
import re
from collections.abc import Mapping

# Devices that wait for one another in a collective each hold a thread. Collectives that do not depend on one another wait at
# the same time, so that one thread a device is too few: all of them wait, and after 40 seconds XLA ends the process.
THREADS_PER_DEVICE = 4


def simulated_devices(count: int, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables under which JAX takes the CPU for several devices.

    Args:
        count: number of devices.
        environment: whose other `XLA_FLAGS` are kept, and whose `NPROC` is kept where it has enough threads; that of this
            process if None.

    Returns:
        `JAX_PLATFORMS`, `XLA_FLAGS` and `NPROC`, the number of threads that XLA makes on a CPU. By default it makes as many as
        there are cores or devices, whichever is more, and a program with several independent collectives can then wait for
        itself.

    Example:
        >>> simulated_devices(2, {"XLA_FLAGS": "--xla_dump_to=/dev/null"})
        {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_dump_to=/dev/null --xla_force_host_platform_device_count=2', 'NPROC': '8'}
    """
    environment = os.environ if environment is None else environment
    others = re.sub(r"\s*--xla_force_host_platform_device_count=\d+", "", environment.get("XLA_FLAGS", ""))
    threads = max(THREADS_PER_DEVICE * count, int(environment.get("NPROC", 0)))
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{others} --xla_force_host_platform_device_count={count}".strip(),
        "NPROC": str(threads),
    }
