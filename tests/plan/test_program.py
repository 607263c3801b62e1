"""What a program costs, from texts as compilers write them and from traced operations."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from repkit.plan.program import Exchange, program_costs, traced_flops

# A loop of three turns, one of which the other way of writing groups; a fused exchange; an asynchronous one.
PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[2,16]) -> f32[2,2] {
  %p = f32[2,16]{1,0} parameter(0)
  ROOT %dot = f32[2,2]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%scattered (q: f32[8,4]) -> f32[2,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[2,4]{1,0} reduce-scatter(%q), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}

%body (param: (s32[], f32[2,16])) -> (s32[], f32[2,16]) {
  %param = (s32[], f32[2,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%param), index=0
  %x = f32[2,16]{1,0:T(8,128)} get-tuple-element(%param), index=1
  %ring = f32[2,16]{1,0:T(8,128)} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %y = f32[2,2]{1,0} fusion(%ring), kind=kLoop, calls=%fused
  ROOT %out = (s32[], f32[2,16]{1,0}) tuple(%i, %ring)
}

%condition (param.1: (s32[], f32[2,16])) -> pred[] {
  %param.1 = (s32[], f32[2,16]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: f32[2,16]) -> f32[2,16] {
  %x = f32[2,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[2,16]{1,0}) tuple(%zero, %x)
  %loop = (s32[], /*index=1*/f32[2,16]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %gathering = (bf16[4]{0}, bf16[32]{0:S(1)}) all-gather-start(%x), replica_groups=[2,8]<=[16], dimensions={0}
  %gathered = bf16[32]{0} all-gather-done(%gathering)
  %small = f32[2,4]{1,0} fusion(%x), kind=kCustom, calls=%scattered
  %total = f32[5]{0} all-reduce(%x), replica_groups=mesh['data'=4,'tensor'=2] {'data'}, to_apply=%add
  %part = f32[5]{0} all-reduce(%x), replica_groups=mesh['a'=16] {'a':(2)4}, to_apply=%add
  ROOT %result = f32[2,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_exchanges_are_found_in_loops_in_fusions_and_in_two_halves():
    assert set(program_costs(PROGRAM).exchanges) == {
        Exchange("collective-permute", 0, 128, 3),
        Exchange("all-gather", 8, 64, 1),
        Exchange("reduce-scatter", 4, 32, 1),
        Exchange("all-reduce", 4, 20, 2),
    }


def test_what_a_device_sends_follows_the_ring():
    assert Exchange("all-reduce", 4, 100, 2).sent == 2 * 2 * 75
    assert Exchange("all-gather", 4, 100, 1).sent == 75
    assert Exchange("reduce-scatter", 4, 25, 1).sent == 75
    assert Exchange("collective-permute", 0, 100, 3).sent == 300


def test_traffic_takes_a_loop_as_often_as_it_runs_and_the_inside_of_a_fusion_not_at_all():
    loop_turn = (128 + 128) + (16 + 128)  # the permutation and the fusion: what each reads and writes
    entry = (8 + 128) + (32 + 128) + 2 * (20 + 128)  # what is gathered stays on the chip
    assert program_costs(PROGRAM).traffic == 3 * loop_turn + entry


# As the TPU's compiler writes it: the number of turns stands in the condition alone.
COUNTED = PROGRAM.replace(
    "  ROOT %less = pred[] constant(true)",
    """  %end = s32[]{:T(128)} constant(7)
  %counter = s32[]{:T(128)} get-tuple-element(%param.1), index=0
  ROOT %less = pred[] compare(%counter, %end), direction=LT""",
).replace('backend_config={"known_trip_count":{"n":"3"}}', "metadata={}")


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (COUNTED, 7),
        (COUNTED.replace("tuple(%zero, %x)", "tuple(%copied, %x)").replace(
            "  %start =", "  %two = s32[] constant(2)\n  %copied = s32[] copy(%two)\n  %start ="
        ), 5),
        (COUNTED.replace("direction=LT", "direction=NE"), 1),
        (COUNTED.replace("s32[]{:T(128)} constant(7)", "s32[]{:T(128)} get-tuple-element(%param.1), index=0"), 1),
    ],
    ids=["from zero", "from two", "until something else", "to what is not known"],
)  # fmt: skip
def test_turns_of_a_loop_are_read_from_its_condition(text, turns):
    assert text != PROGRAM
    assert Exchange("collective-permute", 0, 128, turns) in program_costs(text).exchanges
    known = {exchange.operation for exchange in program_costs(text, "least").exchanges}
    assert ("collective-permute" in known) == (turns > 1)


def test_of_a_choice_the_dearest_branch_counts():
    text = """
%cheap (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %a = f32[4]{0} all-reduce(%p), replica_groups=[1,2]<=[2]
}

%dear (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %all = f32[8]{0} all-gather(%q), replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %b = f32[4]{0} slice(%all), slice={[0:4]}
}

ENTRY %main (c: pred[], x: f32[4]) -> f32[4] {
  %c = pred[] parameter(0)
  %x = f32[4]{0} parameter(1)
  ROOT %chosen = f32[4]{0} conditional(%c, %x, %x), branch_computations={%cheap, %dear}
}
"""
    assert program_costs(text).exchanges == (Exchange("all-gather", 2, 32, 1),)
    assert program_costs(text).traffic == (16 + 32) + (32 + 16)
    assert program_costs(text, "least").exchanges == (Exchange("all-reduce", 2, 16, 1),)


def test_cycles_are_those_that_the_compiler_estimates_outside_of_fusions():
    text = """
%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %twice = f32[4]{0} add(%p, %p), backend_config={"window_config":{"estimated_cycles":"1000"}}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %start = (f32[4]{0:T(128)S(1)}, f32[4]{0}, u32[]{:S(2)}) copy-start(%x)
  %here = f32[4]{0:T(128)S(1)} copy-done(%start)
  ROOT %y = f32[4]{0} fusion(%here), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"20","iteration_bounds":["1"]}}
}
"""
    costs = program_costs(text)
    assert costs.cycles == 20
    # Fetched from memory once, with a counter; read where it then is, and written back.
    assert costs.traffic == (16 + 4) + 16


def test_an_empty_text_costs_nothing():
    assert program_costs("").exchanges == ()


def test_products_in_loops_choices_and_gradients_are_counted():
    x = jnp.ones((4, 4))
    product = 2 * 4**3

    def flops(function):
        return traced_flops(jax.make_jaxpr(function)(x))

    assert flops(lambda x: x @ x) == product
    assert flops(lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, None, 5)[0]) == 5 * product
    assert flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x)) == 2 * product
    assert flops(jax.jit(lambda x: x @ x)) == product
    repeated = lambda x: jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ x, x)  # noqa: E731
    chosen = lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, repeated(x))  # noqa: E731
    assert flops(chosen) == 3 * product
    assert traced_flops(jax.make_jaxpr(chosen)(x), "least") == product
    # Forward, both gradients; computed again, the forward once more.
    square = lambda x: jnp.sum(jnp.sin(x @ x) ** 2)  # noqa: E731
    assert flops(jax.grad(square)) == 3 * product
    assert flops(jax.grad(jax.checkpoint(square))) == 4 * product
    kernel = jnp.ones((3, 3, 2, 5))
    convolution = lambda x: jax.lax.conv_general_dilated(  # noqa: E731
        jnp.ones((1, 8, 8, 2)), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops(convolution) == 2 * 8 * 8 * 5 * 3 * 3 * 2


@pytest.mark.parametrize("axes", [("data",), ("data", "tensor")])
def test_products_of_each_device_add_up(axes):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), (AxisType.Auto,) * 2)
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P(axes), out_specs=P(axes))
    rows = 16 // (4 if axes == ("data",) else 8)
    # Over an axis that rows are not split over the work is repeated.
    assert traced_flops(jax.make_jaxpr(split)(jnp.ones((16, 4)))) == 8 * 2 * rows * rows * 4
