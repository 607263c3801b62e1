"""The figures that the losses are to reach, each with the problem that shows it.

Ratios are of one run on one machine; memory is what the compiler sets aside for intermediate results.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from benchmarks import collectives
from benchmarks.cases import FAMILIES, Shape
from benchmarks.measure import Row

MIB = 2**20


@dataclass(frozen=True)
class Figure:
    """One number to reach.

    Attributes:
        asked: the requirement in words, such as ">= 3 x torch's speed".
        measured: reads the number from the row of our loss; KeyError where it could not be measured.
        bound: what the number is held against.
        at_least: whether the number is to be large.
    """

    asked: str
    measured: Callable[[Row], float]
    bound: float
    at_least: bool

    def judged(self, row: Row) -> Row:
        """The figure asked for, the one measured, and whether it is met; None where there is no measurement."""
        try:
            measured = self.measured(row)
        except KeyError:
            return {"asked": self.asked, "measured": None, "met": None}
        met = measured >= self.bound if self.at_least else measured <= self.bound
        return {"asked": self.asked, "measured": measured, "met": met}


def speed(times: float, peer: str = "plain") -> Figure:
    """At least so many times as fast as a peer."""
    return Figure(f">= {times:g} x the speed of {peer}", lambda row: row["times_faster_than"][peer], times, True)


def time_share(share: float, peer: str) -> Figure:
    """At most this share of a peer's time."""
    return Figure(f"<= {share:g} x the time of {peer}", lambda row: 1 / row["times_faster_than"][peer], share, False)


def slower_one_share(share: float, first: str, second: str) -> Figure:
    """At most this share of the time of the slower of two peers."""

    def measured(row: Row) -> float:
        return 1 / max(row["times_faster_than"][first], row["times_faster_than"][second])

    return Figure(f"<= {share:g} x the time of the slower of {first}, {second}", measured, share, False)


def of_limit(share: float, limit: str) -> Figure:
    """At least this share of the speed of a program that shows the limit."""
    return Figure(f">= {share:g} of the speed of {limit}", lambda row: row["share_of_limit"][limit], share, True)


def memory(mib: float) -> Figure:
    """At most so much temporary memory."""
    return Figure(f"<= {mib:g} MiB", lambda row: row["temporary_bytes"] / MIB, mib, False)


def smaller(times: float, peer: str = "plain") -> Figure:
    """At most 1/times of a peer's temporary memory, also where the peer is too large to run."""
    return Figure(f">= {times:g} x less memory than {peer}", lambda row: row["times_smaller_than"][peer], times, True)


def runs() -> Figure:
    """It runs at all; the number is its seconds."""
    return Figure("runs (seconds)", lambda row: row["median_seconds"], float("inf"), False)


@dataclass(frozen=True)
class Target:
    """Figures for one loss at one shape."""

    loss: str
    shape: Shape
    figures: tuple[Figure, ...]


PAIR_MEMORY = {8192: memory(40), 16384: memory(64), 65536: memory(200)}
"""By rows; the same for all losses over pairs that are computed in blocks."""

_SPEEDS_OF_GEOMETRY = {64: 250, 256: 40, 1024: 6}
"""Of geometric consistency over its plain form with 4,096 rows, by width."""

_MAPS = {"mse": (speed(3.5), smaller(20)), "kl": (speed(2.7), smaller(15))}

TARGETS = (
    Target("info_nce", (512, 512), (speed(200, "optax ntxent"), smaller(400, "optax ntxent"))),
    Target("info_nce", (4096, 512), (of_limit(0.95, "products alone"),)),
    Target("info_nce", (4096, 128), (of_limit(0.90, "products alone"),)),
    Target("info_nce", (8192, 512), (speed(1.0), speed(3.0, "torch"), PAIR_MEMORY[8192])),
    Target("info_nce", (16384, 512), (speed(2.0), PAIR_MEMORY[16384])),
    Target("info_nce", (65536, 512), (runs(), PAIR_MEMORY[65536])),
    *(
        Target(f"gamma_contrastive_{order}", (rows, 512), (time_share(0.95, "info_nce"), *figures))
        for order in ("updated", "previous")
        for rows, figures in ((4096, ()), *((rows, (most,)) for rows, most in PAIR_MEMORY.items()))
    ),
    Target("sigmoid_contrastive", (4096, 512), (speed(1.0),)),
    Target("sigmoid_contrastive", (8192, 512), (speed(1.0), PAIR_MEMORY[8192])),
    Target("sigmoid_contrastive", (16384, 512), (speed(1.0), PAIR_MEMORY[16384])),
    Target("sigmoid_contrastive", (65536, 512), (runs(), PAIR_MEMORY[65536])),
    *(Target("geometric_consistency", (4096, width), (speed(times),)) for width, times in _SPEEDS_OF_GEOMETRY.items()),
    Target("geometric_consistency", (16384, 512), (speed(120), memory(20))),
    Target("geometric_consistency", (65536, 512), (runs(), memory(20))),
    *(
        target
        for variant, figures in _MAPS.items()
        for target in (
            Target(f"attention_maps_{variant}", (32, 12, 6, 197, 197), figures),
            Target(f"attention_maps_{variant}", (8, 16, 8, 577, 577), (speed(1.4), smaller(4))),
            Target(f"attention_queries_keys_{variant}", (1, 12, 6, 4096, 64), (speed(2.5), smaller(50))),
        )
    ),
    Target("uniformity", (8192, 512), (speed(1.8), smaller(8))),
    Target(
        "orthogonality_and_bridge",
        (65536, 512),
        (slower_one_share(1.25, "orthogonality alone", "bridge alone"), of_limit(0.7, "copy alone")),
    ),
)


@dataclass(frozen=True)
class ShardedTarget:
    """What a loss may exchange and hold on each of the devices that its rows are split over.

    Attributes:
        placement: who says what is exchanged.
        reduced: D x D matrices that its one all-reduce may hold.
        mib: temporary memory per device.
    """

    loss: str
    placement: collectives.Placement
    shape: tuple[int, int]
    reduced: int
    mib: float

    def judged(self, *, smoke: bool) -> Row:
        """A row of what is exchanged and held, and how it is judged."""
        rows, width = map(min, self.shape, FAMILIES[self.loss].smallest) if smoke else self.shape
        found = collectives.in_subprocess(self.loss, self.placement, rows, width)
        return {
            "kind": "sharded",
            "loss": self.loss,
            "shape": {"rows": rows, "width": width},
            **found,
            "figures": [figure.judged(found) for figure in self._figures(width)],
        }

    def _figures(self, width: int) -> tuple[Figure, ...]:
        def of(kind: str) -> Callable[[Mapping[str, Any]], Sequence[int]]:
            return lambda row: [each["elements"] for each in row["collectives"] if each["operation"] == kind]

        def others(row: Row) -> float:
            return sum(each["operation"] != "all-reduce" for each in row["collectives"])

        # The scalars of the loss may travel with the matrices.
        return (
            Figure("<= 1 all-reduce", lambda row: len(of("all-reduce")(row)), 1, False),
            Figure(
                f"<= {self.reduced} D x D matrices in it",
                lambda row: sum(of("all-reduce")(row)) // width**2,
                self.reduced,
                False,
            ),
            Figure("no other exchange", others, 0, False),
            memory(self.mib),
        )


SHARDED_TARGETS = tuple(
    ShardedTarget("geometric_consistency", placement, (32768, 512), reduced=3, mib=40)
    for placement in get_args(collectives.Placement)
)
