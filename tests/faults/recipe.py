"""A recipe as small as can be in which everything moves that a checkpoint must hold: dropout, moving average, a loss's
memory, a queue, a shuffled and augmented stream with a corrupt example. The environment says what goes wrong.

REPKIT_FAULTS is a JSON object: `nan_at`, positions (in batches) whose second half holds a value that is no number;
`sigterm_at`, positions before which the process signals itself; `sigterm_every`, batches of a process after which it
does; `kill_at`, positions before which it kills itself; `hang_at`, positions at which it hangs; `threads` of the
loader; `ids`, a file that takes the examples of every batch; `seconds` that a batch takes.
"""

import functools
import json
import os
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repkit import losses
from repkit.data.augment import Augmentation
from repkit.data.pipeline import make_batches
from repkit.data.sources import Record, all_captions
from repkit.data.tokenizer import load_tokenizer, train_tokenizer
from repkit.numerics import normalize
from repkit.objective import Objective, Term
from repkit.recipe import Experiment
from repkit.train.config import TrainConfig
from repkit.train.teacher import MomentumTeacher

EXAMPLES, IMAGE_SIZE, MAX_LENGTH, WIDTH, QUEUE = 50, 8, 8, 16, 32
CORRUPT = 13
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Config:
    """The run."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=70,
            batch_size=8,
            warmup_steps=5,
            learning_rate=1e-2,
            ema_decay=0.9,
            log_every=1,
            checkpoint_every=10,
        )
    )


def smoke(config: Config) -> Config:
    """The same run, shorter."""
    return replace(config, train=replace(config.train, steps=4))


class Pictures:
    """Random pictures with captions, one of which cannot be read."""

    has_labels = False

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> Record:
        pixels = np.random.default_rng(index).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        image = b"no image" if index == CORRUPT else pixels
        return Record(image=image, captions=self.captions(index), example_id=index, origin=f"picture {index}")

    def captions(self, index: int) -> list[str]:
        return [f"number {index % 10}", f"the {index % 7} of all"]


class FaultyBatches:
    """The stream, and what the environment makes of it."""

    def __init__(self, batches: Any):
        self._batches = batches
        self._faults = json.loads(os.environ.get("REPKIT_FAULTS", "{}"))
        self._position = 0
        self._made = 0

    @property
    def corrupt(self) -> int:
        return self._batches.corrupt

    def __next__(self) -> dict[str, np.ndarray]:
        faults = self._faults
        every = faults.get("sigterm_every")
        if self._position in faults.get("sigterm_at", ()) or (every and self._made == every - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        if self._position in faults.get("kill_at", ()):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1e6 if self._position in faults.get("hang_at", ()) else faults.get("seconds", 0))
        batch = next(self._batches)
        noise = np.zeros(len(batch["where"]), np.float32)
        if self._position in faults.get("nan_at", ()):
            noise[len(noise) // 2] = np.nan
        if "ids" in faults:
            with open(faults["ids"], "a") as file:
                file.write(json.dumps([self._position, batch["example_id"].tolist()]) + "\n")
        self._position += 1
        self._made += 1
        return {**batch, "noise": noise}

    def get_state(self) -> dict[str, Any]:
        return {**self._batches.get_state(), "batch": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state)
        self._position = state["batch"]
        self._made = 0

    def close(self) -> None:
        self._batches.close()


def init(vocabulary_size: int, key: jax.Array) -> dict[str, jax.Array]:
    """Two layers for pictures, a table for tokens."""
    keys = jax.random.split(key, 3)
    shapes = {"first": (IMAGE_SIZE**2 * 3, WIDTH), "second": (WIDTH, WIDTH), "tokens": (vocabulary_size, WIDTH)}
    weights = {name: 0.1 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return {**weights, "logit_scale": jnp.float32(2.0)}


def forward(params: Any, batch: Any, key: jax.Array | None) -> dict[str, Any]:
    """Embeddings of both, with dropout where there is a key."""
    pixels = batch["image"].reshape(len(batch["image"]), -1).astype(jnp.float32) / 255
    hidden = jnp.tanh(pixels @ params["first"])
    if key is not None:
        hidden = jnp.where(jax.random.bernoulli(key, 0.8, hidden.shape), hidden / 0.8, 0.0)
    image = hidden @ params["second"] + batch["noise"][:, None]
    text = (params["tokens"][batch["token_ids"]] * batch["token_mask"][..., None]).sum(1)
    return {
        "image": {"embeds": normalize(image)},
        "text": {"embeds": normalize(text)},
        "logit_scale": jnp.exp(params["logit_scale"]),
    }


def build(config: Config, directory: Path) -> Experiment:
    """Assembles the run."""
    source = Pictures()
    stored = directory / TOKENIZER_FILE
    tokenizer = load_tokenizer(stored) if stored.exists() else train_tokenizer(all_captions(source), vocab_size=64)
    pair = ("outputs.image.embeds", "outputs.text.embeds")
    scale = {"logit_scale": "outputs.logit_scale"}
    terms = {
        "gamma": Term(
            losses.gamma_contrastive,
            pair,
            keywords=scale | {"example_id": "batch.example_id"},
            options={"draw": "sampled", "positive": "sampled", "shape": 1.0, "memory_rate": 0.9},
            memory=functools.partial(losses.init_memory, EXAMPLES),
        ),
        "queue": Term(
            losses.queue_contrastive,
            (*pair, "teacher.image.embeds", "teacher.text.embeds"),
            keywords=scale,
            options={"target_share": 0.4},
            memory=functools.partial(losses.init_queue, QUEUE, WIDTH),
        ),
    }
    faults = json.loads(os.environ.get("REPKIT_FAULTS", "{}"))

    def batches() -> FaultyBatches:
        stream = make_batches(
            source,
            tokenizer=tokenizer,
            batch_size=config.train.batch_size,
            image_size=IMAGE_SIZE,
            max_length=MAX_LENGTH,
            shuffle=True,
            seed=config.train.seed,
            repeat=True,
            augmentation=Augmentation(),
            max_corrupt_share=0.1,
            num_threads=faults.get("threads", 1),
        )
        return FaultyBatches(stream)

    return Experiment(
        init=functools.partial(init, tokenizer.vocab_size),
        forward=forward,
        objective=Objective(terms),
        batches=batches,
        validate=lambda params: {"quality": float(jnp.abs(params["first"]).sum())},
        best_metric="quality",
        evaluate=lambda params: [],
        figures=lambda params, folder: [],
        save=lambda folder: tokenizer.save(folder / TOKENIZER_FILE),
        teacher=lambda: MomentumTeacher(forward),
    )
