"""The loops of one network in turn, and the table of what was measured."""

import contextlib
import time
from statistics import median
from typing import Any

import psutil

from distcv.arithmetic import matmul_flops
from distcv.bench import Arguments, measure
from distcv.bench.conventional import ConventionalLoop
from distcv.bench.loops import BareLoop, OwnLoop
from distcv.bench.memory import memory
from distcv.command_line import RunOptions
from distcv.config import Recipe
from distcv.runtime import Runtime
from distcv.runtime.device import synchronize
from distcv.training import load_data


def side_by_side(
    arguments: Arguments, recipe: Recipe, options: RunOptions, users_environment: dict[str, str]
) -> dict[str, Any]:
    """Figures of the loops; empty but on the main process."""
    runtime = Runtime(
        recipe, compile=options.compile, sync_bn=options.sync_bn, hang_timeout=options.hang_timeout
    )
    with runtime.peers_named(), contextlib.ExitStack() as at_the_end:
        data = load_data(recipe, options.data_dir, lambda line: None)
        own = OwnLoop(recipe, data, runtime)
        figures = runtime.record() | _first_step(own)
        loops: list[measure.Loop] = [own]
        bare = None
        if not arguments.only_own:
            bare = BareLoop(own)
            loops.append(bare)
        shape = tuple(data.train_images.shape[1:])
        if not arguments.only_own and runtime.processes == 1:
            conventional = ConventionalLoop(
                recipe, options.data_dir, shape, runtime.device, users_environment
            )
            loops.append(at_the_end.enter_context(contextlib.closing(conventional)))
        found = measure.rates(loops, repeats=arguments.repeats, seconds=arguments.seconds)
        figures |= _derived(found, recipe.batch_size)
        figures["memory"] = memory(own, bare)
        figures["flops_per_image"] = own.training.flops_per_image
        figures["matmul_flops"] = matmul_flops(runtime, repeats=9)
        if runtime.processes == 1 and (parts := measure.parts(own, min(3.0, arguments.seconds))):
            figures["parts"] = parts
        if runtime.is_main:
            print("\n".join(table(recipe, runtime.describe(), figures)), flush=True)
        runtime.close()
    return figures if runtime.is_main else {}


def _first_step(own: OwnLoop) -> dict[str, float]:
    """Seconds of the first step, and from the start of this process to its end."""
    began = time.perf_counter()
    own.run(0)
    synchronize()
    return {
        "first_step_seconds": time.perf_counter() - began,
        "seconds_to_first_step": time.time() - psutil.Process().create_time(),
    }


def _derived(found: dict[str, list[float]], batch_size: int) -> dict[str, Any]:
    """Images/s of the loops, and what follows of them."""
    others = {name: rates for name, rates in found.items() if name != "distcv"}
    return {
        "images_per_second": found,
        "ratio": {name: measure.ratio(found["distcv"], rates) for name, rates in others.items()},
        "warm_step_seconds": batch_size / median(found["distcv"]),
    }


def table(recipe: Recipe, where: str, figures: dict[str, Any]) -> list[str]:
    """The figures in words."""
    lines = [
        f"{recipe.model} on {recipe.dataset}, {recipe.precision}, batch {recipe.batch_size}",
        where,
        f"process start to first step {figures['seconds_to_first_step']:.1f} s, of which the first "
        f"step took {figures['first_step_seconds']:.1f} s; a step takes "
        f"{1000 * figures['warm_step_seconds']:.3g} ms when warm",
        "",
        f"{'loop':14}{'images/s':>12}{'least':>12}{'most':>12}{'distcv / it':>14}{'MFU':>8}",
    ]
    for name, found in figures["images_per_second"].items():
        over = f"{figures['ratio'][name]:14.3f}" if name in figures["ratio"] else " " * 14
        done = median(found) * figures["flops_per_image"] / figures["processes"]
        lines.append(
            f"{name:14}{median(found):12,.0f}{min(found):12,.0f}{max(found):12,.0f}{over}"
            f"{100 * done / figures['matmul_flops']:6.1f} %"
        )
    lines += [
        "",
        f"{figures['flops_per_image'] / 1e6:,.1f} MFLOP an image; a matmul here makes "
        f"{figures['matmul_flops'] / 1e9:,.0f} GFLOP/s a process",
    ]
    if "parts" in figures:
        shares = (f"{name} {100 * share:.0f} %" for name, share in figures["parts"].items())
        lines.append(f"time by part: {', '.join(shares)}")
    return [*lines, _memory_line(figures["memory"])]


def _memory_line(found: dict[str, Any]) -> str:
    needed = [
        f"{name} {(found[name]['stays'] + found[name]['step']) / 1e6:,.1f} MB"
        for name in ("distcv", "bare")
        if name in found
    ]
    if "ratio" in found:
        needed.append(f"ratio {found['ratio']:.2f}")
    return f"memory: {', '.join(needed)}, resident data set {found['resident_bytes'] / 1e6:,.1f} MB"
