"""The command line: flags over a recipe.

Nothing heavy is imported here, so that ``--help`` and refusals come at once.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import tyro
from pydantic import BaseModel, Field, field_validator

from distcv.config import (
    GROUPS,
    AugmentationFields,
    InputError,
    ModelFields,
    OptimizerFields,
    Recipe,
    ScheduleFields,
    Strict,
    TrainingFields,
    load_recipe,
    nearest,
    validated,
)
from distcv.environment import without_password

ModelT = TypeVar("ModelT", bound=BaseModel)


def check_name(name: str, where: str = "") -> str:
    """A run's name, as it is.

    Raises:
        InputError: it isn't that of one folder; after ``where``.
    """
    if name[:1] in ("", ".") or "/" in name or not name.isprintable() or len(name) > 100:
        raise InputError(
            f"{where}a run's name is that of one folder: no slash, no dot at its start, 100 "
            "characters at most"
        )
    return name


class RunOptions(Strict):
    """Where a run's files go, how it is followed, and how it is executed."""

    recipe: str | None = Field(
        None, description="Recipe to start from: a YAML file or a name; default: the model's own."
    )
    name: str | None = Field(
        None, description="Run name; naming an existing run resumes it. Default: model and time."
    )
    runs_dir: Path = Field(Path("runs"), description="Folder that holds the run folders.")
    data_dir: Path = Field(Path("data"), description="Folder in which data sets are kept.")
    track: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = Field(
        (), description="Trackers that follow the run, beside metrics.jsonl."
    )
    project: str = Field("distcv", description="Project name in the tracker.")
    node_metrics: bool = Field(
        False, description="Log the load of every node's processor, memory and GPUs."
    )
    compile: bool = Field(False, description="Compile the network with torch.compile.")
    sync_bn: bool = Field(
        False, description="Take BatchNorm's statistics over the shares of all processes."
    )
    hang_timeout: float = Field(
        120.0,
        ge=1,
        le=1e6,
        description="Seconds without a sign of life after which a process is given up.",
    )
    idle_requeues: int = Field(
        3, ge=0, description="Requeues by Slurm without a new checkpoint before it is given up."
    )
    log_every: int = Field(20, ge=1, description="Steps between two rows of training metrics.")
    checkpoint_every: int | None = Field(
        None, ge=1, description="Steps between checkpoints, beside the one after every epoch."
    )
    keep_every: int | None = Field(
        None, ge=1, description="Keep each checkpoint whose epoch is a multiple of this."
    )
    print_config: bool = Field(False, description="Print the resolved recipe as YAML and end.")

    @field_validator("name")
    @classmethod
    def _is_one_folder(cls, name: str | None) -> str | None:
        return name if name is None else check_name(name)

    @field_validator("track")
    @classmethod
    def _each_once(cls, track: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(track)) < len(track):
            raise ValueError("the same tracker twice: name each once")
        return track


def parse_arguments(
    cls: type[ModelT],
    *,
    prog: str,
    description: str,
    args: list[str] | None = None,
    default: ModelT | None = None,
) -> ModelT:
    """Read the command line into ``cls``, a pydantic model, by tyro.

    Nested groups become headings of ``--help``; their fields are plain flags without prefix.

    Raises:
        InputError: an unknown flag or a value that does not fit; one line, with the nearest flag.
    """
    arguments, rest = parse_known_arguments(
        cls, prog=prog, description=description, args=args, default=default
    )
    if rest:
        raise InputError(f"unrecognized argument {rest[0]!r}: see --help")
    return arguments


def parse_known_arguments(
    cls: type[ModelT],
    *,
    prog: str,
    description: str,
    args: list[str] | None = None,
    default: ModelT | None = None,
    others: type[BaseModel] | None = None,
) -> tuple[ModelT, list[str]]:
    """As :func:`parse_arguments`, with the words that are not for ``cls`` as they are.

    Among them only flags of ``others`` are accepted, another pydantic model.
    """
    args = sys.argv[1:] if args is None else args
    known = known_flags(cls) + (known_flags(others) if others else [])
    for arg in args:
        flag = arg.split("=", 1)[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            shown = arg.split("=", 1)[0]  # its value may be a secret
            raise InputError(f"unknown flag {shown!r}: {nearest(flag, known)}")
        if (shown := without_password(arg)) != arg:
            raise InputError(f"{shown!r} had a password, which others can see here: leave it away")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return validated(
                lambda: tyro.cli(
                    cls,
                    prog=_shown_name(prog, args),
                    description=description,
                    args=args,
                    default=tyro.MISSING if default is None else default,
                    config=(tyro.conf.OmitArgPrefixes,),
                    return_unknown_args=True,
                )
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_first_line_of_box(said.getvalue())) from None
    except (AssertionError, ImportError, OSError) as error:  # no such shell, or no place for it
        raise InputError(f"{args[0]}: {error}") from None


def _shown_name(module: str, args: list[str]) -> str:
    """The command as it was called; in a completion script, the one that shells can complete."""
    script = module.replace(".", "-")
    called = Path(sys.argv[0]).name == script or any("completion" in arg for arg in args[:1])
    return script if called else f"python -m {module}"


def known_flags(cls: Any) -> list[str]:
    """The flags of a command line described by a pydantic model, its groups' fields included."""
    flags = ["--help", "--tyro-print-completion", "--tyro-write-completion"]
    pending = [cls]
    while pending:
        for name, field in pending.pop().model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                pending.append(field.annotation)
                continue
            named = [one.name for one in field.metadata if getattr(one, "name", None)]
            flag = (named[0] if named else name).replace("_", "-")  # tyro.conf.arg(name=...)
            flags += [f"--{flag}", f"--no-{flag}"] if field.annotation is bool else [f"--{flag}"]
    return flags


def _first_line_of_box(text: str) -> str:
    """tyro draws its errors as a box; take the message and leave frame and help text."""
    lines = [line.strip("│╭╮╰╯ ") for line in text.splitlines()[1:]]
    # Where the output is not in UTF-8, lines are drawn by "-", and there is one below the title.
    parts = [[""]]
    for line in filter(None, lines):
        parts.append([]) if set(line) in ({"─"}, {"-"}) else parts[-1].append(line)
    whole = " ".join(next(part for part in parts if any(part)))
    whole = whole.strip().removeprefix("Error parsing ")
    refused = re.search(r"for \w+ (\w+)\S* (.*?) \[type=.*?input_value=(.*?), input_type", whole)
    if refused is None:
        return whole[:1].lower() + whole[1:]
    field, problem, value = refused.groups()
    problem = problem.removeprefix("Value error, ")
    return f"--{field.replace('_', '-')} {value}: {problem[0].lower()}{problem[1:]}"


class CommandLine(Strict):
    """The flags of ``distcv.train``: the recipe's fields in their groups, and the run's options."""

    model: ModelFields
    training: TrainingFields
    optimizer: OptimizerFields
    schedule: ScheduleFields
    augmentation: AugmentationFields
    run: RunOptions

    @classmethod
    def starting_from(cls, recipe: Recipe) -> Self:
        fields = recipe.model_dump()
        groups = {
            name: group(**{field: fields[field] for field in group.model_fields})
            for name, group in GROUPS.items()
        }
        return cls(run=RunOptions(), **groups)

    def to_recipe(self) -> Recipe:
        fields: dict[str, Any] = {}
        for name in GROUPS:
            fields |= getattr(self, name).model_dump()
        return validated(lambda: Recipe(**fields))


def read_command_line(
    *,
    prog: str,
    description: str,
    find_model: Callable[[str], object],
    args: list[str] | None = None,
) -> tuple[Recipe, RunOptions]:
    """Resolve recipe and run options: recipe file first, flags over it.

    ``--model NAME`` starts from the recipe of that name unless ``--recipe`` names another.

    Raises:
        InputError: see :func:`load_recipe` and :func:`parse_arguments`; or ``find_model`` knows
            no such model.
    """
    args = sys.argv[1:] if args is None else args
    model, recipe_name = flag_value(args, "model"), flag_value(args, "recipe")
    if model is not None:
        find_model(model)
    start = load_recipe(next(name for name in (recipe_name, model, "gap") if name is not None))
    command_line = parse_arguments(
        CommandLine,
        prog=prog,
        description=description,
        args=args,
        default=CommandLine.starting_from(start),
    )
    return command_line.to_recipe(), command_line.run


def flag_value(args: list[str], name: str) -> str | None:
    """The last value of ``--name VALUE`` or ``--name=VALUE``, before the real parsing."""
    value = None
    for here, following in zip(args, [*args, None][1:], strict=True):
        if here == f"--{name}" and not (following or "").startswith("--"):
            value = following
        elif here.startswith(f"--{name}="):
            value = here.split("=", 1)[1]
    return value


def write_file(flag: str, file: Path, write: Callable[[], object]) -> None:
    """Write the file that a flag asks for, and its folder.

    Raises:
        InputError: it can't be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise InputError(f"{flag} {file}: {error.strerror}: choose another file") from None


def check_file(flag: str, file: Path | None) -> None:
    """Raise InputError if the file that a flag asks for can't be written, ahead of long work."""
    if file is None:
        return
    there = next(place for place in (file, *file.parents) if place.exists())
    if there.is_dir() == (there == file) or not os.access(there, os.W_OK):
        raise InputError(f"{flag} {file}: it can't be written: choose another file")
