"""The console command: `repkit train | evaluate | plot | plan | doctor`.

Exit codes: 0 done; 2 the input cannot be used, one line says why; 75 interrupted by a signal and saved, `--resume`
continues; 130 aborted by a second Ctrl-C; 1 anything else.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from repkit.checks import InputError

EXIT_INPUT = 2


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and name the nearest valid option."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown.split()[0].split("=")[0], options, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "a setting of the recipe is given as --set name=value"
            message = f"unknown option {unknown.split()[0]}; {hint}"
        raise InputError(message)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        # Sub-parsers hand unknown options up to the main parser, which does not know the sub-command's options.
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="repkit", description="Train and evaluate representation models in JAX.", epilog=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser("train", help="train the model that a recipe describes")
    train.add_argument("recipe", type=Path, help="a recipe file, such as experiments/two_tower.py")
    train.add_argument("--run", type=Path, help="the run directory (default: runs/<name of the recipe>)")
    train.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help="override a setting"
    )
    train.add_argument("--smoke", action="store_true", help="the recipe's smallest setting; takes seconds")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    train.add_argument("--show", action="store_true", help="print the settings and stop")
    train.set_defaults(run_command=_train)

    for name, command, text in (
        ("evaluate", _evaluate, "evaluate a run on the test data"),
        ("plot", _plot, "draw the figures of a run"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("run", type=Path, help="the run directory")
        sub.add_argument("--recipe", type=Path, help="the recipe file, if it has moved since the run")
        sub.add_argument("--best", action="store_true", help="the best checkpoint instead of the newest")
        sub.set_defaults(run_command=command)

    plan = commands.add_parser("plan", help="what a step of a recipe needs on devices that are not here")
    plan.add_argument("recipe", type=Path, help="a recipe file, such as experiments/two_tower.py")
    plan.add_argument("--topology", required=True, metavar="CHIP-N", help="such as v5e-256, v4-64, v6e-16 or h100-8")
    plan.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help="override a setting"
    )
    plan.add_argument("--json", action="store_true", help="print the plan as one line of JSON")
    plan.set_defaults(run_command=_plan)

    doctor = commands.add_parser("doctor", help="show versions and devices, and run a tiny step on each device")
    doctor.set_defaults(run_command=_doctor)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    try:
        options = _parser().parse_args(arguments)
        return options.run_command(options)
    except InputError as error:
        print(f"repkit: {error}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("repkit: aborted", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace) -> int:
    from repkit.config import flatten, override
    from repkit.recipe import RunDirectory, load_recipe

    recipe = load_recipe(options.recipe)
    config = recipe.smoke(recipe.Config()) if options.smoke else recipe.Config()
    config = override(config, options.settings)
    if options.show:
        for name, value in flatten(config).items():
            print(f"{name} = {value}")
        return 0
    run = RunDirectory(options.run or Path("runs") / options.recipe.stem)
    run.check_usable(config, resume=options.resume)

    import jax

    from repkit.train.checkpoint import Checkpointer
    from repkit.train.config import check_devices, check_step, make_placement, make_schedule
    from repkit.train.interrupt import EXIT_INTERRUPTED, Interrupts
    from repkit.train.logging import MetricLogger
    from repkit.train.loop import NonFiniteLoss, fit
    from repkit.train.step import make_term_gradient_norms

    if jax.process_count() > 1:
        raise InputError("training on several processes is not supported yet; start one process")
    check_devices(config.train)
    experiment = recipe.build(config, run.path)
    teacher = None if experiment.teacher is None else experiment.teacher()
    batches = experiment.batches()
    start = batches.get_state()
    model = (experiment.init, experiment.forward, experiment.objective)
    check_step(config.train, *model, next(batches), teacher=teacher)
    batches.set_state(start)
    run.create(config, options.recipe)
    experiment.save(run.path)
    if experiment.summary is not None:
        print(experiment.summary())

    placement = make_placement(config.train, *model, rules=experiment.sharding_rules, teacher=teacher)
    term_gradient_norms = None
    if config.train.log_term_gradients:
        norms = jax.jit(
            make_term_gradient_norms(
                experiment.forward, experiment.objective, teacher=teacher, micro_batches=config.train.micro_batches
            )
        )
        term_gradient_norms = lambda state, batch: norms(state, batch, placement.teacher_params)  # noqa: E731
    is_first = jax.process_index() == 0
    with (
        Interrupts() as interrupts,
        Checkpointer(
            run.checkpoints,
            keep_last=config.train.keep_last,
            keep_best=config.train.keep_best,
            best_metric=experiment.best_metric,
        ) as checkpointer,
        MetricLogger(run.path, total_steps=config.train.steps, enabled=is_first) as logger,
    ):
        try:
            outcome = fit(
                placement,
                batches,
                steps=config.train.steps,
                key=jax.random.key(config.train.seed),
                checkpointer=checkpointer,
                logger=logger,
                interrupts=interrupts,
                log_every=config.train.log_every,
                checkpoint_every=config.train.checkpoint_every,
                schedule=make_schedule(config.train),
                validate=experiment.validate,
                term_gradient_norms=term_gradient_norms,
            )
        except NonFiniteLoss as error:
            print(f"repkit: {error}", file=sys.stderr)
            return 1
        finally:
            batches.close()
    if outcome.interrupted:
        kept = "saved, --resume continues" if outcome.step else "--resume begins"
        print(f"repkit: {outcome.interrupted} at step {outcome.step}; {kept}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"trained to step {outcome.step}: {run.path}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    import contextlib
    import dataclasses
    import json
    import os
    import tempfile

    from repkit.config import override, replace
    from repkit.plan.chips import has_tpu_compiler, topology
    from repkit.recipe import load_recipe

    target = topology(options.topology)
    # Before the first use of JAX: what is compiled for is not what this process runs on.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if target.shape is None or not has_tpu_compiler():
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_force_host_platform_device_count" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={target.devices}".strip()
        if target.shape is not None:
            reason = 'the TPU compiler is not installed (pip install "repkit[tpu]" has it)'
            print(f"repkit: {reason}; simulated devices stand in", file=sys.stderr)

    from repkit.plan.step import describe, plan_recipe

    recipe = load_recipe(options.recipe)
    config = override(recipe.Config(), options.settings)
    if config.train.placement == "pmap":
        raise InputError("a plan is made for train.placement=jit")
    with tempfile.TemporaryDirectory() as directory:
        # A batch of a few rows shows what arrays there are; the step is traced for the configured number of rows.
        here = {"train.batch_size": 8, "train.accumulate": 1, "train.micro_batches": 1}
        here |= {"train.mesh.data": -1, "train.mesh.fsdp": 1, "train.mesh.tensor": 1}
        experiment = recipe.build(replace(config, here), Path(directory))
        with contextlib.closing(experiment.batches()) as batches:
            rows = next(batches)
    teacher = None if experiment.teacher is None else experiment.teacher()
    plan, fits = plan_recipe(config.train, experiment, rows, target, teacher=teacher)
    if options.json:
        print(json.dumps(dataclasses.asdict(plan) | {"largest_batch": fits}, default=list))
    else:
        print(describe(plan, fits))
    return 0


def _load(options: argparse.Namespace):
    from repkit.trained import load_run

    return load_run(options.run, recipe=options.recipe, checkpoint="best" if options.best else "newest")


def _evaluate(options: argparse.Namespace) -> int:
    from repkit.evaluate.results import append_results, format_table

    run = _load(options)
    results = run.experiment.evaluate(run.params)
    append_results(results, run.directory.path / "results.jsonl")
    print(f"{run.directory.path} at step {run.step}")
    print(format_table(results))
    return 0


def _plot(options: argparse.Namespace) -> int:
    from repkit.plots import loss_curves
    from repkit.train.logging import read_metrics

    run = _load(options)
    figures = run.directory.figures
    figures.mkdir(exist_ok=True)
    curves = figures / "loss_curves.png"
    loss_curves(read_metrics(run.directory.path / "metrics.jsonl"), curves)
    for path in [curves, *run.experiment.figures(run.params, figures)]:
        print(path)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from repkit.doctor import report

    healthy = True
    for line, is_good in report():
        healthy = healthy and is_good
        print(line)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
