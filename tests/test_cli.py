"""The console command on good and bad input. Bad input: one line, exit code 2, nothing written."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from repkit.cli import main
from repkit.lock import FolderLock
from repkit.recipe import RunDirectory
from repkit.simulation import simulated_devices
from repkit.train.checkpoint import CheckpointReader
from repkit.train.config import make_placement
from repkit.train.logging import read_metrics

RECIPE = str(Path(__file__).parent.parent / "experiments" / "two_tower.py")
TINY = [
    *("--smoke", "--set", "train.steps=4", "--set", "train.batch_size=8", "--set", "train.log_every=2"),
    *("--set", "train.checkpoint_every=4"),
]


def _jsonl(folder: Path, lines: list[str]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def _pairs(folder: Path, count: int = 16) -> str:
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        captions = [f"picture number {index}", f"the {index} of all"] if index % 2 else f"picture number {index}"
        lines.append(json.dumps({"image": f"{index}.png", "caption": captions}))
    return _jsonl(folder, lines)


def _from_jsonl(path: str) -> list[str]:
    settings = [
        "data.source=jsonl",
        "data.image_size=16",
        *(f"data.{split}={path}" for split in ("train", "validation", "test")),
    ]
    return [word for setting in settings for word in ("--set", setting)]


def _refusal(capsys, arguments: list[str]) -> str:
    """Runs the command, which must answer in one line with exit code 2, and returns the line."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"repkit: [^\n]+\n", output.err), output.err
    return output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "unknown option --stepz"),
        (["--resum"], "did you mean --resume?"),
        (["--set", "train.stepz=3"], "did you mean 'train.steps'?"),
        (["--set", "loss=info_nse"], "did you mean 'info_nce'?"),
        (["--set", "regularizers=brownian_brigde"], "did you mean 'brownian_bridge'?"),
        (["--set", "train.steps=0"], "train.steps must be at least 1, got 0"),
        (["--set", "data.source=jsonl", "--set", "data.train=no/such/file.jsonl"], "no/such/file.jsonl"),
        (["--set", "model.heads=3"], "width must be a multiple of heads"),
        (["--set", "data.name=singel"], "did you mean 'single'?"),
        (["--smoke", "--set", "train.batch_size=33"], "cannot be split over 8 devices; choose a multiple of 8"),
        (["--set", "train.clip_norm=-1"], "train.clip_norm must be positive"),
        (["--set", "train.weight_decay=nan"], "train.weight_decay takes a number, got 'nan'"),
        (["--set", "train.keep_best=-1"], "train.keep_best must be at least 0"),
        (["--smoke", "--set", "gamma.memory_rate=2"], "memory_rate"),
        (["--smoke", "--set", "data.max_length=0"], "max_length"),
        (["--smoke", "--set", "train.mesh.data=3"], "do not multiply to the 8 devices"),
    ],
)
def test_settings_that_cannot_be_used(capsys, tmp_path, arguments, message):
    run = tmp_path / "run"
    assert message in _refusal(capsys, ["train", RECIPE, "--run", str(run), *arguments])
    assert not run.exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "empty"),
        (['{"image": "0.png", "caption": "zero"}', "{broken"], "pairs.jsonl:2"),
        (['{"image": "0.png"}'], "pairs.jsonl:1"),
        (['{"image": "text.png", "caption": "zero"}'], "text.png"),
        (['{"image": "absent.png", "caption": "zero"}'], "absent.png"),
        (['{"image": "../0.png", "caption": "zero"}'], "pairs.jsonl:1"),
    ],
)
def test_image_caption_pairs_that_cannot_be_used(capsys, tmp_path, lines, message):
    _pairs(tmp_path, 1)
    (tmp_path / "text.png").write_text("this is no image")
    data = _from_jsonl(_jsonl(tmp_path, lines))
    assert message in _refusal(capsys, ["train", RECIPE, "--run", str(tmp_path / "run"), *TINY, *data])
    assert not (tmp_path / "run").exists()


def test_recipes_that_cannot_be_used(capsys, tmp_path):
    assert "no recipe at" in _refusal(capsys, ["train", str(tmp_path / "absent.py")])
    (tmp_path / "recipe.py").write_text("Config = object\n")
    assert "does not define smoke, build" in _refusal(capsys, ["train", str(tmp_path / "recipe.py")])


def test_run_directories_that_cannot_be_used(capsys, tmp_path):
    assert "cannot be written" in _refusal(capsys, ["train", RECIPE, "--smoke", "--run", "/proc/repkit-run"])
    (tmp_path / "file").write_text("x")
    assert "is a file" in _refusal(capsys, ["train", RECIPE, "--smoke", "--run", str(tmp_path / "file")])
    assert "holds other files and no run" in _refusal(capsys, ["train", RECIPE, "--smoke", "--run", str(tmp_path)])
    assert (tmp_path / "file").read_text() == "x"
    assert "no run in" in _refusal(capsys, ["evaluate", str(tmp_path)])
    assert "no run in" in _refusal(capsys, ["plot", str(tmp_path / "absent")])


def test_help_and_settings_are_printed(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert main(["train", RECIPE, "--show", "--set", "train.steps=7"]) == 0
    assert "train.steps = 7\n" in capsys.readouterr().out


@pytest.mark.slow
def test_doctor_finds_every_device_well(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert len(re.findall(r"^step on .* ok$", output, re.MULTILINE)) == len(jax.devices()) + 1
    assert "MISSING" not in output


@pytest.mark.slow
def test_training_on_a_mesh_with_a_tensor_axis(tmp_path):
    data = _from_jsonl(_pairs(tmp_path))
    assert main(["train", RECIPE, "--run", str(tmp_path / "run"), *TINY, *data, "--set", "train.mesh.tensor=2"]) == 0
    assert CheckpointReader(tmp_path / "run" / "checkpoints").steps() == [4]


@pytest.mark.slow
def test_pairs_of_ones_own_from_training_to_figures(capsys, tmp_path):
    run = tmp_path / "run"
    data = _from_jsonl(_pairs(tmp_path))
    arguments = ["train", RECIPE, "--run", str(run), *TINY, *data]
    assert main(arguments) == 0
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == [2, 4]
    assert main(["evaluate", str(run)]) == 0
    assert "retrieval" in capsys.readouterr().out
    results = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [(result["task"], result["step"]) for result in results] == [("retrieval", 4), ("geometry", 4)]
    assert 0 <= results[0]["metrics"]["text_to_image/R@1"] <= 1
    assert main(["plot", str(run)]) == 0
    figures = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(figures) == 4
    for figure in figures:
        with Image.open(figure) as image:
            assert image.size[0] > 300

    config = (run / "config.json").read_bytes()
    assert "already holds this run; add --resume" in _refusal(capsys, arguments)
    message = _refusal(capsys, [*arguments, "--resume", "--set", "train.steps=5"])
    assert "belongs to a run with another configuration (train.steps: 4 -> 5)" in message
    assert (run / "config.json").read_bytes() == config
    assert main([*arguments, "--resume"]) == 0
    assert CheckpointReader(run / "checkpoints").steps() == [4]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "repkit.cli", *arguments]


def _arrays(run: Path) -> dict[str, np.ndarray]:
    """Every leaf of the newest checkpoint of a run, by its path."""
    recipe, config = RunDirectory(run).load()
    experiment = recipe.build(config, run)
    placement = make_placement(config.train, experiment.init, experiment.forward, experiment.objective)
    state = CheckpointReader(run / "checkpoints").restore(placement.abstract).state
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--set", "train.ema_decay=0.9", "--set", "model.dropout=0.1"]])
def test_a_killed_run_resumes_to_the_very_same_parameters(tmp_path, extra):
    environment = os.environ | simulated_devices(2)
    settings = [
        *("--smoke", "--set", "train.steps=40", "--set", "train.log_every=1", "--set", "train.checkpoint_every=30"),
        *("--set", "regularizers=brownian_bridge", *extra),
    ]

    def train(name: str, *more: str) -> list[str]:
        return _command("train", RECIPE, "--run", str(tmp_path / name), *settings, *more)

    subprocess.run(train("whole"), check=True, env=environment, capture_output=True)
    with subprocess.Popen(train("killed"), env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 13/"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
    assert process.returncode == 75
    assert re.search(r"SIGTERM at step \d+; saved, --resume continues", rest)
    stopped = CheckpointReader(tmp_path / "killed" / "checkpoints").latest_step()
    assert stopped is not None
    assert 13 <= stopped < 30
    subprocess.run(train("killed", "--resume"), check=True, env=environment, capture_output=True)

    whole, killed = (_arrays(tmp_path / name) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert any("params" in path for path in whole)
    for path, value in whole.items():
        np.testing.assert_array_equal(value, killed[path], err_msg=path)
    losses = [
        {row["step"]: row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row}
        for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]
    assert list(losses[0]) == list(range(1, 41))


TEACHER_RECIPE = """
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from repkit.objective import Objective, Term
from repkit.recipe import Experiment
from repkit.train.config import TrainConfig
from repkit.train.teacher import FrozenTeacher


@dataclass(frozen=True)
class Config:
    slope: float = 2.0
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=4, batch_size=8, warmup_steps=1, log_every=2, checkpoint_every=2, log_term_gradients=True
        )
    )


def smoke(config):
    return config


class Stream:
    corrupt = 0
    position = 0

    def __next__(self):
        self.position += 1
        return {"x": np.linspace(-1, 1, 8, dtype=np.float32), "where": np.ones(8, bool)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def close(self):
        pass


def forward(params, batch, key):
    return {"y": params["slope"] * batch["x"]}


def squared_error(student, teacher, *, where=None, reduction="mean"):
    return jnp.square(student - teacher)


def build(config, directory):
    return Experiment(
        init=lambda key: {"slope": jnp.ones(())},
        forward=forward,
        objective=Objective({"error": Term(squared_error, ("outputs.y", "teacher.y"))}),
        batches=Stream,
        validate=lambda params: {"slope": float(params["slope"])},
        best_metric="slope",
        evaluate=lambda params: [],
        figures=lambda params, folder: [],
        save=lambda folder: None,
        teacher=lambda: FrozenTeacher(forward, {"slope": np.asarray(config.slope, np.float32)}),
        summary=lambda: "student <- teacher",
    )
"""


def test_a_recipe_with_a_teacher_trains_and_goes_on_with_the_same_teacher_only(capsys, tmp_path):
    recipe, run = tmp_path / "recipe.py", tmp_path / "run"
    recipe.write_text(TEACHER_RECIPE)
    arguments = ["train", str(recipe), "--run", str(run)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("student <- teacher\n")
    first, *_, last = (row for row in read_metrics(run / "metrics.jsonl") if "error" in row)
    assert 0 < last["error"] < first["error"]
    assert last["error/gradient_norm"] > 0
    # The newest checkpoint is damaged; and another process is at work here.
    (run / "checkpoints" / "4" / "about" / "about.json").write_text("{}")
    assert main([*arguments, "--resume"]) == 0
    damage = r"repkit: warning: checkpoint .*/4 is damaged: about/about.json: .*; step 2 is taken instead\n"
    assert re.search(damage, capsys.readouterr().err)
    assert CheckpointReader(run / "checkpoints").read("params/", step=4).step == 4
    with FolderLock(run / "checkpoints"):
        assert main([*arguments, "--resume"]) == 2
    assert "in use by process" in capsys.readouterr().err
    # The same settings, but what stands behind them has changed.
    recipe.write_text(
        TEACHER_RECIPE.replace('{"slope": np.asarray(config.slope', '{"slope": np.asarray(3 + config.slope')
    )
    assert main([*arguments, "--resume"]) == 2
    assert "cannot resume with another teacher" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_for_devices_that_are_not_here(capsys, tmp_path):
    data = _from_jsonl(_pairs(tmp_path))
    settings = ["--set", "loss=info_nce", "--set", "train.batch_size=32", "--set", "train.mesh.fsdp=2"]
    settings += ["--set", "model.width=16", "--set", "model.depth=1", "--set", "model.heads=2"]
    assert main(["plan", RECIPE, "--topology", "h100-8", *data, *settings]) == 0
    output = capsys.readouterr().out
    assert "h100-8: 8 devices, global batch 32, 4 rows each" in output
    assert "an estimate from the chip's peak rates" in output
    assert "collective-permute" in output
    assert "rows fit" in output


def test_a_plan_for_what_there_is_not_is_refused(capsys):
    assert "did you mean 'v5e'" in _refusal(capsys, ["plan", RECIPE, "--topology", "v5x-8"])
    assert "there is no slice 'v6e-7'" in _refusal(capsys, ["plan", RECIPE, "--topology", "v6e-7"])
    assert "needs train.placement=jit" in _refusal(
        capsys, ["plan", RECIPE, "--topology", "h100-8", "--set", "train.placement=pmap"]
    )
