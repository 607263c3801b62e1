"""Accelerators: what a chip can do, and how many of them are one topology."""

import importlib.util
import math
import re
from typing import NamedTuple

from repkit.checks import InputError, unknown_name


class Chip(NamedTuple):
    """What a device can do at best, as its maker says.

    Attributes:
        memory: bytes.
        flops: bfloat16 operations per second.
        memory_bandwidth: bytes per second, read or written.
        link_bandwidth: bytes per second that a ring over one axis of the network carries, both directions together.
        clock: cycles per second of a TPU's core, `flops` by what its matrix units do in a cycle; none for a GPU.
        slices: for a TPU, from the number in a topology's name to the shape of that many chips.
    """

    memory: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    clock: float | None
    slices: dict[int, str] | None


_GIB = 2.0**30
_SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# v4 slices are named by their cores, two to a chip.
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"}

CHIPS = {
    "v4": Chip(32 * _GIB, 275e12, 1.2e12, 9e10, 1.05e9, _CUBES),
    "v5e": Chip(16 * _GIB, 197e12, 0.81e12, 9e10, 1.5e9, _SQUARES),
    "v6e": Chip(32 * _GIB, 918e12, 1.64e12, 1.8e11, 1.75e9, _SQUARES),
    "a100": Chip(80e9, 312e12, 2.0e12, 6e11, None, None),
    "h100": Chip(80e9, 989e12, 3.35e12, 9e11, None, None),
    "h200": Chip(141e9, 989e12, 4.8e12, 9e11, None, None),
}
"""By name. TPUs: Google's documentation, and "How to Scale Your Model" (jax-ml.github.io/scaling-book) for the links.
GPUs: NVIDIA's data sheets, SXM modules, dense; the link is NVLink, so that more than one node is slower."""


class Topology(NamedTuple):
    """Devices of one kind.

    Attributes:
        name: as it was given.
        chip: each of them.
        shape: as the TPU compiler wants it, such as "v5e:16x16"; None for a GPU.
        devices: how many there are.
    """

    name: str
    chip: Chip
    shape: str | None
    devices: int


def topology(name: str) -> Topology:
    """Reads a topology's name.

    Args:
        name: chip and number, such as `v5e-256` or `h100-8`; for a TPU the name of a slice (`v4-512` is 256 chips).

    Raises:
        InputError: for an unknown chip, or a number that there is no slice of.

    Example:
        >>> topology("v5e-256").shape, topology("v4-512").devices, topology("h100-16").devices
        ('v5e:16x16', 256, 16)
    """
    match = re.fullmatch(r"([a-z]+\d+[a-z]?)-(\d+)", name)
    if match is None:
        raise InputError(f"a topology is a chip and a number, such as v5e-256 or h100-8, got '{name}'")
    kind, number = match[1], int(match[2])
    if kind not in CHIPS:
        raise unknown_name("chip", kind, CHIPS)
    chip = CHIPS[kind]
    if chip.slices is None:
        if number < 1:
            raise InputError(f"a topology has at least 1 device, got '{name}'")
        return Topology(name, chip, None, number)
    if number not in chip.slices:
        raise InputError(f"there is no slice '{name}'; there are {', '.join(f'{kind}-{n}' for n in chip.slices)}")
    shape = chip.slices[number]
    return Topology(name, chip, f"{kind}:{shape}", math.prod(map(int, shape.split("x"))))


def has_tpu_compiler() -> bool:
    """Whether the extra `tpu` is installed."""
    return importlib.util.find_spec("libtpu") is not None
