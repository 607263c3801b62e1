"""The metrics of texts as literal loops over lists, without a line in common with repkit."""

import numpy as np


def vqa_accuracy(prediction, answers):
    """By leaving out one answer after the other; of normalised strings."""
    accuracies = []
    for i in range(len(answers)):
        others = answers[:i] + answers[i + 1 :]
        accuracies.append(min(1.0, len([answer for answer in others if answer == prediction]) / 3))
    return np.mean(accuracies)


def _grams(tokens, n):
    return [" ".join(tokens[i : i + n]) for i in range(len(tokens)) if i + n <= len(tokens)]


def cider_d(candidates, references):
    """Of lists of tokens: dense tf-idf vectors over all n-grams that occur anywhere, one order after the other."""
    examples = len(references)
    totals = np.zeros(examples)
    for n in (1, 2, 3, 4):
        sentences = [*candidates, *(tokens for given in references for tokens in given)]
        known = sorted({gram for tokens in sentences for gram in _grams(tokens, n)})
        idf = np.zeros(len(known))
        for k, gram in enumerate(known):
            holders = sum(any(gram in _grams(tokens, n) for tokens in given) for given in references)
            idf[k] = np.log(examples) - np.log(max(1.0, holders))

        def vector(tokens, n=n, known=known, idf=idf):
            return np.array([_grams(tokens, n).count(gram) for gram in known], float) * idf

        for i in range(examples):
            c = vector(candidates[i])
            for tokens in references[i]:
                r = vector(tokens)
                lengths = np.sqrt(c @ c) * np.sqrt(r @ r)
                if lengths > 0:
                    penalty = np.exp(-((len(candidates[i]) - len(tokens)) ** 2) / (2 * 6.0**2))
                    totals[i] += penalty * (np.minimum(c, r) @ r) / lengths / len(references[i])
    return 10 * totals / 4
