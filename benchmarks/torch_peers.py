"""The published PyTorch formulas, re-expressed by us, and how a formula in torch is run; torch itself is optional.

Sources: open_clip's `ClipLoss` and `SigLipLoss` on one device, CyCLIP's consistency losses with their weights of 0.25,
and attention alignment as `repkit.losses` defines it, with the head pairs contracted or spelled out.
"""

# pyright: reportMissingImports=false
# torch need not be there where types are checked.

import os
from collections.abc import Callable
from importlib import util
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax
import numpy as np

if TYPE_CHECKING or util.find_spec("torch"):
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise
    import torch
    from torch import Tensor
    from torch.nn import functional
    from torch.profiler import ProfilerActivity, profile

Variant: TypeAlias = Literal["mse", "kl"]


def missing(arrays: tuple[Any, ...]) -> str | None:
    """Why torch cannot run on these arrays; None where it can."""
    if util.find_spec("torch") is None:
        return "torch is not installed"
    if jax.default_backend() != "cpu":
        return "the torch peers run on the CPU only"
    if any(getattr(array, "dtype", None) == "bfloat16" for array in arrays):
        return "the torch peers run in float32 only"
    return None


def value_and_gradients(
    loss: Callable[..., "Tensor"], learned: tuple[int, ...], arrays: tuple[Any, ...]
) -> Callable[[], Any]:
    """A program of no arguments: value and gradients in some of the arrays, with as many threads as JAX uses."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    tensors = [torch.from_numpy(np.array(array)) for array in arrays]
    learned_tensors = [tensors[place].requires_grad_() for place in learned]

    def run() -> Any:
        value = loss(*tensors)
        return value.detach(), *torch.autograd.grad(value, learned_tensors)

    return run


def temporary_bytes(run: Callable[[], Any]) -> int:
    """The most that one call holds at once, beyond what it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    del result
    return int(held.max() - held[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of embeddings


def clip(image: "Tensor", text: "Tensor", logit_scale: "Tensor") -> "Tensor":
    """open_clip's contrastive loss: a matrix of logits per direction."""
    labels = torch.arange(len(image))
    image_to_text = functional.cross_entropy(logit_scale * image @ text.T, labels)
    return (image_to_text + functional.cross_entropy(logit_scale * text @ image.T, labels)) / 2


def siglip(image: "Tensor", text: "Tensor", logit_scale: "Tensor", logit_bias: "Tensor") -> "Tensor":
    """open_clip's sigmoid loss."""
    logits = logit_scale * image @ text.T + logit_bias
    labels = 2 * torch.eye(len(image)) - torch.ones(len(image))
    return -functional.logsigmoid(labels * logits).sum() / len(image)


def cyclip(image: "Tensor", text: "Tensor") -> "Tensor":
    """CyCLIP's cross-modal and in-modal consistency."""
    products = image @ text.T
    cross_modal = (products - products.T).square().mean()
    in_modal = (image @ image.T - text @ text.T).square().mean()
    return 0.25 * len(image) * (cross_modal + in_modal)


def uniformity(image: "Tensor", text: "Tensor") -> "Tensor":
    """The Gaussian kernels of all pairs within each modality, in both orders and with the diagonal."""
    kernels = [torch.cdist(x, x).square().mul(-2).exp().sum() for x in (image, text)]
    return ((kernels[0] + kernels[1]) / len(image)).log()


def brownian_bridge(image: "Tensor", text: "Tensor", augmented: "Tensor") -> "Tensor":
    """Squared distance of the augmented views to the normalised point a quarter of the way from text to image."""
    return (augmented - functional.normalize(0.25 * image + 0.75 * text, dim=-1)).square().sum(-1).mean()


def orthogonality(image: "Tensor", text: "Tensor", own_image: "Tensor", own_text: "Tensor") -> "Tensor":
    """Squared inner products of shared and independent features."""
    return ((image * own_image).sum(-1).square() + (text * own_text).sum(-1).square()).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Attention maps


def attention_maps(student: "Tensor", teacher: "Tensor", *, variant: Variant) -> "Tensor":
    """Attention alignment of maps [b h q k], with the sums over head pairs contracted."""
    student, teacher = student.flatten(2), teacher.flatten(2)
    unit_student, unit_teacher = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
    weights = torch.softmax(unit_teacher @ unit_student.mT, dim=-1)
    if variant == "mse":
        return (unit_teacher - weights @ unit_student).square().sum((1, 2)).mean()
    share_student, share_teacher = (maps / maps.sum(-1, keepdim=True) for maps in (student, teacher))
    mixture = weights @ share_student
    return (share_teacher * (share_teacher.log() - mixture.log())).sum((1, 2)).mean()


def pairwise_attention_maps(student: "Tensor", teacher: "Tensor", *, variant: Variant) -> "Tensor":
    """The same with an array of all head pairs' maps."""
    student, teacher = student.flatten(2), teacher.flatten(2)
    cosines = functional.cosine_similarity(teacher[:, :, None], student[:, None], dim=-1)
    weights = torch.softmax(cosines, dim=-1)[..., None]
    if variant == "mse":
        mixture = (weights * functional.normalize(student, dim=-1)[:, None]).sum(2)
        return (functional.normalize(teacher, dim=-1) - mixture).square().sum((1, 2)).mean()
    share_student, share_teacher = (maps / maps.sum(-1, keepdim=True) for maps in (student, teacher))
    mixture = (weights * share_student[:, None]).sum(2)
    return (share_teacher * (share_teacher.log() - mixture.log())).sum((1, 2)).mean()


def attention_queries_keys(
    student_query: "Tensor",
    student_key: "Tensor",
    teacher_query: "Tensor",
    teacher_key: "Tensor",
    *,
    variant: Variant,
) -> "Tensor":
    """Attention alignment of the maps that queries and keys [b h length width] give."""

    def maps(query: "Tensor", key: "Tensor") -> "Tensor":
        return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1)

    return attention_maps(maps(student_query, student_key), maps(teacher_query, teacher_key), variant=variant)
