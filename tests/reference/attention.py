"""The losses of attention maps as float64 loops: slow, literal, and without a line in common with repkit.

Every function takes the arrays of the loss of its name and returns the loss of each example [b], 0 where `where` is
False. `held` is as the arguments, where what the loss holds fixed is computed.
"""

import math

import numpy as np


def _cells(maps, example, query_where, key_where):
    """The heads of one example, as lists of the cells that count, row by row."""
    heads, queries, keys = maps.shape[1:]
    return [
        [
            [float(maps[example, h, i, j]) for j in range(keys) if key_where is None or key_where[example, j]]
            for i in range(queries)
            if query_where is None or query_where[example, i]
        ]
        for h in range(heads)
    ]


def _flat(rows):
    return [x for row in rows for x in row]


def _norm(x, power):
    return sum(abs(v) ** power for v in x) ** (1 / power)


def _distance(teacher, student):
    return sum((t - s) ** 2 for t, s in zip(teacher, student, strict=True))


def _divergence(teacher, student):
    return sum(t * math.log(t / max(s, 1e-30)) for t, s in zip(teacher, student, strict=True) if t > 0)


def alignment_weights(student, teacher, temperature):
    """a_ij of lists of cells, without empty heads, which must not be given."""
    weights = []
    for t in teacher:
        cosines = [sum(x * y for x, y in zip(t, s, strict=True)) / (_norm(t, 2) * _norm(s, 2)) for s in student]
        exponentials = [math.exp((c - max(cosines)) / temperature) for c in cosines]
        weights.append([e / sum(exponentials) for e in exponentials])
    return weights


def _present(heads):
    return [cells for cells in heads if any(x != 0 for x in cells)]


def _aligned(student, teacher, held_student, variant, temperature):
    """The loss of one example's lists of cells; the weights are those of `held_student`."""
    kept = [j for j, cells in enumerate(held_student) if any(x != 0 for x in cells)]
    student, teacher = [student[j] for j in kept], _present(teacher)
    if not student or not teacher:
        return 0.0
    weights = alignment_weights([held_student[j] for j in kept], teacher, temperature)
    power, compare = (2, _distance) if variant == "mse" else (1, _divergence)
    total = 0.0
    for a, t in zip(weights, teacher, strict=True):
        mixture = [sum(a[j] * s[n] / _norm(s, power) for j, s in enumerate(student)) for n in range(len(t))]
        total += compare([x / _norm(t, power) for x in t], mixture)
    return total


def attention_map_alignment(
    student_maps,
    teacher_maps,
    *,
    variant,
    temperature=1.0,
    projection=None,
    alignment_gradient="through",
    held_student_maps=None,
    query_where=None,
    key_where=None,
    where=None,
    weights=None,
):
    held_maps = student_maps if alignment_gradient == "through" else held_student_maps
    losses = np.zeros(len(student_maps))
    for b in range(len(student_maps)):
        if where is not None and not where[b]:
            continue
        student, held, teacher = (
            _cells(maps, b, query_where, key_where) for maps in (student_maps, held_maps, teacher_maps)
        )
        if variant == "token_kl":
            for row in range(len(student[0])):
                losses[b] += _aligned(
                    [head[row] for head in student],
                    [head[row] for head in teacher],
                    [head[row] for head in held],
                    "kl",
                    temperature,
                )
            continue
        student, held, teacher = ([_flat(head) for head in each] for each in (student, held, teacher))
        if variant == "projected_kl":
            weight, bias = (np.asarray(each, float) for each in projection)
            student = held = [
                [max(0.0, bias[m] + sum(weight[m, n] * s[n] for n in range(len(s)))) for m in range(len(s))]
                for s in student
            ]
        losses[b] = _aligned(student, teacher, held, "mse" if variant == "mse" else "kl", temperature)
    return losses


def attention_maps(query, key, scale, visible="all", query_where=None, key_where=None):
    """Softmax over the keys that a query may see; cells that do not count are 0."""
    b, h, q, k = *query.shape[:3], key.shape[2]
    maps = np.zeros((b, h, q, k))
    for example, head, i in np.ndindex(b, h, q):
        if query_where is not None and not query_where[example, i]:
            continue
        seen = [j for j in range(k) if (visible == "all" or j <= i) and (key_where is None or key_where[example, j])]
        scores = [scale * float(np.dot(query[example, head, i], key[example, head, j])) for j in seen]
        exponentials = [math.exp(score - max(scores)) for score in scores]
        for j, e in zip(seen, exponentials, strict=True):
            maps[example, head, i, j] = e / sum(exponentials)
    return maps


def attention_alignment_from_queries_keys(
    student_query,
    student_key,
    teacher_query,
    teacher_key,
    *,
    variant,
    visible="all",
    student_logit_scale=None,
    teacher_logit_scale=None,
    temperature=1.0,
    query_where=None,
    key_where=None,
    where=None,
    weights=None,
):
    def maps(query, key, scale):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        query, key = (np.where(np.isnan(x), 0.0, x) for x in (query, key))
        return attention_maps(query, key, scale, visible, query_where, key_where)

    student = maps(student_query, student_key, student_logit_scale)
    teacher = maps(teacher_query, teacher_key, teacher_logit_scale)
    return attention_map_alignment(student, teacher, variant=variant, temperature=temperature, where=where)


def _matched(student, teacher, variant):
    """The loss of heads of the same number."""
    power, compare = (2, _distance) if variant == "mse" else (1, _divergence)
    total = 0.0
    for s, t in zip(student, teacher, strict=False):
        if any(x != 0 for x in s) and any(x != 0 for x in t):
            total += compare([x / _norm(t, power) for x in t], [x / _norm(s, power) for x in s])
    return total


def _mixed(shares, heads):
    return [[sum(a * h[n] for a, h in zip(row, heads, strict=True)) for n in range(len(heads[0]))] for row in shares]


def matched_heads(
    student_maps, teacher_maps, *, variant, match, mixer=None, merging=None, query_where=None, key_where=None,
    where=None, weights=None,
):  # fmt: skip
    """The baselines; `match` is "one_to_one", "mean", "mixed" or "merged"."""
    losses = np.zeros(len(student_maps))
    for b in range(len(student_maps)):
        if where is not None and not where[b]:
            continue
        student, teacher = (
            [_flat(head) for head in _cells(maps, b, query_where, key_where)] for maps in (student_maps, teacher_maps)
        )
        if match == "mean":
            student, teacher = (_mixed([[1 / len(heads)] * len(heads)], heads) for heads in (student, teacher))
        elif match == "mixed":
            student = [[max(0.0, x) for x in head] for head in _mixed(mixer, student)]
        elif match == "merged":
            teacher = _mixed(merging, teacher)
        losses[b] = _matched(student, teacher, variant)
    return losses
