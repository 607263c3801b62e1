"""The benchmarks compare what they say they compare, count what they say they count, and hide no failure."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import accuracy, costs, limits, losses, measure, peers, plots, report, targets, torch_peers
from benchmarks.cases import FAMILIES, VARIANTS
from benchmarks.collectives import Collective, collectives
from benchmarks.measure import Budget, Entrant, Problem

ROOT = Path(__file__).parents[2]
QUICK = Budget(seconds=0.0, memory=None, compiler_options=losses.SMOKE_COMPILER_OPTIONS)

# Programs that run once: compiling is all they cost.
jit = functools.partial(jax.jit, compiler_options=losses.SMOKE_COMPILER_OPTIONS)


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = (sys.executable, "-m", module, *arguments)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_prints_a_table_and_writes_json_lines(tmp_path):
    output = tmp_path / "results.jsonl"
    finished = run("benchmarks.losses", "--smoke", "--only", "brownian_bridge", "--output", str(output))
    assert finished.returncode == 0, finished.stderr
    assert "brownian_bridge: rows" in finished.stdout
    rows = {row["entrant"]: row for row in read(output)}
    assert set(rows) == {"repkit", "torch", "copy alone", "matrix product", "streaming copy"}
    ours = rows["repkit"]
    assert ours["versions"].keys() >= {"python", "jax", "jaxlib", "optax"}
    assert ours["device"] == "cpu"
    assert ours["median_seconds"] > 0
    assert ours["quartiles_seconds"][0] <= ours["median_seconds"] <= ours["quartiles_seconds"][1]
    assert ours["repetitions"] >= 3
    assert ours["compile_seconds"] > 0
    assert ours["temporary_bytes"] >= 0
    assert ours["share_of_limit"]["copy alone"] == pytest.approx(
        rows["copy alone"]["median_seconds"] / ours["median_seconds"]
    )
    assert ours["share_of_machine"]["streaming copy"] == pytest.approx(
        ours["gbytes_per_second"] / rows["streaming copy"]["gbytes_per_second"]
    )


@pytest.mark.slow
def test_a_smoke_run_times_every_loss_and_the_same_losses(tmp_path):
    output = tmp_path / "results.jsonl"
    finished = run("benchmarks.losses", "--smoke", "--output", str(output), "--plot", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    rows = read(output)
    assert {row["loss"] for row in rows} == set(FAMILIES)
    for row in rows:
        assert "median_seconds" in row or row["entrant"].startswith("torch"), row
    for loss in FAMILIES:
        ours, *others = [row for row in rows if row["loss"] == loss and "value" in row]
        for row in others:
            if row["entrant"] in ("plain", "optax cross-entropy", "torch", "pairwise", "torch pairwise"):
                assert row["value"] == pytest.approx(ours["value"], rel=1e-4), (loss, row["entrant"])
    assert (tmp_path / "geometric_consistency.png").exists()


@pytest.mark.slow
def test_a_smoke_run_judges_every_target(tmp_path):
    output = tmp_path / "results.jsonl"
    finished = run("benchmarks.losses", "--smoke", "--targets", "--output", str(output))
    assert finished.returncode == 0, finished.stderr
    judged = [row for row in read(output) if "figures" in row]
    assert len(judged) == len(targets.TARGETS) + len(targets.SHARDED_TARGETS)
    assert "| info_nce" in run("benchmarks.report", str(output), "--figures").stdout


@pytest.mark.slow
def test_the_accuracy_command_writes_a_row_per_form(tmp_path):
    output = tmp_path / "results.jsonl"
    finished = run("benchmarks.accuracy", "--smoke", "--output", str(output))
    assert finished.returncode == 0, finished.stderr
    assert {row["loss"] for row in read(output)} == set(accuracy.SITUATIONS)


def test_names_are_listed_and_unknown_ones_refused(capsys):
    assert losses.main(["--list", "--targets", "--only", "info_nce/8192*"]) == 0
    assert capsys.readouterr().out.split() == ["info_nce/8192x512"]
    with pytest.raises(SystemExit, match="nothing is called 'info_nse"):
        losses.main(["--list", "--only", "info_nse"])


# ---------------------------------------------------------------------------------------------------------------------
# One comparison


def problem(**entrants) -> Problem:
    def entrant(name: str, function) -> Entrant:
        return Entrant(name=name, role="ours" if name == "ours" else "peer", function=function, flops=1e6)

    return Problem(
        loss="sum_of_squares",
        shape={"rows": 64},
        arrays=lambda dtype: (jnp.arange(64, dtype=dtype),),
        learned=1,
        entrants=tuple(entrant(name, function) for name, function in entrants.items()),
    )


def compare(problem: Problem, budget: Budget = QUICK) -> dict[str, dict]:
    rows = measure.compare(problem, measure.machine(16), "float32", budget)
    return {row["entrant"]: row for row in rows}


def square(x):
    return jnp.sum(x**2)


def test_a_failing_entrant_is_shown_and_the_others_go_on(capsys):
    def broken(x):
        raise ValueError("this one is broken")

    rows = compare(problem(ours=square, broken=broken))
    assert rows["broken"]["error"] == "ValueError: this one is broken"
    assert "this one is broken" in capsys.readouterr().err
    assert rows["ours"]["value"] == sum(i**2 for i in range(64))


def test_the_command_ends_with_status_1_if_anything_failed(monkeypatch, capsys):
    def broken(options):
        return [losses.Job("broken/1", lambda: 1 / 0)]

    monkeypatch.setattr(losses, "jobs", broken)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    assert losses.main([]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_entrant_that_needs_too_much_memory_is_skipped_with_its_reason(capsys):
    def outer(x):
        return jnp.sum(jnp.sin(x[:, None] - x[None]) @ jnp.cos(x[:, None] + x[None]))

    rows = compare(problem(ours=square, outer=outer), QUICK._replace(memory=4096.0))
    assert "needs" in rows["outer"]["skipped"]
    assert "outer: skipped, needs" in capsys.readouterr().out
    assert rows["outer"]["temporary_bytes"] > 4096
    assert "median_seconds" in rows["ours"]


def test_programs_run_in_turns():
    order = []

    def program(name: str):
        return measure.warm_up(lambda: order.append(name) or np.zeros(()), 0.0)

    programs = {name: program(name) for name in ("first", "second")}
    order.clear()
    timings = measure.in_turns(programs, seconds=0.0)
    calls = [name for name, before in zip(order, [None, *order[:-1]], strict=True) if name != before]
    assert calls == ["first", "second"] * measure.FEWEST
    assert timings["first"]["repetitions"] == measure.FEWEST


def test_what_a_loss_returns_beside_its_value_is_computed():
    (value, rest), gradients = measure.value_and_gradients(lambda x, y: (jnp.sum(x * y), y + 1), (1,))(
        jnp.ones(2), jnp.full(2, 3.0)
    )
    np.testing.assert_array_equal(value, 6.0)
    np.testing.assert_array_equal(rest, [4.0, 4.0])
    np.testing.assert_array_equal(gradients[0], [1.0, 1.0])


# ---------------------------------------------------------------------------------------------------------------------
# Peers and limits


@pytest.mark.slow
@pytest.mark.parametrize("loss", FAMILIES)
def test_peers_have_the_value_and_the_gradients_of_our_loss(loss):
    family = FAMILIES[loss]
    case = family.problem(*family.smallest)
    ours, *others = [entrant for entrant in case.entrants if entrant.name in ("repkit", "plain", "pairwise")]
    arrays = case.arrays("float32")
    functions = [measure.value_and_gradients(each.function, tuple(range(case.learned))) for each in (ours, *others)]
    (expected, _), gradients = jit(functions[0])(*arrays)
    for function in functions[1:]:
        (value, _), peer_gradients = jit(function)(*arrays)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for mine, peer in zip(gradients, peer_gradients, strict=True):
            np.testing.assert_allclose(peer, mine, rtol=1e-3, atol=1e-5 * float(jnp.max(jnp.abs(mine))))


@pytest.mark.parametrize("loss", FAMILIES)
def test_torch_peers_have_the_value_and_the_gradients_of_our_loss(loss):
    pytest.importorskip("torch")
    family = FAMILIES[loss]
    case = family.problem(*family.smallest)
    learned, arrays = tuple(range(case.learned)), case.arrays("float32")
    (expected, _), gradients = jit(measure.value_and_gradients(case.entrants[0].function, learned))(*arrays)
    for entrant in case.entrants:
        if entrant.package == "torch":
            program = torch_peers.value_and_gradients(entrant.function, learned, arrays)
            assert torch_peers.temporary_bytes(program) > 0
            value, *peer_gradients = program()
            np.testing.assert_allclose(value, expected, rtol=1e-5)
            for mine, peer in zip(gradients, peer_gradients, strict=True):
                np.testing.assert_allclose(peer, mine, rtol=1e-3, atol=1e-5 * float(jnp.max(jnp.abs(mine))))


PLAIN_FLOPS = {
    "info_nce": (peers.info_nce, [(256, 512)] * 2 + [()], costs.pair_flops(256, 512, products=3)),
    "cyclip": (peers.cyclip, [(256, 512)] * 2, costs.pair_flops(256, 512, products=9)),
    "sigmoid_contrastive": (
        peers.sigmoid_contrastive,
        [(256, 512)] * 2 + [()] * 2,
        costs.pair_flops(256, 512, products=3),
    ),
    "uniformity": (peers.uniformity, [(256, 512)] * 2, costs.pair_flops(256, 512, products=6)),
}


@pytest.mark.parametrize("peer", PLAIN_FLOPS)
def test_the_stated_operations_are_those_that_the_compiler_counts(peer):
    function, shapes, flops = PLAIN_FLOPS[peer]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    lowered = jax.jit(measure.value_and_gradients(function, tuple(range(len(shapes))))).lower(*arrays)
    counted = lowered.cost_analysis()["flops"]
    # The compiler also counts what is not a matrix product.
    assert flops <= counted <= 1.05 * flops


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stated_operations_of_attention_are_those_that_the_compiler_counts(variant):
    maps = [jax.ShapeDtypeStruct((2, heads, 32, 32), jnp.float32) for heads in (24, 48)]
    plain = measure.value_and_gradients(functools.partial(peers.attention_maps, variant=variant), (0,))
    counted = jax.jit(plain).lower(*maps).cost_analysis()["flops"]
    assert 1 <= counted / costs.attention_map_flops(2, 48, 24, 32 * 32) <= 1.15
    vectors = [jax.ShapeDtypeStruct((2, heads, 32, 128), jnp.float32) for heads in (24, 24, 48, 48)]
    plain = measure.value_and_gradients(functools.partial(peers.attention_queries_keys, variant=variant), (0, 1))
    counted = jax.jit(plain).lower(*vectors).cost_analysis()["flops"]
    assert 1 <= counted / costs.plain_queries_keys_flops(2, 48, 24, 32, 128) <= 1.15


@pytest.mark.parametrize("size", [6, 24])
def test_limits_make_all_the_products(size):
    x, y = np.random.default_rng(0).normal(size=(2, 24, 5))
    scores, total, tolerance = x @ y.T, x.T @ x, {"rtol": 1e-4, "atol": 1e-4}
    for program in (limits.pair_products, limits.pair_products_twice):
        *_, by_x, by_y = jit(program(size))(jnp.asarray(x), jnp.asarray(y))
        np.testing.assert_allclose(by_x, scores @ y, **tolerance)
        np.testing.assert_allclose(by_y, scores.T @ x, **tolerance)
    by_x, by_y = jit(limits.gram_products(size))(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(by_x, x @ (y.T @ y), **tolerance)
    np.testing.assert_allclose(by_y, y @ total, **tolerance)
    both = jit(limits.symmetric_products(size))(jnp.asarray(x))[0]
    # The blocks on the diagonal meet both of their sides.
    diagonal = np.concatenate([part @ part.T @ part for part in np.split(x, 24 // size)])
    np.testing.assert_allclose(both, x @ x.T @ x + diagonal, **tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Exchanges between devices


def test_exchanges_are_read_from_the_program_text():
    text = """
      %all-reduce.1 = f32[512,512]{1,0} all-reduce(%dot.1), channel_id=1, replica_groups=[1,8]<=[8]
      %all-reduce.2 = (f32[8,8]{1,0}, f32[]) all-reduce(%a, %b), channel_id=2
      %gather = bf16[16,4]{1,0} all-gather(%p), dimensions={0}
      ROOT %copy = f32[16]{0} copy(%all-reduce.1)
      %start = f32[7]{0} all-reduce-start(%x)
      %done = f32[7]{0} all-reduce-done(%start)
    """
    assert collectives(text) == [
        Collective("all-reduce", 512 * 512),
        Collective("all-reduce", 65),
        Collective("all-gather", 64),
        Collective("all-reduce", 7),
    ]


def test_exchanges_of_a_compiled_program_are_found():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    gram = jax.jit(lambda x: x.T @ x).lower(x).compile().as_text()
    assert collectives(gram) == [Collective("all-reduce", 16)]
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P())).lower(x).compile().as_text()
    assert collectives(whole) == [Collective("all-gather", 64)]


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for, tables, figures


def test_figures_are_judged_by_their_bound():
    row = {"times_faster_than": {"plain": 2.0, "first": 4.0, "second": 0.8}, "temporary_bytes": 30 * 2**20}
    assert targets.speed(1.5).judged(row)["met"] is True
    assert targets.speed(2.5).judged(row)["met"] is False
    assert targets.speed(1.0, "torch").judged(row) == {
        "asked": ">= 1 x the speed of torch",
        "measured": None,
        "met": None,
    }
    assert targets.memory(40).judged(row)["met"] is True
    assert targets.memory(20).judged(row)["met"] is False
    assert targets.slower_one_share(1.25, "first", "second").judged(row)["measured"] == pytest.approx(0.25)


def test_results_become_a_table_and_figures(tmp_path):
    about = measure.about()
    rows = [about | row for row in compare(problem(ours=square, plain=lambda x: square(jnp.sin(x)))).values()]
    table = report.markdown(rows, figures=False)
    assert "| sum_of_squares: rows 64, float32 |" in table
    assert "plain" in table
    pairs = [row | {"loss": "geometric_consistency", "shape": {"rows": n, "width": 8}} for row in rows for n in (4, 8)]
    named = [row | {"entrant": {"ours": "repkit"}.get(row["entrant"], row["entrant"])} for row in pairs]
    assert [path.name for path in plots.draw_all(named, tmp_path)] == ["geometric_consistency.png"]


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy


def test_the_reference_keeps_its_digits_where_the_plain_form_loses_them():
    situation = list(accuracy.info_nce_situations(48, 16))[-1]
    rows = {row["form"]: row for row in accuracy.errors(situation, "float32")}
    assert rows["repkit"]["value"] == pytest.approx(1e-11, rel=0.1)
    assert rows["repkit"]["value_error"] < 1e-4
    assert rows["plain"]["value_error"] > 0.1
