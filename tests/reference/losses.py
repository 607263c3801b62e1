"""The losses as float64 loops over rows: slow, literal, and without a line in common with repkit.

Every function takes the arrays of the loss of its name and returns the loss of each row [b], 0 where `where` is False.
Masked rows are skipped, never multiplied by 0.
"""

import numpy as np


def _rows(where, b):
    return [i for i in range(b) if where is None or where[i]]


def _cross_entropy(anchors, candidates, scale, rows, labels):
    """-log softmax of each anchor's positives, averaged over the positives."""
    losses = np.zeros(len(anchors))
    for i in rows:
        logits = {j: scale * float(np.dot(anchors[i], candidates[j])) for j in rows}
        positives = [j for j in rows if j == i or (labels is not None and labels[j] == labels[i])]
        largest = max(logits.values())
        log_sum = largest + np.log(sum(np.exp(logits[j] - largest) for j in rows))
        losses[i] = sum(log_sum - logits[p] for p in positives) / len(positives)
    return losses


def info_nce(image_embeds, text_embeds, *, logit_scale, labels=None, direction="symmetric", where=None, weights=None):
    rows = _rows(where, len(image_embeds))
    image_to_text = _cross_entropy(image_embeds, text_embeds, logit_scale, rows, labels)
    text_to_image = _cross_entropy(text_embeds, image_embeds, logit_scale, rows, labels)
    return {
        "image_to_text": image_to_text,
        "text_to_image": text_to_image,
        "symmetric": (image_to_text + text_to_image) / 2,
    }[direction]


def in_modal_info_nce(embeds, augmented_embeds, *, logit_scale, original, labels=None, where=None, weights=None):
    b = len(embeds)
    rows = _rows(where, b)
    losses = np.zeros(b)
    for j in rows:
        others = {k: embeds[k] if original and k != j else augmented_embeds[k] for k in rows}
        scores = {k: logit_scale * float(np.dot(embeds[j], view)) for k, view in others.items()}
        positives = [k for k in rows if _same(j, k, labels)]
        log_sum = np.log(sum(np.exp(score) for score in scores.values()))
        losses[j] = log_sum - sum(scores[p] for p in positives) / len(positives)
    return losses


def decoupled_contrastive(image_embeds, text_embeds, *, logit_scale, labels=None, where=None, weights=None):
    b = len(image_embeds)
    rows = _rows(where, b)
    losses = np.zeros(b)
    for anchors, candidates in ((image_embeds, text_embeds), (text_embeds, image_embeds)):
        for i, (mean, _, negatives) in gamma_sums(anchors, candidates, logit_scale, rows, labels, None, 1.0).items():
            losses[i] += (np.log(negatives) - mean) / 2
    return losses


def sigmoid_contrastive(image_embeds, text_embeds, *, logit_scale, logit_bias, labels=None, where=None, weights=None):
    b = len(image_embeds)
    rows = _rows(where, b)
    losses = np.zeros(b)
    for i in rows:
        for j in rows:
            score = logit_scale * float(np.dot(image_embeds[i], text_embeds[j])) + logit_bias
            is_positive = i == j if labels is None else labels[i] == labels[j]
            losses[i] += np.log1p(np.exp(-score if is_positive else score))
    return losses


def global_contrastive(
    image_embeds,
    text_embeds,
    *,
    logit_scale,
    memory,
    example_id,
    memory_rate,
    labels=None,
    held,
    where=None,
    weights=None,
):
    """`held` as in `gamma_contrastive`."""
    b = len(image_embeds)
    rows = _rows(where, b)
    losses = np.zeros(b)

    def contrasts(pair, scale, side):
        pair = list(pair)[:: -1 if side else 1]
        sums = gamma_sums(*pair, scale, rows, labels, None, 1.0)
        return {
            i: negatives / sum(j in rows and not _same(i, j, labels) for j in range(b)) / np.exp(mean)
            for i, (mean, _, negatives) in sums.items()
        }

    for side in range(2):
        now = contrasts((image_embeds, text_embeds), logit_scale, side)
        then = contrasts((held["image_embeds"], held["text_embeds"]), held["logit_scale"], side)
        average = gamma_memory(memory, side, then, example_id, memory_rate)[0]
        for i in now:
            losses[i] += now[i] / average[i] / 2
    return losses


def queue_contrastive(
    image_embeds,
    text_embeds,
    teacher_image_embeds,
    teacher_text_embeds,
    *,
    logit_scale,
    queue,
    target_share,
    labels=None,
    held,
    where=None,
    weights=None,
):
    """`queue` has image_embeds, text_embeds, labels and filled; the targets are computed from what is `held`."""
    rows = _rows(where, len(image_embeds))
    losses = np.zeros(len(image_embeds))
    for anchors, teacher, others, stored in (
        (image_embeds, held["teacher_image_embeds"], held["teacher_text_embeds"], queue["text_embeds"]),
        (text_embeds, held["teacher_text_embeds"], held["teacher_image_embeds"], queue["image_embeds"]),
    ):
        for i in rows:
            candidates = [(others[j], _same(i, j, labels)) for j in rows]
            for place, vector in enumerate(stored):
                if queue["filled"][place]:
                    candidates.append((vector, labels is not None and queue["labels"][place] == labels[i]))
            scores = [logit_scale * float(np.dot(anchors[i], vector)) for vector, _ in candidates]
            soft = [np.exp(held["logit_scale"] * float(np.dot(teacher[i], vector))) for vector, _ in candidates]
            positives = sum(is_positive for _, is_positive in candidates)
            log_sum = np.log(sum(np.exp(score) for score in scores))
            for score, weight, (_, is_positive) in zip(scores, soft, candidates, strict=True):
                target = target_share * weight / sum(soft) + (1 - target_share) * is_positive / positives
                losses[i] += target * (log_sum - score) / 2
    return losses


def _same(i, j, labels):
    return i == j or (labels is not None and labels[i] == labels[j])


def gamma_sums(anchors, candidates, scale, rows, labels, dataset_size, positive_weight):
    """Of each row that has negatives: the mean positive score, the positives' sum, the negatives' sum scaled by M/m."""
    sums = {}
    for i in rows:
        scores = {j: scale * float(np.dot(anchors[i], candidates[j])) for j in rows}
        positives = [j for j in rows if j == i or (labels is not None and labels[j] == labels[i])]
        negatives = [j for j in rows if j not in positives]
        if not negatives:
            continue
        ratio = 1.0 if dataset_size is None else (dataset_size - 1) / len(negatives)
        sums[i] = (
            sum(scores[p] for p in positives) / len(positives),
            positive_weight * sum(np.exp(scores[p]) for p in positives),
            ratio * sum(np.exp(scores[j]) for j in negatives),
        )
    return sums


def gamma_contrastive(
    image_embeds,
    text_embeds,
    *,
    logit_scale,
    memory=None,
    example_id=None,
    memory_rate=None,
    dataset_size=None,
    labels=None,
    draw="sampled",
    positive="expected",
    rates_from="updated",
    positive_weight=1.0,
    noise=None,
    held=None,
    where=None,
    weights=None,
):
    """`memory` is a dict of arrays, `noise` [2, b] the draws of mean 1 that multiply 1/S.

    `held` are keyword arguments image_embeds, text_embeds and logit_scale at which the rates are computed: they are
    constants of the surrogate, and must stay as they are when the others are moved for a finite difference.
    """
    b = len(image_embeds)
    rows = _rows(where, b)
    if dataset_size is None and memory is not None:
        dataset_size = len(memory["visited"])
    held = held or {"image_embeds": image_embeds, "text_embeds": text_embeds, "logit_scale": logit_scale}
    losses = np.zeros(b)
    for side in range(2):
        pair = [image_embeds, text_embeds]
        held_pair = [held["image_embeds"], held["text_embeds"]]
        if side == 1:
            pair.reverse()
            held_pair.reverse()
        options = (rows, labels, dataset_size, positive_weight)
        now = gamma_sums(*pair, logit_scale, *options)
        then = gamma_sums(*held_pair, held["logit_scale"], *options)
        partition = {i: sums[1] + sums[2] for i, sums in then.items()}
        if memory is not None:
            updated = gamma_memory(memory, side, partition, example_id, memory_rate)[0]
            if rates_from == "previous":
                for i in updated:
                    example = int(example_id[i])
                    if 0 <= example < len(memory["visited"]) and memory["visited"][example]:
                        updated[i] = np.exp(memory[("image_to_text", "text_to_image")[side]][example])
            partition = updated
        for i, (mean, positive_sum, negative_sum) in now.items():
            u = 1 / partition[i] if draw == "expected" else noise[side][i] / partition[i]
            r = u if positive == "sampled" else 1 / partition[i]
            losses[i] += (-mean + r * positive_sum + u * negative_sum) / 2
    return losses


def gamma_memory(memory, side, fresh, example_id, memory_rate):
    """The rows' partitions after the update, and the updated array of log S; `fresh` maps row to S of this batch."""
    stored = np.array(memory[("image_to_text", "text_to_image")[side]], np.float64)
    updated, partition = stored.copy(), {}
    for i, value in fresh.items():
        example = int(example_id[i])
        if not 0 <= example < len(stored):
            partition[i] = value
            continue
        copies = [fresh[j] for j in fresh if example_id[j] == example]
        new = sum(copies) / len(copies)
        if memory["visited"][example]:
            new = (1 - memory_rate) * np.exp(stored[example]) + memory_rate * new
        partition[i] = new
        updated[example] = np.log(new)
    return partition, updated


def feature_separation(
    image_embeds,
    text_embeds,
    image_independent,
    text_independent,
    augmented_image_independent,
    augmented_text_independent,
    *,
    logit_scale,
    orthogonality_weight=1.0,
    contrastive_weight=1.0,
    uniformity_weight=1.0,
    labels=None,
    where=None,
    weights=None,
):
    b = len(image_embeds)
    rows = _rows(where, b)
    images = _cross_entropy(image_independent, augmented_image_independent, logit_scale, rows, None)
    texts = _cross_entropy(text_independent, augmented_text_independent, logit_scale, rows, labels)
    weights = np.ones(b) if weights is None else weights
    kernel, weight = 0.0, 0.0
    for j in rows:
        weight += weights[j]
        for k in rows:
            for own in (image_independent, text_independent):
                kernel += weights[j] * np.exp(-2 * np.sum((own[j] - own[k]) ** 2))
    losses = np.zeros(b)
    for j in rows:
        orthogonality = np.dot(image_embeds[j], image_independent[j]) ** 2
        orthogonality += np.dot(text_embeds[j], text_independent[j]) ** 2
        losses[j] = orthogonality_weight * orthogonality + contrastive_weight * (images[j] + texts[j])
        losses[j] += uniformity_weight * np.log(kernel / weight)
    return losses


def uniformity(image_embeds, text_embeds, *, where=None, weights=None):
    b = len(image_embeds)
    rows, weights = _rows(where, b), np.ones(b) if weights is None else weights
    kernel = sum(
        weights[j] * np.exp(-2 * np.sum((x[j] - x[k]) ** 2))
        for x in (image_embeds, text_embeds)
        for j in rows
        for k in rows
    )
    losses = np.zeros(b)
    losses[rows] = np.log(kernel / sum(weights[j] for j in rows))
    return losses


def _bridge_mean(image, text, t):
    mean = t * image + (1 - t) * text
    length = np.sqrt(np.sum(mean**2))
    return mean / length if length > 0 else mean


def brownian_bridge(
    image_embeds, text_embeds, augmented_embeds, *, time=0.25, is_sampled=False, where=None, weights=None
):
    """`time` is the number or the row's numbers; `is_sampled` divides by twice the bridge's variance."""
    b = len(image_embeds)
    times = np.broadcast_to(time, (b,))
    losses = np.zeros(b)
    for i in _rows(where, b):
        residual = augmented_embeds[i] - _bridge_mean(image_embeds[i], text_embeds[i], times[i])
        losses[i] = np.sum(residual**2) / (2 * times[i] * (1 - times[i]) if is_sampled else 1)
    return losses


def brownian_bridge_path(image_embeds, text_embeds, path_embeds, *, times, where=None, weights=None):
    """With the covariance matrix of the bridge written out and inverted."""
    covariance = np.array([[min(s, t) * (1 - max(s, t)) for s in times] for t in times])
    precision = np.linalg.inv(covariance)
    losses = np.zeros(len(image_embeds))
    for i in _rows(where, len(image_embeds)):
        residuals = [path_embeds[i][p] - _bridge_mean(image_embeds[i], text_embeds[i], t) for p, t in enumerate(times)]
        for p, first in enumerate(residuals):
            for q, second in enumerate(residuals):
                losses[i] += precision[p, q] * np.dot(first, second) / 2
    return losses


def geometric_consistency(
    image_embeds,
    text_embeds,
    augmented_image_embeds=None,
    augmented_text_embeds=None,
    *,
    cross_modal_weight=1.0,
    in_modal_weight=1.0,
    where=None,
    weights=None,
):
    v, t, va, ta = image_embeds, text_embeds, augmented_image_embeds, augmented_text_embeds
    losses = np.zeros(len(v))
    rows = _rows(where, len(v))
    for j in rows:
        for k in rows:
            losses[j] += cross_modal_weight * (np.dot(v[j], t[k]) - np.dot(v[k], t[j])) ** 2
            losses[j] += in_modal_weight * (np.dot(v[j], v[k]) - np.dot(t[j], t[k])) ** 2
            if va is not None:
                losses[j] += in_modal_weight * (np.dot(v[j], v[k]) - np.dot(va[j], va[k])) ** 2
                losses[j] += in_modal_weight * (np.dot(t[j], t[k]) - np.dot(ta[j], ta[k])) ** 2
        if va is not None:
            losses[j] += cross_modal_weight * (np.dot(v[j], t[j]) - np.dot(va[j], ta[j])) ** 2
    return losses
