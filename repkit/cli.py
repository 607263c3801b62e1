"""The console command: `repkit train | evaluate | plot | plan | doctor`.

Exit codes: 0 done; 2 the input cannot be used, one line says why; 75 interrupted by a signal and saved, `--resume`
continues; 79 no progress for too long and 80 another process lost, `--resume` continues; 130 aborted by a second
Ctrl-C; 1 anything else.
"""

import argparse
import contextlib
import dataclasses
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from repkit.checks import InputError, RunWarning

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
        with warnings.catch_warnings():
            warnings.simplefilter("always", RunWarning)
            warnings.showwarning = _show(warnings.showwarning)
            return options.run_command(options)
    except InputError as error:
        print(f"repkit: {error}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("repkit: aborted", file=sys.stderr)
        return 130


def _show(default: Callable[..., None]) -> Callable[..., None]:
    """Shows our own warnings in a line, and all others as they are."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, RunWarning):
            print(f"repkit: warning: {message}", file=sys.stderr)
        else:
            default(message, category, *place, **more)

    return show


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
    import jax

    from repkit.train.checkpoint import SaveFailedError
    from repkit.train.interrupt import EXIT_INTERRUPTED
    from repkit.train.loop import NonFiniteLoss
    from repkit.train.memory import share_one_heap
    from repkit.train.processes import Peers, cluster_from, join

    share_one_heap()
    cluster = cluster_from(os.environ)
    if cluster is not None:
        join(cluster)
    run = RunDirectory(options.run or Path("runs") / options.recipe.stem)
    try:
        with Peers(cluster) as peers:
            outcome = _trained(options, recipe, config, run, peers)
    except (NonFiniteLoss, SaveFailedError) as error:
        print(f"repkit: {error}", file=sys.stderr)
        return 1
    is_first = jax.process_index() == 0
    if outcome.interrupted:
        if is_first:
            kept = "saved, --resume continues" if outcome.step else "--resume begins"
            print(f"repkit: {outcome.interrupted} at step {outcome.step}; {kept}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if is_first:
        print(f"trained to step {outcome.step}: {run.path}")
    return 0


def _trained(options: argparse.Namespace, recipe: Any, config: Any, run: Any, peers: Any) -> Any:
    """Trains on all processes; the first of them makes the run directory and writes the logs."""
    import jax

    from repkit.train.checkpoint import Checkpointer
    from repkit.train.config import check_devices, check_step, make_placement, make_schedule
    from repkit.train.interrupt import Interrupts
    from repkit.train.logging import MetricLogger
    from repkit.train.loop import fit
    from repkit.train.processes import barrier
    from repkit.train.step import make_term_gradient_norms
    from repkit.train.watchdog import Watchdog

    is_first = jax.process_index() == 0
    if is_first:
        run.check_usable(config, resume=options.resume)
        run.clear_beginning()
    barrier("the run directory is checked")
    check_devices(config.train)
    experiment = recipe.build(config, run.path)
    teacher = None if experiment.teacher is None else experiment.teacher()
    batches = experiment.batches()
    start = batches.get_state()
    model = (experiment.init, experiment.forward, experiment.objective)
    check_step(config.train, *model, next(batches), teacher=teacher)
    batches.set_state(start)
    if is_first:
        run.create(config, options.recipe, experiment.save)
        if experiment.summary is not None:
            print(experiment.summary())
    barrier("the run directory is made")

    placement = make_placement(config.train, *model, rules=experiment.sharding_rules, teacher=teacher)
    term_gradient_norms = None
    if config.train.log_term_gradients:
        norms = jax.jit(
            make_term_gradient_norms(
                experiment.forward, experiment.objective, teacher=teacher, micro_batches=config.train.micro_batches
            )
        )
        term_gradient_norms = lambda state, batch: norms(state, batch, placement.teacher_params)  # noqa: E731
    with (
        Interrupts() as interrupts,
        Checkpointer(
            run.checkpoints,
            keep_last=config.train.keep_last,
            keep_best=config.train.keep_best,
            best_metric=experiment.best_metric,
            config_hash=run.config_hash(),
        ) as checkpointer,
        MetricLogger(run.path, total_steps=config.train.steps, enabled=is_first) as logger,
        Watchdog(config.train.hang_seconds, run.path) as watchdog,
        contextlib.closing(batches),
        peers.left_on_error(),
    ):
        return fit(
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
            non_finite=config.train.non_finite,
            beat=watchdog.beat,
        )


def _plan(options: argparse.Namespace) -> int:
    import json
    import tempfile

    from repkit.plan.chips import has_tpu_compiler, topology
    from repkit.simulation import simulated_devices

    target = topology(options.topology)
    # Before JAX is imported: what is compiled for is not what this process runs on.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if target.shape is None or not has_tpu_compiler():
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            os.environ.update(simulated_devices(target.devices))
        if target.shape is not None:
            reason = 'the TPU compiler is not installed (pip install "repkit[tpu]" has it)'
            print(f"repkit: {reason}; simulated devices stand in", file=sys.stderr)
    else:
        # A program that was kept can be read back only on the devices that it is for.
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

    from repkit.config import override, replace
    from repkit.plan.step import describe, plan_recipe
    from repkit.recipe import load_recipe

    recipe = load_recipe(options.recipe)
    config = override(recipe.Config(), options.settings)
    if config.train.placement == "pmap":
        raise InputError("a plan needs train.placement=jit")
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
    results = [dataclasses.replace(result, step=run.step) for result in run.experiment.evaluate(run.params)]
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
    import jax

    from repkit.doctor import report
    from repkit.train.processes import Peers, cluster_from, join

    cluster = cluster_from(os.environ)
    if cluster is not None:
        join(cluster)
    healthy = True
    with Peers(cluster):
        for line, is_good in report():
            healthy = healthy and is_good
            if jax.process_index() == 0 or not is_good:
                print(line, flush=True)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
