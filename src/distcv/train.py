"""Train an image classifier: ``python -m distcv.train --model resnet18``.

The same command under ``accelerate launch`` trains on as many processes as that starts.
"""

import contextlib
import importlib.util
import os
import shutil
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from distcv.command import run_command
from distcv.command_line import RunOptions, check_name, read_command_line
from distcv.config import InputError, Recipe
from distcv.data import find_dataset
from distcv.environment import launch_time, set_thread_environment
from distcv.models import find_model
from distcv.preempt import NOT_SAVED, STOPPED, StopRequest, answered

if TYPE_CHECKING:
    from distcv.loop import Evaluation
    from distcv.run_folder import RunFolder
    from distcv.runtime import Runtime
    from distcv.training import Progress, Training


def main() -> int:
    """Read the command line, then train; nothing heavy is loaded before it is known to be right."""
    recipe, options = read_command_line(
        prog="distcv.train",
        description="Train an image classifier; the recipe of --model is where the values start.",
        find_model=find_model,
    )
    find_model(recipe.model)
    find_dataset(recipe.dataset)
    if options.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    for package in options.track:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--track {package}: pip install 'distcv[{package}]' first")
    set_thread_environment()
    return train(recipe, options)


def train(recipe: Recipe, options: RunOptions) -> int:
    """One run from its start, or from its newest checkpoint, to its end or a stop request.

    Returns the exit code: 0; 75 if the run was stopped and can go on; 74 if it stopped since it
    couldn't be saved.

    Raises:
        InputError: anything that is wrong before step 1.
    """
    stop = StopRequest()  # before torch is loaded, which takes seconds
    from distcv.runtime import Runtime
    from distcv.saving import NotSaved

    try:
        runtime = Runtime(
            recipe,
            compile=options.compile,
            sync_bn=options.sync_bn,
            hang_timeout=options.hang_timeout,
            node_metrics=options.node_metrics,
        )
    except (InputError, RuntimeError):  # it can't join the others
        if stop.orphaned():
            return STOPPED
        raise
    with runtime.peers_named():
        with contextlib.closing(choose_folder(recipe, options, runtime)) as folder:
            try:
                code = run(recipe, options, runtime, folder, stop)
            except NotSaved:
                code = NOT_SAVED
        runtime.close()
    return code


def choose_folder(recipe: Recipe, options: RunOptions, runtime: "Runtime") -> "RunFolder":
    """The run folder of --name, or of the model with W&B's id or the time of the launch.

    Raises:
        InputError: that id makes no name.
    """
    from distcv.run_folder import RunFolder

    started = time.strftime("%Y%m%d-%H%M%S", time.localtime(launch_time()))
    run_id = os.environ.get("WANDB_RUN_ID")
    default_name = f"{recipe.model}-{run_id or started}"
    name = runtime.on_main(
        lambda: options.name or check_name(default_name, f"WANDB_RUN_ID = {run_id!r}: ")
    )
    return RunFolder(options.runs_dir / name)


def run(
    recipe: Recipe,
    options: RunOptions,
    runtime: "Runtime",
    folder: "RunFolder",
    stop: StopRequest,
) -> int:
    """What :func:`train` does between joining the other processes and leaving them."""
    from distcv import checkpoint
    from distcv.loop import Diverged, stop_agreed, timed_evaluation, train_epoch
    from distcv.samples import sample_picture
    from distcv.saving import Saver
    from distcv.tracking import Console, Trackers
    from distcv.training import Progress, build, load_data, restore

    # Where: console, run folder.
    console = Console(runtime, recipe)
    runtime.on_main(lambda: folder.open(recipe, console.say))
    if (finished := runtime.on_main(folder.read_result)) is not None:
        console.say(
            f"run {folder.path} is finished: test accuracy {finished['test_accuracy']:.2f} % "
            f"after {finished['epochs']:g} epochs; choose another --name to train again"
        )
        return 0
    if runtime.from_main(runtime.restarts > 0 and answered(folder.path, launch_time())):
        return STOPPED  # the launcher took the stop for a failure
    runtime.on_main(lambda: stop.watch(folder.path))
    newest = runtime.on_main(lambda: checkpoint.newest(folder.checkpoints, console.say))
    start = runtime.on_main(lambda: folder.record_start(options, runtime, newest))

    # What: data, network, optimizer, as if for one device, then wrapped for the strategy.
    data = load_data(recipe, options.data_dir, console.say)
    training = build(recipe, data, runtime)
    runtime.on_main(lambda: check_space(folder, training))
    for line in training.describe():
        console.say(line)
    console.say(f"run folder {folder.path}")

    # Resume, if the run folder holds a checkpoint.
    progress = Progress()
    if newest is not None:
        progress = restore(training, checkpoint.load(newest))
        console.say(f"resuming after step {progress.step}, from {newest}")
    if start.get("changed"):
        changes = (f"{key} {old} -> {new}" for key, (old, new) in start["changed"].items())
        console.say(f"since the last start: {', '.join(changes)}")
    if "seconds_lost" in start:
        console.say(f"restart {runtime.restarts}: {start['seconds_lost']:.1f} s lost")
    due = training.evaluation_due(progress)
    runtime.on_main(lambda: folder.cut_metrics(progress.step, evaluation_due=due))
    trackers = Trackers(
        runtime,
        folder,
        recipe,
        options,
        console,
        commit=start["commit"],
        samples=lambda: sample_picture(data, recipe),
    )
    runtime.on_main(trackers.open)

    def log(row: dict[str, Any]) -> None:
        if runtime.is_main:
            folder.add_row(row)
        trackers.log(row)

    def log_training(row: dict[str, Any]) -> None:
        console.training(row)
        log(row)

    resumed_at = progress.step
    saver = Saver(
        training,
        folder,
        trackers,
        console,
        stop,
        versions=start["versions"],
        keep={resumed_at} | every_nth_epoch(training, options),
        last=newest.name if newest else None,
    )

    def leave() -> int:
        if progress.step > resumed_at:
            saver.save(progress, stopping=True)
        trackers.close(stopped=True)
        console.say(
            f"stopped after step {progress.step}; to go on: the same command with "
            f"--name {folder.path.name}"
        )
        return stop.answer(progress.step)

    if newest is None and recipe.nonfinite == "rollback":
        saver.save(progress)  # a place to go back to

    # Train, epoch by epoch; evaluate and save after each.
    if stop_agreed(runtime, stop):
        return leave()
    evaluation = None
    while progress.step < training.total_steps or training.evaluation_due(progress):
        stopped = False
        try:
            if not training.evaluation_due(progress):
                epoch = progress.step // training.steps_per_epoch + 1
                done = progress.step % training.steps_per_epoch
                with console.epoch(epoch, done, training.steps_per_epoch):
                    stopped = not train_epoch(
                        training,
                        progress,
                        log_every=options.log_every,
                        log=log_training,
                        advance=console.advance,
                        checkpoint_every=options.checkpoint_every,
                        save=partial(saver.save, progress),
                        stop=stop,
                    )
            if not stopped:
                evaluation = timed_evaluation(training, progress, stop)
        except Diverged as error:
            if (before := saver.roll_back(progress, error)) is None:
                trackers.fail(str(error))
                runtime.wait()  # a launcher ends all as soon as one has left
                raise
            progress, resumed_at = before, before.step
            continue
        if stopped or evaluation is None:
            return leave()
        row = epoch_row(training, progress, evaluation)
        console.epoch_line(row)
        log(row)
        progress.epoch_sums = [0.0] * 3
        saver.save(progress, stopping=progress.step == training.total_steps)

    # Result. A run that was killed between its last checkpoint and here is evaluated again.
    evaluation = evaluation or timed_evaluation(training, progress)
    assert evaluation is not None
    result = make_result(training, data.info.classes, progress, evaluation, start)
    if options.track and runtime.is_main:
        shown = data.test_images[[one["sample"] for one in result["mistakes"]]]
        assert progress.best_step is not None
        steps = (progress.step, progress.best_step)
        last, best = (checkpoint.place(folder.checkpoints, step) for step in steps)
        trackers.show_result(result, shown, last=last, best=best if best.exists() else last)
    trackers.close()  # before the run counts as finished, else a kill would leave it open there
    stop.ignore()
    saver.write_result(result)
    console.say(
        f"test accuracy {result['test_accuracy']:.2f} %, loss {result['test_loss']:.4f}, "
        f"{result['seconds']:.1f} s; result in {folder.result}"
    )
    return 0


def every_nth_epoch(training: "Training", options: RunOptions) -> set[int]:
    """Steps of the checkpoints that ``--keep-every`` keeps."""
    if options.keep_every is None:
        return set()
    interval = options.keep_every * training.steps_per_epoch
    return set(range(interval, training.total_steps + 1, interval))


def check_space(folder: "RunFolder", training: "Training") -> None:
    """Raise InputError unless the disk has room for the checkpoints that are kept at a time.

    The room is taken for a moment: a quota shows in nothing else.
    """
    tensors = 3 if training.ema or training.recipe.optimizer != "sgd" else 2
    needed = 4 * tensors * 4 * training.parameters + 2**20
    free = shutil.disk_usage(folder.path).free
    problem = f"{free / 1e6:.0f} MB free"
    if free >= needed:
        try:
            folder.take_room(needed)
            return
        except OSError as error:
            problem = str(error.strerror)
    raise InputError(
        f"run folder {folder.path}: {problem}, {needed / 1e6:.0f} MB needed for checkpoints: "
        "make room, or choose --runs-dir"
    )


def epoch_row(
    training: "Training", progress: "Progress", evaluation: "Evaluation"
) -> dict[str, Any]:
    """The row of metrics.jsonl at the end of an epoch."""
    loss, correct, samples = progress.epoch_sums
    return {
        "event": "epoch",
        **training.place(progress),
        "train_loss": loss / samples,
        "train_accuracy": 100 * correct / samples,
        "test_loss": evaluation.loss,
        "test_accuracy": evaluation.accuracy,
        "best_test_accuracy": progress.best_accuracy,
        "seconds": progress.seconds,
    }


def make_result(
    training: "Training",
    class_names: tuple[str, ...],
    progress: "Progress",
    evaluation: "Evaluation",
    start: dict[str, Any],
) -> dict[str, Any]:
    """The contents of result.json: accuracies in percent at the last epoch, no augmentation."""
    recipe, runtime = training.recipe, training.runtime
    assert progress.best_step is not None
    return {
        "model": recipe.model,
        "params": training.parameters,
        "dataset": recipe.dataset,
        "seed": recipe.seed,
        "epochs": progress.step / training.steps_per_epoch,
        "steps": progress.step,
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "best_test_accuracy": progress.best_accuracy,
        "best_epoch": progress.best_step / training.steps_per_epoch,
        "class_accuracy": dict(zip(class_names, evaluation.class_accuracy, strict=True)),
        "confusion": evaluation.confusion,
        "mistakes": evaluation.mistakes,
        "seconds": progress.seconds,
        "images_per_second": progress.step * recipe.batch_size / progress.train_seconds,
        "device": runtime.device_name,
        "processes": runtime.processes,
        "nodes": start["nodes"],
        "strategy": runtime.strategy.name,
        "precision": recipe.precision,
        "commit": start["commit"],
        "config_sha256": recipe.sha256,
        "environment": {
            key: start[key] for key in ("python", "distcv", "versions", "cpu", "cores", "threads")
        },
    }


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)


if __name__ == "__main__":
    command()
