"""docs/results.md: the rows of each network, its three lines, the commands of its rows."""

from typing import NamedTuple

from distcv.models import MODELS
from distcv.results import duration, short_commit, spread
from distcv.results.analysis import NOT_YET, analysis, result, target, what_helped
from distcv.results.documents import Aim, Document
from distcv.results.files import NONE, Measured

DATA = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
HEAD = ["", "recipe", "test accuracy", "n", "train accuracy", "epochs", "time", "hardware",
        "precision", "commit"]  # fmt: skip
INTRODUCTION = """\
# Results

Test accuracy in percent on the whole test set, without test-time augmentation, at the last epoch:
mean ± sample standard deviation over n seeds. Of each network there are up to three kinds of rows:

- *document*: what the source document prints, the best epoch of one run, chosen by the test set;
- *reproduced*: the document's recipe followed with distcv (`configs/*_document.yaml`: their heads
  say what the document leaves open and what was assumed);
- *ours*: the recipes that come with distcv.

Time is that of training and evaluation, the mean over the runs; other programs may have run beside
them. Train accuracy is measured while the epoch goes on, on augmented images, with dropout and,
where a recipe averages the weights, before that.

This page is made of the files in [results/](../results) by `python -m distcv.results --tables` and
verified by `python -m distcv.results --check`. The commands below a network's lines make its runs
again; those in `runs/` become rows by

```sh
python -m distcv.results runs --collect
```

Under Slurm, `sbatch --array=0-4 slurm/seeds.sh --recipe NAME`, with a loop's seeds and flags, does
what the loop does. To look into runs, make [a report](reporting.md) of them.

"""


class System(NamedTuple):
    """A network with what its document says and what was measured."""

    name: str
    said: Document
    reproduced: list[Measured]
    """The document's recipe, or nothing."""
    ours: list[Measured]
    """Our recipes of this network and its data, first the one of its name."""

    def aim_of(self, recipe: str) -> Aim | None:
        """What a recipe is to reach, if anything."""
        return ({self.name: self.said.aim} | self.said.further_aims).get(recipe)


def page(systems: list[System]) -> str:
    """The whole page."""
    return INTRODUCTION + overview(systems, "../results/") + "".join(map(section, systems))


def overview(systems: list[System], results: str) -> str:
    """A row for each network: the document's best epoch, its recipe reproduced, ours.

    Args:
        systems: the networks.
        results: the folder of result files, as it is linked to.
    """
    rows = []
    for system in systems:
        recipe = system.ours[0].recipe
        name = f"`{recipe.model}`" + (" with schedule" if system.name != recipe.model else "")
        both = [_cell(recipes, results) for recipes in (system.reproduced, system.ours)]
        size = f"{MODELS[recipe.model].params:,}"
        rows.append([name, size, DATA[recipe.dataset], _printed(system.said), *both])
    head = ["network", "parameters", "data", "document, best epoch", "reproduced", "ours"]
    return _table(head, rows)


def section(system: System) -> str:
    """A network's part of the page."""
    said, parameters = system.said, MODELS[system.ours[0].recipe.model].params
    measured = [
        *(("reproduced", m) for m in system.reproduced),
        *(("ours", m) for m in system.ours),
    ]
    rows = [_row_of_document(said), *(_row(kind, m) for kind, m in measured)]
    results = [f"`{m.name}`: {result(m, said, system.aim_of(m.name))}" for m in system.ours]
    results += [f"`{m.name}`: {result(m, said)}" for m in system.reproduced]
    analyses = [f"`{m.name}`: {analysis(m)}" for m in (*system.ours, *system.reproduced)]
    for theirs in system.reproduced:
        pairs = [(m, what_helped(m, theirs)) for m in system.ours]
        analyses += [f"`{m.name}` is {words}" for m, words in pairs if words]
    return (
        f"\n## {system.name}\n\n"
        f"{parameters:,} parameters, document {said.document}, “{said.title}”.\n\n"
        f"{_table(HEAD, rows)}\n"
        f"- Target: {target(said)}\n"
        f"- Result: {'. '.join(results)}.\n"
        f"- Analysis: {'. '.join(analyses)}.\n"
        f"- The document: {_in_its_words(said)}\n\n"
        f"```sh\n{''.join(command(m, system.aim_of(m.name)) for _, m in measured)}```\n"
    )


def command(measured: Measured, aim: Aim | None = None) -> str:
    """The shell line that repeats a recipe's runs, or makes those of its aim if there are none."""
    results = measured.results or [{"seed": seed} for seed in range(aim.runs if aim else 1)]
    seeds = " ".join(str(r["seed"]) for r in results)
    most = max(results, key=lambda r: int(r.get("processes", 1)))
    launch = "python"
    if (processes := most.get("processes", 1)) > 1:
        file = "cpu" if most["device"] == "cpu" else most["strategy"]
        launch = f"accelerate launch --config_file launch/{file}.yaml --num_processes {processes}"
    return (
        f"for seed in {seeds}; do {launch} -m distcv.train --recipe {measured.name} --seed $seed "
        f"--name {measured.name}-$seed{measured.flags}; done\n"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(recipes: list[Measured], results: str) -> str:
    """What was measured with each of these recipes, all but the first named; "" without any."""
    words = []
    for measured in recipes:
        if values := measured.accuracies:
            name = "" if measured is recipes[0] else f", `{measured.name}`"
            file = f"{results}{measured.name}.json"
            words.append(f"[{spread(values)}]({file}) (n = {len(values)}{name})")
    return "; ".join(words) or (NOT_YET if recipes else "")


def _printed(said: Document) -> str:
    """The document's test accuracy, with what is printed there if that is another one."""
    if said.test_accuracy is None:
        return NONE
    misprint = f" (printed as {said.printed:.2f})" if said.printed else ""
    return f"{said.test_accuracy:.2f}{misprint}"


def _row_of_document(said: Document) -> list[str]:
    runs = NONE if said.test_accuracy is None else "1"
    train = NONE if said.train_accuracy is None else f"{said.train_accuracy:.2f}"
    time = duration(said.seconds) if said.seconds else NONE
    return ["document", NONE, _printed(said), runs, train, f"{said.epochs or NONE}", time,
            said.hardware or NONE, NONE, NONE]  # fmt: skip


def _row(kind: str, measured: Measured) -> list[str]:
    recipe, results = measured.recipe, measured.results
    first = [kind, f"[`{measured.name}`](../configs/{measured.name}.yaml)"]
    epochs = f"{recipe.epochs}"
    if not results:
        return [*first, NOT_YET, NONE, NONE, epochs, NONE, NONE, recipe.precision, NONE]
    seeds = [r["seed"] for r in results]
    some = "" if seeds == list(range(len(seeds))) else f" (seeds {', '.join(map(str, seeds))})"
    train = [rows[-1]["train_accuracy"] for rows in measured.curves.values()]
    return [
        *first,
        f"[{spread(measured.accuracies)}](../results/{measured.name}.json)",
        f"{len(results)}{some}",
        spread(train) if train else NONE,
        epochs,
        measured.time,
        measured.hardware,
        recipe.precision,
        ", ".join(dict.fromkeys(short_commit(str(r.get("commit"))) for r in results)),
    ]


def _in_its_words(said: Document) -> str:
    """The document's own three lines, and what is to be known of them."""
    parts = ("target", said.target), ("result", said.result), ("analysis", said.analysis)
    lines = "; ".join(f"{name}: “{text}”" for name, text in parts if text)
    return " ".join(filter(None, [f"{lines}." if lines else "", said.note]))
