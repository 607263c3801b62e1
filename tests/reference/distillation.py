"""The losses of distillation and generation as float64 loops: slow, literal, without a line in common with repkit.

Every function takes the arrays of the loss of its name and returns the loss of each example [b], 0 where `where` is
False.
"""

import math

import numpy as np


def _tokens(shape, b, token_mask, where):
    """The indices, behind that of the example, of the tokens of example b that count."""
    if where is not None and not where[b]:
        return []
    return [i for i in np.ndindex(*shape) if token_mask is None or token_mask[(b, *i)]]


def _softmax(logits):
    largest = max(logits)
    exponentials = [math.exp(z - largest) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


def _divergence(teacher, student):
    return sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True) if p > 0)


def _mean(values):
    return sum(values) / len(values) if values else 0.0


def logit_distillation(student_logits, teacher_logits, *, temperature, token_mask=None, where=None, weights=None):
    losses = np.zeros(len(student_logits))
    for b in range(len(losses)):
        divergences = []
        for i in _tokens(student_logits.shape[1:-1], b, token_mask, where):
            student, teacher = (
                _softmax([z / temperature for z in logits[(b, *i)]]) for logits in (student_logits, teacher_logits)
            )
            divergences.append(_divergence(teacher, student))
        losses[b] = temperature**2 * _mean(divergences)
    return losses


def hidden_state_distillation(
    student_states, teacher_states, *, projection=None, token_mask=None, where=None, weights=None
):
    losses = np.zeros(len(student_states))
    for b in range(len(losses)):
        squares = []
        for i in _tokens(student_states.shape[1:-1], b, token_mask, where):
            student, teacher = list(student_states[(b, *i)]), teacher_states[(b, *i)]
            if projection is not None:
                student = [sum(x * projection[n, m] for n, x in enumerate(student)) for m in range(len(teacher))]
            squares.append(_mean([(s - t) ** 2 for s, t in zip(student, teacher, strict=True)]))
        losses[b] = _mean(squares)
    return losses


def _relation(vectors, query, keys):
    """The share of each key for one query, of vectors by token."""
    width = len(vectors[query])
    scores = [sum(x * y for x, y in zip(vectors[query], vectors[key], strict=True)) for key in keys]
    return _softmax([score / math.sqrt(width) for score in scores])


def attention_relation_distillation(
    student_vectors, teacher_vectors, *, relation_heads, token_mask=None, where=None, weights=None
):
    losses = np.zeros(len(student_vectors))
    for b in range(len(losses)):
        tokens = [i for (i,) in _tokens(student_vectors.shape[2:3], b, token_mask, where)]
        divergences = []
        for part in range(relation_heads):
            sides = []
            for vectors in (student_vectors, teacher_vectors):
                features = {i: [float(x) for head in vectors[b] for x in head[i]] for i in tokens}
                width = vectors.shape[1] * vectors.shape[3] // relation_heads
                sides.append({i: features[i][part * width : (part + 1) * width] for i in tokens})
            student, teacher = sides
            divergences += [_divergence(_relation(teacher, i, tokens), _relation(student, i, tokens)) for i in tokens]
        losses[b] = _mean(divergences)
    return losses


def caption_cross_entropy(logits, token_ids, *, token_mask=None, label_smoothing=0.0, where=None, weights=None):
    losses = np.zeros(len(logits))
    for b in range(len(losses)):
        entropies = []
        for (i,) in _tokens(logits.shape[1:-1], b, token_mask, where):
            shares = _softmax(list(logits[b, i]))
            v = len(shares)
            entropies.append(
                sum(
                    -((1 - label_smoothing) * (k == token_ids[b, i]) + label_smoothing / v) * math.log(shares[k])
                    for k in range(v)
                )
            )
        losses[b] = _mean(entropies)
    return losses
