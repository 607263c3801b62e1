"""The gamma-augmented loss: its gradient on average, its memory, its diagnostics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repkit.losses import gamma_contrastive, info_nce, init_memory, sample_rates
from repkit.numerics import normalize
from tests.reference import losses as reference

B, D, N = 8, 4, 20
SCALE = 4.0


def make_pairs(seed: int = 0, rows: int = B, dim: int = D) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(rows, dim))
    texts = images + 0.7 * rng.normal(size=(rows, dim))
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    return images.astype(np.float32), texts.astype(np.float32)


def loss_of(pair, **options):
    return gamma_contrastive(*pair, **({"logit_scale": SCALE, "memory": None} | options))[0]


# ---------------------------------------------------------------------------------------------------------------------
# The gradient


@pytest.mark.parametrize("labels", [None, np.array([0, 1, 1, 3, 4, 5, 0, 1], np.int32)])
def test_the_expected_rate_of_the_batch_gives_the_gradient_of_info_nce(labels):
    where = np.arange(B) != 3
    pair = make_pairs()

    def both(pair):
        expected = info_nce(*pair, logit_scale=SCALE, labels=labels, where=where)
        return expected, loss_of(pair, draw="expected", labels=labels, where=where)

    wanted, got = jax.jit(jax.jacrev(both))(pair)
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)


def test_without_positives_in_the_partition_it_gives_the_gradient_of_the_decoupled_loss():
    def decoupled(pair):
        logits = SCALE * pair[0] @ pair[1].T
        negatives = jnp.where(jnp.eye(B, dtype=bool), -jnp.inf, logits)
        log_sums = jax.nn.logsumexp(negatives, axis=1) + jax.nn.logsumexp(negatives, axis=0)
        return jnp.mean(log_sums / 2 - jnp.diagonal(logits))

    pair = make_pairs()
    wanted = jax.jit(jax.grad(decoupled))(pair)
    got = jax.jit(jax.grad(lambda pair: loss_of(pair, draw="expected", positive_weight=0.0)))(pair)
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)


@functools.partial(jax.jit, static_argnames="positive")
def gradient_draws(pair, shape, positive):
    """The gradients [2000 b d] that 2000 keys give."""

    def gradient(key):
        return jax.grad(lambda pair: loss_of(pair, key=key, positive=positive, shape=shape))(pair)

    return jax.vmap(gradient)(jax.random.split(jax.random.key(1), 2000))


@jax.jit
def expected_gradient(pair):
    return jax.grad(lambda pair: loss_of(pair, draw="expected"))(pair)


@pytest.mark.parametrize(
    ("positive", "shape"),
    [
        pytest.param("expected", 1.0, marks=pytest.mark.slow),
        ("sampled", 1.0),
        pytest.param("sampled", 0.5, marks=pytest.mark.slow),
    ],
)
def test_the_mean_of_the_sampled_gradient_is_the_exact_one(positive, shape):
    """Over 2000 keys, within 5 standard errors in every component."""
    pair = make_pairs()
    draws = jax.device_get(gradient_draws(pair, shape, positive))
    for exact, each in zip(jax.device_get(expected_gradient(pair)), draws, strict=True):
        error = np.std(each, axis=0) / np.sqrt(len(each))
        assert np.all(np.abs(np.mean(each, axis=0) - exact) < 5 * error)
        assert np.all(error < 0.2 * np.max(np.abs(exact))), "too noisy to tell"


def test_the_positive_in_expectation_is_less_noisy():
    """With well separated pairs, where the positives' own terms are near 1."""
    images = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)
    pair = images, images
    noise = {
        positive: sum(np.sum(np.var(each, axis=0)) for each in jax.device_get(gradient_draws(pair, 1.0, positive)))
        for positive in ("sampled", "expected")
    }
    assert noise["sampled"] > 3**2 * noise["expected"]


@pytest.mark.slow
def test_few_negatives_give_the_gradient_over_all_pairs():
    """With the whole data set's S in the memory, the mean over mini-batches of 4 is the gradient over 16 pairs."""
    n, size = 16, 4
    pair = make_pairs(rows=n)
    logits = SCALE * pair[0] @ pair[1].T
    log_sums = np.log(np.exp(logits).sum(1)), np.log(np.exp(logits).sum(0))
    memory = init_memory(n)._replace(
        image_to_text=jnp.asarray(log_sums[0]), text_to_image=jnp.asarray(log_sums[1]), visited=jnp.ones(n, bool)
    )
    full = jax.device_get(jax.jit(jax.grad(lambda pair: info_nce(*pair, logit_scale=SCALE)))(pair))

    def gradients(loss):
        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, None))
        def draw(key, pair):
            rows_key, key = jax.random.split(key)
            rows = jax.random.choice(rows_key, n, (size,), replace=False)
            return jax.grad(lambda pair: loss(tuple(x[rows] for x in pair), rows, key))(pair)

        return jax.device_get(draw(jax.random.split(jax.random.key(2), 3000), pair))

    def gamma(pair, rows, key):
        return loss_of(pair, memory=memory, example_id=rows, memory_rate=1e-6, key=key)

    def conventional(pair, rows, key):
        return info_nce(*pair, logit_scale=SCALE)

    for exact, each in zip(full, gradients(gamma), strict=True):
        error = np.std(each, axis=0) / np.sqrt(len(each))
        assert np.all(np.abs(np.mean(each, axis=0) - exact) < 5 * error)
    for exact, each in zip(full, gradients(conventional), strict=True):
        assert np.linalg.norm(np.mean(each, axis=0) - exact) > 0.3 * np.linalg.norm(exact)


@pytest.mark.slow
def test_bias_of_the_mean_gradient_of_512_pairs_in_batches_of_five():
    """Relative error of the mean mini-batch gradient against the full one, for a fixed random linear encoder."""
    n, size, steps, warm_up = 512, 5, 40_000, 10_000
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n, 64))
    features = [features.astype(np.float32), (features + 0.5 * rng.normal(size=(n, 64))).astype(np.float32)]
    projection = rng.normal(size=(64, 32)) / 8
    projections = [x.astype(np.float32) for x in (projection, projection + 0.3 * rng.normal(size=(64, 32)) / 8)]

    def embed(projections, rows):
        return [normalize(x[rows] @ w) for x, w in zip(map(jnp.asarray, features), projections, strict=True)]

    full = jax.jit(jax.grad(lambda w: info_nce(*embed(w, jnp.arange(n)), logit_scale=10.0)))(projections)
    logits = 10.0 * np.matmul(*(x if i == 0 else x.T for i, x in enumerate(embed(projections, np.arange(n)))))
    exact = init_memory(n)._replace(
        image_to_text=jax.nn.logsumexp(logits, axis=1),
        text_to_image=jax.nn.logsumexp(logits, axis=0),
        visited=jnp.ones(n, bool),
    )

    def gamma(draw, rate):
        def loss(w, rows, memory, key):
            options = {"memory": memory, "example_id": rows, "memory_rate": rate, "draw": draw, "key": key}
            return gamma_contrastive(*embed(w, rows), logit_scale=10.0, form="plain", **options)

        return loss

    def scaled(w, rows, memory, key):
        options = {"memory": None, "dataset_size": n, "draw": "expected", "form": "plain"}
        return gamma_contrastive(*embed(w, rows), logit_scale=10.0, **options)[0], memory

    def conventional(w, rows, memory, key):
        return info_nce(*embed(w, rows), logit_scale=10.0, form="plain"), memory

    @functools.partial(jax.jit, static_argnums=0)
    def error_of(loss, memory):
        def step(carry, key):
            memory, total, count = carry
            rows_key, key = jax.random.split(key)
            rows = jax.random.choice(rows_key, n, (size,), replace=False)
            gradient, memory = jax.grad(loss, has_aux=True)(projections, rows, memory, key)
            counts = count >= warm_up
            return (memory, jax.tree.map(lambda t, g: t + counts * g, total, gradient), count + 1), None

        zero = jax.tree.map(jnp.zeros_like, full)
        keys = jax.random.split(jax.random.key(0), steps)
        (_, total, _), _ = jax.lax.scan(step, (memory, zero, 0), keys)
        squares = [(jnp.sum((t / (steps - warm_up) - f) ** 2), jnp.sum(f**2)) for t, f in zip(total, full, strict=True)]
        return jnp.sqrt(sum(each[0] for each in squares) / sum(each[1] for each in squares))

    errors = {
        "InfoNCE": error_of(conventional, exact),
        "scaled": error_of(scaled, exact),
        "expected, exact S": error_of(gamma("expected", 1e-7), exact),
        "sampled, exact S": error_of(gamma("sampled", 1e-7), exact),
        "sampled, memory": error_of(gamma("sampled", 0.1), init_memory(n)),
    }
    assert errors["InfoNCE"] > 0.9, errors
    assert 0.25 < errors["scaled"] < 0.45, errors
    assert errors["expected, exact S"] < 0.12, errors
    assert errors["sampled, exact S"] < 0.15, errors
    assert errors["sampled, memory"] < 0.16, errors


# ---------------------------------------------------------------------------------------------------------------------
# The E-step


@pytest.mark.parametrize("shape", [0.5, 1.0, 16.0])
def test_rates_have_mean_one_over_s_and_the_variation_of_their_shape(shape):
    log_partition = jnp.full(40_000, 3.0)
    u = np.exp(sample_rates(log_partition, key=jax.random.key(0), shape=shape)) * np.exp(3.0)
    assert np.mean(u) == pytest.approx(1.0, abs=5 / np.sqrt(shape * len(u)))
    assert np.std(u) == pytest.approx(1 / np.sqrt(shape), rel=0.05)


def test_rates_of_extreme_partitions_are_finite_and_constants():
    log_partition = jnp.array([-500.0, 0.0, 500.0])
    log_u = sample_rates(log_partition, key=jax.random.key(0))
    assert np.all(np.abs(log_u + log_partition) < 20)
    gradient = jax.grad(lambda x: jnp.sum(sample_rates(x, key=jax.random.key(0))))(log_partition)
    assert not np.any(gradient)


# ---------------------------------------------------------------------------------------------------------------------
# The memory


@functools.partial(jax.jit, static_argnames="options")
def _visit(memory, pair, example_id, where, memory_rate, options):
    loss, memory = gamma_contrastive(
        *pair,
        logit_scale=SCALE,
        memory=memory,
        example_id=example_id,
        memory_rate=memory_rate,
        draw="expected",
        where=where,
        reduction="none",
        **dict(options),
    )
    return loss, memory


def visit(memory, pair, example_id, where=None, memory_rate=0.25, **options):
    """The losses of the rows and the new memory, in NumPy."""
    where = np.ones(B, bool) if where is None else where
    ids = np.asarray(example_id, np.int32)
    return jax.device_get(_visit(memory, pair, ids, where, memory_rate, tuple(options.items())))


def fresh_partitions(pair, where=None):
    """S of this batch for the whole data set of N pairs, per direction and row."""
    sides = []
    for anchors, candidates in (pair, pair[::-1]):
        rows = [i for i in range(B) if where is None or where[i]]
        sums = reference.gamma_sums(anchors.astype(np.float64), candidates, SCALE, rows, None, N, 1.0)
        sides.append({i: each[1] + each[2] for i, each in sums.items()})
    return sides


def test_first_visit_stores_and_later_visits_average():
    ids = [4, 0, 19, 7, 8, 11, 12, 2]
    first, second = make_pairs(0), make_pairs(1)
    _, memory = visit(init_memory(N), first, ids)
    _, memory = visit(memory, second, ids)
    one, two = fresh_partitions(first), fresh_partitions(second)
    for side, stored in enumerate((memory.image_to_text, memory.text_to_image)):
        wanted = [np.log(0.75 * one[side][i] + 0.25 * two[side][i]) for i in range(B)]
        np.testing.assert_allclose(stored[ids], wanted, rtol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(memory.visited), np.sort(ids))
    assert not np.any(np.delete(memory.image_to_text, ids))


def test_masked_rows_are_not_remembered():
    where = np.array([True, False] * 4)
    pair = make_pairs()
    pair[0][1] = np.nan
    _, memory = visit(init_memory(N), pair, np.arange(B), where=where)
    np.testing.assert_array_equal(np.flatnonzero(memory.visited), [0, 2, 4, 6])
    partitions = fresh_partitions(pair, where)
    np.testing.assert_allclose(memory.image_to_text[:8:2], [np.log(partitions[0][i]) for i in (0, 2, 4, 6)], rtol=1e-5)


def test_ids_outside_the_memory_are_not_remembered():
    _, memory = visit(init_memory(N), make_pairs(), [-1, 20, 1, 2, 3, -20, 2**31 - 1, -(2**31)])
    np.testing.assert_array_equal(np.flatnonzero(memory.visited), [1, 2, 3])


def test_copies_of_an_example_store_the_mean_of_their_partitions_in_any_order():
    ids, pair = np.array([3, 1, 3, 5, 3, 6, 7, 8]), make_pairs()
    order = np.random.default_rng(0).permutation(B)
    _, memory = visit(init_memory(N), pair, ids)
    _, shuffled = visit(init_memory(N), tuple(x[order] for x in pair), ids[order])
    partitions = fresh_partitions(pair)[0]
    assert memory.image_to_text[3] == pytest.approx(np.log(np.mean([partitions[i] for i in (0, 2, 4)])), rel=1e-5)
    np.testing.assert_allclose(shuffled.image_to_text, memory.image_to_text, rtol=1e-5)


def test_rows_without_a_negative_have_no_loss_and_leave_the_memory_alone():
    loss, memory = visit(init_memory(N), make_pairs(), np.arange(B), where=np.arange(B) == 4)
    assert not np.any(loss)
    assert not np.any(memory.visited)


def test_diagnostics():
    pair, ids = make_pairs(), np.arange(B)
    _, first = visit(init_memory(B), pair, ids, memory_rate=1.0)
    # In a data set of B pairs the batch is the data set, so that nothing is scaled.
    conventional = float(jax.jit(info_nce)(*pair, logit_scale=SCALE))
    assert first.diagnostics["info_nce"] == pytest.approx(conventional, rel=1e-5)
    assert first.diagnostics["visited"] == 0
    assert first.diagnostics["drift"] == 0
    _, again = visit(first, pair, ids, memory_rate=1.0)
    assert again.diagnostics["visited"] == 1
    assert again.diagnostics["drift"] == pytest.approx(0, abs=1e-5)
    moved = first._replace(image_to_text=first.image_to_text + 1.0)
    assert visit(moved, pair, ids)[1].diagnostics["drift"] == pytest.approx(0.5, abs=1e-5)
    assert set(first.diagnostics) == set(init_memory(B).diagnostics)


def test_a_stale_memory_is_bounded_and_counted():
    """The stored S is far too small, and the rate so small that the update does not help."""
    pair, ids = make_pairs(), np.arange(B)
    stale = init_memory(N)._replace(
        image_to_text=jnp.full(N, -500.0), text_to_image=jnp.full(N, -500.0), visited=jnp.ones(N, bool)
    )

    def loss(pair, max_exponent):
        options = {"memory": stale, "example_id": ids, "memory_rate": 1e-30, "draw": "expected"}
        return gamma_contrastive(*pair, logit_scale=SCALE, max_exponent=max_exponent, **options)

    gradient, memory = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(pair, 2.0)
    assert memory.diagnostics["clipped"] == 1
    # 2 B logits with a weight of at most (e^2 + 1)/(2 B) each, times scale and unit vectors.
    assert all(np.all(np.linalg.norm(x, axis=1) <= 2 * B * SCALE * (np.exp(2) + 1) / (2 * B)) for x in gradient)
    assert any(np.any(x != 0) for x in gradient), "clipped pairs still push"


def test_memory_and_draws_pass_through_a_jitted_step_with_one_compilation():
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(memory, pair, example_id, key):
        traces.append(1)
        loss, memory = gamma_contrastive(
            *pair, logit_scale=SCALE, memory=memory, example_id=example_id, memory_rate=0.5, key=key
        )
        return memory, loss

    memory, losses = init_memory(N), set()
    for i in range(3):
        memory, loss = step(memory, make_pairs(), np.arange(B, dtype=np.int32), jax.random.key(i))
        losses.add(float(loss))
    assert len(traces) == 1
    assert len(losses) == 3
