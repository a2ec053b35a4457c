"""Recipes, flags and what is said when they are wrong."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from distcv.command import printable
from distcv.command_line import check_name, read_command_line
from distcv.config import (
    ADDED,
    GROUPS,
    InputError,
    Recipe,
    load_recipe,
    nearest,
    recipe_names,
    resource_dir,
)
from distcv.data import DATASETS
from distcv.models import MODELS, find_model
from support.forked import Forked

TRAIN = [sys.executable, "-m", "distcv.train"]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TRAIN, *flags], capture_output=True, text=True, timeout=60)


def read(*flags: str) -> tuple[Recipe, object]:
    return read_command_line(
        prog="distcv.train", description="", find_model=find_model, args=list(flags)
    )


def test_every_model_has_a_recipe_of_its_name() -> None:
    """`--model NAME` would fail for a network that has no recipe of its name."""
    assert set(MODELS) <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid_and_have_a_head(name: str) -> None:
    """The command at the head of a recipe would train something else than that recipe."""
    recipe = load_recipe(name)
    find_model(recipe.model)
    assert recipe.dataset in DATASETS
    text = (resource_dir("configs") / f"{name}.yaml").read_text()
    command = re.search(r"^# Command: .*?(--(?:model|recipe) .*)$", text, re.MULTILINE)
    assert command is not None
    assert read(*command[1].split())[0] == recipe, "the head's command must pick this very file"
    assert re.search(r"^# (Accuracy|Document): ", text, re.MULTILINE)


def test_no_field_stands_in_two_groups() -> None:
    """A recipe field would have no flag, or two flags that overwrite each other."""
    fields = [field for group in GROUPS.values() for field in group.model_fields]
    assert sorted(fields) == sorted(set(fields)) == sorted(Recipe.model_fields)


def test_yaml_goes_round(tmp_path: Path) -> None:
    """A run could not be repeated: its saved YAML would load as another recipe."""
    recipe = load_recipe("resnet18_document")
    changed = recipe.model_copy(update={"lr_milestones": (3, 5), "clip_norm": 0.5})
    path = tmp_path / "mine.yaml"
    path.write_text(changed.to_yaml())
    assert load_recipe(path) == changed
    assert load_recipe(path).sha256 == changed.sha256 != recipe.sha256


def test_the_identity_of_a_recipe_outlives_fields_that_are_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new field would change every recipe's sum, and published results would match none."""
    recipe, smoothed = Recipe(), Recipe(label_smoothing=0.1)
    assert recipe.sha256 == ("7a9682562ae6cd63e641a84ac93c7a1cbcf9a34aa317e4fccf28d983ea6ec70d"), (
        "results were published with this sum: give a new field a row in distcv.config.ADDED"
    )
    sums = {recipe.sha256, smoothed.sha256}
    monkeypatch.setitem(ADDED, "label_smoothing", 0.0)  # as if it had been added later
    assert smoothed.sha256 in sums and recipe.sha256 not in sums
    fields = recipe.model_dump(mode="json", exclude=set(ADDED))
    before = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    assert recipe.sha256 == before, "that of the time when there was no such field"


def test_a_recipe_is_frozen() -> None:
    """A recipe could change during training, and config.yaml would not say what was trained."""
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("gap").lr = 1.0  # type: ignore[misc]


def test_without_any_flag_the_default_recipe_is_read() -> None:
    """A user who starts `distcv-train` alone would see a traceback."""
    assert read()[0] == load_recipe("gap")


def test_flags_win_over_the_recipe_of_the_model() -> None:
    """`--lr 0.3` would have no effect beside `--model`, or would reset the other fields."""
    recipe, _ = read("--model", "resnet18", "--lr=0.3", "--no-nesterov", "--epochs", "7")
    assert (recipe.lr, recipe.nesterov, recipe.epochs) == (0.3, False, 7)
    assert recipe.batch_size == load_recipe("resnet18").batch_size


def test_recipe_wins_over_model_for_the_start_and_model_over_it_as_a_flag() -> None:
    """`--recipe A --model B` would take the fields of B's recipe, or train A's network."""
    recipe, _ = read("--recipe", "gap_9k_document", "--model", "gap_8k")
    assert recipe == load_recipe("gap_9k_document").model_copy(update={"model": "gap_8k"})


@pytest.mark.slow
def test_print_config_can_be_fed_back(tmp_path: Path) -> None:
    """Users could not train again from what `--print-config` printed."""
    printed = run("--model", "vgg8", "--lr", "1e-3", "--lr-milestones", "2", "4", "--print-config")
    assert printed.returncode == 0, printed.stderr
    path = tmp_path / "again.yaml"
    path.write_text(printed.stdout)
    again = run("--recipe", str(path), "--print-config")
    assert again.stdout == printed.stdout
    assert yaml.safe_load(again.stdout)["lr_milestones"] == [2, 4]


@pytest.mark.alone
def test_help_is_grouped_complete_quick_and_without_torch() -> None:
    """`--help` would leave out flags or their descriptions, or take seconds to appear."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        shown = run("--help")
        seconds.append(time.perf_counter() - began)
    assert shown.returncode == 0
    assert min(seconds) < 0.8
    for heading in ["model", "training", "optimizer", "schedule", "augmentation", "run"]:
        assert f"{heading} options" in shown.stdout
    for group in GROUPS.values():
        for field, info in group.model_fields.items():
            assert f"--{field.replace('_', '-')}" in shown.stdout
            assert info.description and info.description.endswith("."), field
    modules = "import sys, distcv.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", modules]).returncode == 0


STABLE = (
    "model recipe dataset epochs max-steps batch-size lr seed name runs-dir data-dir track "
    "precision compile"
).split()


def test_stable_flags() -> None:
    """Users' scripts would break because a stable flag was renamed or removed."""
    shown = run("--help").stdout.replace(",", " ")
    assert [flag for flag in STABLE if f"--{flag} " not in shown] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--epoch 3", "did you mean '--epochs'"),
        ("--bach-size=3", "did you mean '--batch-size'"),
        ("--model resnet81", "did you mean 'resnet18'"),
        ("--recipe resnet18_documnt", "did you mean 'resnet18_document'"),
        ("--dataset cifar", "did you mean 'cifar10'"),
        ("--epochs 0", "--epochs 0: input should be greater than or equal to 1"),
        ("--epochs many", "--epochs"),
        ("--lr nan", "--lr nan: input should be a finite number"),
        ("--lr", "--lr"),
        ("--precision fp8", "'fp32', 'bf16', 'fp16'"),
        ("--mixup 1 --cutmix 1", "choose one"),
        ("--schedule multistep", "lr_milestones"),
        ("--warmup 1.5", "--warmup 1.5: input should be less than or equal to 1"),
        ("--track mlflow", "wandb"),
        ("--model plain --dropout 0.1 --data-dir {data} --runs-dir {tmp}", "no dropout"),
        ("extra", "extra"),
        ("--recipe {tmp}/unknown_key.yaml", "unknown key 'batchsize': did you mean 'batch_size'"),
        ("--recipe {tmp}/no_mapping.yaml", "mapping"),
        ("--recipe {tmp}/no_yaml.yaml", "not a readable YAML"),
        ("--recipe {tmp}/wrong_value.yaml", "batch_size = big"),
        ("--model plain --dataset cifar10 --data-dir {data} --runs-dir {tmp}", "28x28"),
        ("--batch-size 70000 --data-dir {data} --runs-dir {tmp}", "60000 training samples"),
        ("--runs-dir /dev/null/x --data-dir {data}", "runs-dir"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(
    flags: str, said: str, tmp_path: Path, data_dir: Path, mnist: object, cifar10: object
) -> None:
    """A typo would end in a traceback or train for hours, with no line that says what to fix."""
    (tmp_path / "unknown_key.yaml").write_text("batchsize: 3\n")
    (tmp_path / "no_mapping.yaml").write_text("- 1\n")
    (tmp_path / "no_yaml.yaml").write_text("a: [\n")
    (tmp_path / "wrong_value.yaml").write_text("batch_size: big\n")
    words = flags.format(tmp=tmp_path, data=data_dir.resolve()).split()
    ended = Forked("distcv.train", words, os.environ, tmp_path / "said")
    _, err = ended.communicate()
    assert ended.returncode == 2, err
    assert said in err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1\nlr: 2", "the key 'lr' stands there twice"),
        ("lr: 1\nmomentum: {a: 1, a: 2}", "the key 'a' stands there twice"),
        ("a: &a [1]\nb: [*a, *a]", "an alias"),
        ("lr: !!float 0.1", "could not determine a constructor"),
        ("lr: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("lr: 2001-99-99", "lr = 2001-99-99: input should be a valid number"),
        ("epochs: true", "epochs = true: input should be a valid integer"),
        ("lr: yes", "lr = yes: input should be a valid number"),
        ("seed: 1:30", "seed = 1:30: input should be a valid integer"),
        ("seed: " + 5000 * "9", "exceeded maximum size"),
        ("seed: 0x" + 5000 * "f", "seed = 0xfff"),
        (5000 * "[", "nested too deeply"),
        (5000 * "{a: ", "nested too deeply"),
        ("flip: null", "flip = None: input should be 'none'"),
        ("lr: ''", "lr = '': input should be a valid number"),
        ("model: <script>", "model = <script>: string should match pattern"),
        ("lr_milestones: [30, -60]", "lr_milestones.1 = -60: input should be greater than"),
        ("lr_milestones: [" + 70_000 * "1," + "]", "more than 65,536 bytes"),
    ],
)  # fmt: skip
def test_what_no_recipe_says_is_refused(text: str, said: str, tmp_path: Path) -> None:
    """A malformed YAML recipe would train with other values, and a hostile one could run code."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_text_of_a_recipe_means_its_field_says(tmp_path: Path) -> None:
    """`seed: 010` in a recipe would mean 8, and the run would use another seed."""
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 010\nlr: 1e-3\nflip: none\nclip_norm: null\nnesterov: no\nmax_steps:\n")
    recipe = load_recipe(path)
    assert (recipe.seed, recipe.lr, recipe.flip, recipe.nesterov) == (10, 1e-3, "none", False)
    assert recipe.clip_norm is None and recipe.max_steps is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--name ../x", "--name '../x': a run's name is that of one folder"),
        ("--name a/b", "--name 'a/b': a run's name"),
        ("--name=", "--name '': a run's name"),
        ("--name \udc80", "a run's name is that of one folder"),
        ("--track wandb wandb", "the same tracker twice"),
        ("--recipe=", "recipe .: "),
        ("--recipe /dev/zero", "recipe /dev/zero: not a readable YAML file: not a regular file"),
        (f"--recipe {5000 * 'x'}", "File name too long"),
        ("--recipe ../configs/gap", "no recipe '../configs/gap'"),
        ("--model --lr 0.1", "missing value for argument '--model'"),
        ("--lr=", "--lr: could not convert string to float: ''"),
        ("--lr-milestones -1", "--lr-milestones -1: input should be greater"),
        ("--hang-timeout 1e300", "--hang-timeout 1e+300: input should be less"),
        ("--tyro-print-completion pwsh", "--tyro-print-completion: Shell should be one"),
        ("--tyro-write-completion bash /dev/null/x", "--tyro-write-completion: "),
        (f"--lr 0 https://user:{90 * 's'}@host", "'https://host' had a password"),
    ],
)
def test_flags_that_are_refused(flags: str, said: str) -> None:
    """A flag could write outside the runs folder, hang the command or show a password."""
    with pytest.raises(InputError) as caught:
        read(*flags.split(" "))
    assert said in str(caught.value) and "sss" not in str(caught.value)


def test_a_name_of_another_source_is_refused_with_it() -> None:
    """A WANDB_RUN_ID that is no folder name would be accepted, or `--name` blamed for it."""
    assert check_name("gap-1x7", "WANDB_RUN_ID: ") == "gap-1x7"
    for name in ("gap-a/b", "gap-\n", 101 * "x"):
        with pytest.raises(InputError, match=r"^WANDB_RUN_ID: a run's name is that of one folder"):
            check_name(name, "WANDB_RUN_ID: ")


def test_a_folder_called_like_a_recipe_is_not_in_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder called `gap` in the working directory would make `--model gap` fail."""
    (tmp_path / "gap").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("gap").model == "gap"


def test_nothing_that_a_terminal_obeys_is_printed() -> None:
    """An error message could clear the user's terminal or flood it with a very long line."""
    assert printable("a\x1b[2J\r\u202e\udc80\nß") == "a\\x1b[2J\\r\\u202e\\udc80\nß"
    assert printable(10_000 * "x" + "end") == 1500 * "x" + " … " + 497 * "x" + "end"


def test_errors_are_found_in_boxes_that_are_drawn_without_utf8() -> None:
    """Users whose terminal has no UTF-8 would see a row of dashes instead of the error."""
    command = [*TRAIN, "--epochs", "many"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert ended.stderr == "error: --epochs: invalid literal for int() with base 10: 'many'\n"


@pytest.mark.slow
def test_shell_completion(tmp_path: Path) -> None:
    """The Tab key would complete no flags of distcv-train."""
    script = tmp_path / "completion.sh"
    assert "--batch-size" in run("--tyro-print-completion", "zsh").stdout
    assert "batch-size" in run("--tyro-print-completion", "fish").stdout
    other = run("--tyro-print-completion", "tcsh")  # which tyro leaves to a package
    assert other.returncode in (0, 2) and "Traceback" not in other.stderr
    script.write_text(run("--tyro-print-completion", "bash").stdout)
    asked = f"""
        source {script}
        complete -p distcv-train | sed 's/.*-F //; s/ .*//' > {tmp_path}/function
        COMP_WORDS=(distcv-train --batc) COMP_CWORD=1 COMP_LINE='distcv-train --batc' COMP_POINT=19
        $(cat {tmp_path}/function) distcv-train --batc distcv-train
        echo "${{COMPREPLY[@]}}"
    """
    shown = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
    assert shown.stdout.split() == ["--batch-size"], shown.stderr


def test_nearest_prefers_a_beginning() -> None:
    """For a shortened `--opt`, the hint would be `--dropout` instead of `--optimizer`."""
    assert "'optimizer'" in nearest("opt", ["dropout", "optimizer"])
    assert nearest("zzz", ["a", "b"]) == "choose from a, b"


def test_a_missing_recipe_file_is_named() -> None:
    """Users who mistype the path of a recipe would not be told which file is missing."""
    with pytest.raises(InputError, match=r"no recipe 'mine/x\.yaml'"):
        load_recipe("mine/x.yaml")
