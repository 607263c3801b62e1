"""The gamma-augmented contrastive loss: a contrastive gradient that does not depend on the batch size.

The logarithm of the softmax's denominator keeps a mini-batch from estimating the gradient of the full loss. An
auxiliary gamma variable per anchor takes its place: given the variable, the loss is a plain sum over negatives.
"""

import functools
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from repkit.checks import require_choice, require_key, require_range
from repkit.losses._memory import LogPartitionMemory, bounded_exp, describe, look_up, remember, require_ids_and_rate
from repkit.losses._pairs import require_pairs
from repkit.losses._partitions import Foreseen, log_positives, mean_positive, pair_partitions
from repkit.losses.form import Blocks, Form
from repkit.numerics import (
    AxisName,
    Reduction,
    Scalar,
    all_over,
    local_rows,
    reduce_loss,
    row_count,
    row_mask,
    sum_over,
)

Draw: TypeAlias = Literal["sampled", "expected"]
RatesFrom: TypeAlias = Literal["updated", "previous"]


def sample_rates(
    log_partition: Float[Array, "*shape"], *, key: PRNGKeyArray, shape: Scalar = 1.0
) -> Float[Array, "*shape"]:
    """The E-step: draws `u ~ Gamma(shape, rate = shape S)`, whose mean is 1/S, and returns `log u`.

    Args:
        log_partition: log S of each anchor.
        key: a typed random key, used once.
        shape: a > 0 of the gamma distribution; u has coefficient of variation 1/sqrt(a). 1 is the exponential
            distribution of the identity `1/S = integral_0^inf exp(-u S) du`; a -> inf tends to u = 1/S.

    Returns:
        log u, drawn in log space so that no S over- or underflows. No gradient flows through it.

    Raises:
        InputError: no array, no key, or a shape that is not positive.

    Example:
        >>> log_partition = jnp.full(10_000, 100.0)
        >>> log_u = sample_rates(log_partition, key=jax.random.key(0))
        >>> print(f"{jnp.mean(jnp.exp(log_u + 100.0)):.1f}")
        1.0
    """
    key = require_key("sample_rates", key, "drawing rates")
    require_range("sample_rates", "shape", shape, above=0)
    log_partition = jax.lax.stop_gradient(log_partition)
    if isinstance(shape, (int, float)) and shape == 1:
        # -log of an exponential variable; much cheaper than the general case.
        return -jax.random.gumbel(key, log_partition.shape, log_partition.dtype) - log_partition
    shape = jax.lax.stop_gradient(jnp.asarray(shape, log_partition.dtype))
    log_gamma = jax.random.loggamma(key, shape, log_partition.shape, log_partition.dtype)
    return log_gamma - jnp.log(shape) - log_partition


def gamma_contrastive(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "b d"],
    *,
    logit_scale: Scalar,
    memory: LogPartitionMemory | None,
    example_id: Int[Array, " b"] | None = None,
    memory_rate: Scalar | None = None,
    dataset_size: int | None = None,
    labels: Int[Array, " b"] | None = None,
    draw: Draw = "sampled",
    positive: Draw = "expected",
    rates_from: RatesFrom = "updated",
    shape: Scalar = 1.0,
    positive_weight: Scalar = 1.0,
    max_exponent: float = 60.0,
    memory_axis_name: AxisName | None = None,
    form: Form = Blocks(),
    key: PRNGKeyArray | None = None,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> tuple[Float[Array, ""] | Float[Array, " b"], LogPartitionMemory | None]:
    """Contrastive loss whose mini-batch gradient estimates that of the whole data set, by EM with gamma variables.

    With `s_ij = logit_scale <anchor_i, candidate_j>`, positives P_i, the m_i negatives N_i of row i in the batch and M
    negatives in the data set, the conventional loss of an anchor and its surrogate are

        L_i  = -mean_{p in P_i} s_ip + log S_i,      S_i = c sum_{p in P_i} exp(s_ip) + M/m_i sum_{j in N_i} exp(s_ij)
        l_i  = -mean_{p in P_i} s_ip + c r_i sum_{p in P_i} exp(s_ip) + u_i M/m_i sum_{j in N_i} exp(s_ij)

    u_i is drawn with mean 1/S_i (`sample_rates`, the E-step) and held fixed, r_i is 1/S_i or u_i. l_i is linear in
    the sum over negatives, so that a few negatives estimate its gradient without bias, and the mean of its gradient
    over u is the gradient of L_i. Both directions, image to text and text to image, are averaged.

    S_i must be that of the data set, not of the batch: `memory` holds a moving average per example and direction,

        log S_i <- log( (1 - memory_rate) S_i + memory_rate S_i of this batch ),   on the first visit S_i of this batch.

    u_i is drawn from the memory *after* this update (`rates_from="updated"`), our choice between two evils. Before it
    (`rates_from="previous"`), u_i would be independent of the batch, as the argument for no bias wants; but an average
    over few visits is itself biased once inverted, and stale when the encoder moves. Measured as the relative error of
    the mean gradient of 512 pairs in batches of 5 (rates 0.1, 0.5, 0.9): for a fixed encoder neither order wins (before
    0.108, 0.198, 0.320; after 0.102, 0.194, 0.281 at logit scale 10; at 5 before is slightly better at rate 0.5, at
    14.3 after is better throughout); for a moving one the error after is 10 to 40 % lower. The largest single gradient
    is 2 to 7 times smaller, because the update guarantees S_i >= memory_rate times the S_i of this batch.

    Args:
        image_embeds: [b d], normally of unit length; used as given.
        text_embeds: [b d], row i belongs to row i of the images.
        logit_scale: scalar > 0 that multiplies the inner products (1 / temperature); may be learned.
        memory: from `init_memory(dataset_size)` or the last call; equal on all devices of `axis_name`. None estimates
            S_i from this batch: with `draw="expected"` and no `dataset_size` the gradient is that of `info_nce`; with
            `dataset_size` it is InfoNCE with the negatives counted M/m times. Neither removes the bias.
        example_id: [b], the row's place in the memory, in [0, n); required with a memory. Rows of other ids are
            estimated from this batch alone and not remembered; of equal ids the average is remembered.
        memory_rate: share in (0, 1] of this batch's estimate in the new average; required with a memory. Small rates
            average more batches, large ones follow a moving encoder; `diagnostics["drift"]` shows which is needed.
        dataset_size: number of pairs n of the data set, M = n - 1. Default: the memory's size; without a
            memory M = m_i.
        labels: [b]; rows with equal labels are positives of one another, such as equal captions.
        draw: "sampled" draws u_i, "expected" takes its mean 1/S_i (deterministic EM, majorise-minimise).
        positive: r_i, for the positives' own terms. "expected" is 1/S_i, as unbiased and with up to 28 times less noise
            for well separated pairs; "sampled" is u_i, the literal reading.
        rates_from: "updated" takes S_i from the memory after its update with this batch, "previous" before it, where it
            knows the example. Without labels "previous" needs one walk over the pairs and not two, once all rows are
            known: three quarters of the work.
        shape: a > 0 of the gamma distribution; the noise of u_i falls as 1/sqrt(a).
        positive_weight: c >= 0. 1 keeps the positives in S_i as InfoNCE does, 0 drops them (decoupled
            contrastive loss).
        max_exponent: an anchor's sums r_i c sum_p exp(s_ip) and u_i M/m_i sum_j exp(s_ij) continue linearly in their
            logarithm beyond exp(max_exponent), which bounds their gradient; `diagnostics["clipped"]` counts them.
        memory_axis_name: the axis that the memory's examples are split over, each device holding an equal part of them
            in the order of the axis; None when every device holds them all, and under `jit`.
        form: in blocks, with memory of the inputs' size, or "plain"; see `repkit.losses.Blocks`.
        key: typed random key, the same on all devices; required where something is sampled.
        where: [b]; False removes the row as anchor and as candidate, and leaves its memory as it is.
        weights: [b], >= 0; the row's share of the mean. A row of weight 0 is still a candidate and remembered.
        axis_name: the axis of `pmap` or `shard_map` that the rows are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The surrogate loss, at least float32, and the new memory (None for None). The surrogate's value is no
        likelihood: watch `memory.diagnostics["info_nce"]` instead. A row without any negative in the batch has
        loss 0.

    Raises:
        InputError: shapes that do not fit together, an unknown literal, or an argument that these ones require.

    Example:
        >>> from repkit.losses import init_memory
        >>> embeds = jnp.eye(4)
        >>> memory = init_memory(100)
        >>> loss, memory = gamma_contrastive(
        ...     embeds, embeds, logit_scale=2.0, memory=memory, example_id=jnp.arange(4), memory_rate=0.1,
        ...     key=jax.random.key(0),
        ... )
        >>> print(f"{memory.diagnostics['info_nce']:.4f}")  # log(1 + 99 exp(-2))
        2.6671

    References:
        Chen et al., "Why do we need large batchsizes in contrastive learning? A gradient-bias perspective", NeurIPS
        2022: the gamma identity and the EM. The paper's own parameters (distribution's shape, memory, schedule) were
        not available to us: shape 1, the memory and its average, the positive in expectation, several positives and
        the bound on the exponent are our choices. The moving average of S is that of Yuan et al., "Provable
        Stochastic Optimization for Global Contrastive Learning", arXiv 2202.12387.
    """
    images, texts = require_pairs(
        "gamma_contrastive",
        {"image_embeds": image_embeds, "text_embeds": text_embeds},
        form=form,
        where=where,
        weights=weights,
        logit_scale=logit_scale,
        labels=labels,
        example_id=(example_id, "int b"),
    )
    require_choice("draw", draw, get_args(Draw))
    require_choice("positive", positive, get_args(Draw))
    require_choice("rates_from", rates_from, get_args(RatesFrom))
    require_range("gamma_contrastive", "positive_weight", positive_weight, at_least=0)
    if dataset_size is None and memory is not None:
        dataset_size = row_count(memory.visited.shape[0], memory_axis_name)
    if dataset_size is not None:
        require_range("gamma_contrastive", "dataset_size", dataset_size, at_least=2)

    rows, dtype = images.shape[0], jnp.promote_types(images.dtype, jnp.float32)
    valid = row_mask(where, rows)
    # In what follows the first of two axes is the direction: images as anchors, texts as anchors.
    log_noise = jnp.zeros((2, rows), dtype)
    if draw == "sampled":
        # Every device draws for all rows and keeps its own, so that the draw does not depend on the number of devices.
        key = require_key("gamma_contrastive", key, 'draw="sampled"')
        noise = sample_rates(jnp.zeros((row_count(rows, axis_name), 2), dtype), key=key, shape=shape)
        log_noise = local_rows(noise, axis_name).T
    found = recall = foreseen = None
    if memory is not None:
        ids, rate = require_ids_and_rate("gamma_contrastive", example_id, memory_rate)
        found = look_up(memory, ids, valid, dtype, axis_name, memory_axis_name)
        recall = functools.partial(remember, memory, found, memory_rate=rate, axis_name=axis_name)
    if found is not None and rates_from == "previous":
        negative_count = sum_over(jnp.sum(valid, dtype=dtype), axis_name) - 1.0
        log_rates = log_noise - local_rows(found.log_values.T, axis_name).T + _log_ratio(negative_count, dataset_size)
        foreseen = Foreseen(
            (log_rates[0], log_rates[1]),
            jnp.where(valid, 1.0 if weights is None else weights, 0.0).astype(dtype),
            all_over(jnp.all(local_rows(found.visited, axis_name) | ~valid), axis_name),
        )
    partitions = pair_partitions(
        images,
        texts,
        logit_scale=logit_scale,
        labels=labels,
        where=where,
        form=form,
        axis_name=axis_name,
        foreseen=foreseen,
    )
    partition = jax.tree.map(lambda *each: jnp.stack(each), *partitions)
    # A row without a negative says nothing about its partition, and is left out.
    usable = partition.negative_count[0] > 0
    positive_mean = mean_positive(partition)
    log_weight = jnp.log(jnp.asarray(positive_weight, dtype))
    log_positive = log_positives(partition) + log_weight
    log_negative = partition.negatives + _log_ratio(partition.negative_count, dataset_size)

    log_partition = fresh = jnp.where(usable, jax.lax.stop_gradient(jnp.logaddexp(log_positive, log_negative)), 0.0)
    recalled = None if recall is None else recall(fresh, usable)
    if recalled is not None:
        log_partition = recalled.log_values
    if found is not None and recalled is not None and rates_from == "previous":
        stored = local_rows(found.log_values.T, axis_name).T
        log_partition = jnp.where(recalled.visited, stored, log_partition)
    log_rate = log_noise - log_partition
    log_positive_rate = log_rate if positive == "sampled" else -log_partition

    exponents = jnp.stack([log_positive + log_positive_rate, log_negative + log_rate])
    terms = jnp.sum(bounded_exp(exponents, max_exponent), axis=0)
    losses = jnp.where(usable, jnp.mean(terms - positive_mean, axis=0), 0.0)
    loss = reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)
    if recalled is None:
        return loss, None

    diagnostics = describe(recalled, fresh - positive_mean, exponents > max_exponent, usable, axis_name)
    return loss, recalled.memory._replace(diagnostics=diagnostics)


def _log_ratio(negative_count: Float[Array, "2 b"], dataset_size: int | None) -> Float[Array, "2 b"]:
    """log(M/m_i): how many negatives of the data set each of the batch's stands for."""
    if dataset_size is None:
        return jnp.zeros_like(negative_count)
    return jnp.log(dataset_size - 1.0) - jnp.log(jnp.maximum(negative_count, 1.0))
