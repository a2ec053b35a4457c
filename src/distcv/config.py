"""The typed recipe: what is learned, in YAML and as flags.

Nothing heavy is imported here, so that a wrong recipe is refused, and ``--help`` answered, before
torch is loaded. A recipe is flat in YAML and on the command line (``lr: 0.1`` is ``--lr 0.1``);
its fields are written in groups, which are the headings of ``--help``.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distcv.files import read_text

T = TypeVar("T")

PACKAGE = Path(__file__).resolve().parent
MAX_RECIPE = 1 << 16  # bytes; PyYAML takes a second for as many
NAME = r"^[\w. -]*$"  # no markup, and nothing that a terminal obeys: recipes of others are reported


class InputError(ValueError):
    """The user's input is wrong; the message is one line: what, where, the remedy."""


class Strict(BaseModel):
    """Frozen, with unknown keys refused and no infinities or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelFields(Strict):
    """The network and the data it learns from."""

    model: str = Field(
        "gap", pattern=NAME, description="The network to train, by its name in the zoo."
    )
    dataset: str = Field(
        "mnist",
        pattern=NAME,
        description="The data: mnist, fashion_mnist, cifar10, cifar100 or synthetic.",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout probability, in networks that have dropout layers."
    )


class TrainingFields(Strict):
    """How long and how precisely to train."""

    epochs: int = Field(10, ge=1, le=1_000_000, description="Passes over the training set.")
    max_steps: int | None = Field(
        None, ge=1, description="End after this many optimizer steps, if that is sooner."
    )
    batch_size: int = Field(
        128, ge=1, description="Samples per optimizer step, over all processes together."
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Parts into which each batch is split to save memory."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Arithmetic of the forward and backward pass; weights stay fp32."
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Fixes initial weights, order, augmentation and dropout."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target spread evenly over all classes."
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Evaluate a moving average of the weights with this decay."
    )
    nonfinite: Literal["stop", "rollback"] = Field(
        "stop",
        description="After 3 steps in a row without a finite loss and gradient, or a test loss "
        "that is not finite: stop, or go back to the last checkpoint with a good step after it.",
    )
    rollback_lr_factor: float = Field(
        0.5, gt=0, le=1, description="Factor of the learning rate from each rollback on."
    )


class OptimizerFields(Strict):
    """The optimizer."""

    optimizer: Literal["sgd", "adamw", "muon"] = Field(
        "sgd", description="Update rule; muon treats hidden weights as matrices, the rest by AdamW."
    )
    lr: float = Field(0.1, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD and Muon.")
    nesterov: bool = Field(True, description="Nesterov momentum in SGD and Muon.")
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        Field((0.9, 0.999), description="Decay rates of AdamW's two moments.")
    )
    weight_decay: float = Field(5e-4, ge=0, description="Weight decay (L2 in SGD, else decoupled).")
    decay_norm_and_bias: bool = Field(
        False, description="Apply weight decay to BatchNorm parameters and biases too."
    )
    clip_norm: float | None = Field(
        None, gt=0, description="Clip the norm of the whole gradient to this."
    )


class ScheduleFields(Strict):
    """The learning rate as a function of the step."""

    schedule: Literal["constant", "step", "multistep", "cosine", "onecycle"] = Field(
        "onecycle",
        description="Shape after the warm-up; onecycle falls linearly (triangular).",
    )
    warmup: float = Field(
        0.0, ge=0, le=1, description="Share of the training in which the rate rises to its peak."
    )
    initial_lr_factor: float = Field(
        0.0, ge=0, le=1, description="Rate at the start of the warm-up, as a factor of lr."
    )
    final_lr_factor: float = Field(
        0.0, ge=0, le=1, description="Rate at the end of cosine and onecycle, as a factor of lr."
    )
    lr_step_epochs: int = Field(
        6, ge=1, description="Epochs between two reductions in the step schedule."
    )
    lr_milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="Epochs at which the multistep schedule reduces the rate."
    )
    lr_gamma: float = Field(
        0.1, gt=0, le=1, description="Factor of each reduction in step and multistep."
    )


class AugmentationFields(Strict):
    """Random changes to the training images, drawn anew for every sample and epoch."""

    translate: int = Field(0, ge=0, description="Shift by up to this many pixels each way.")
    translate_mode: Literal["zero", "reflect"] = Field(
        "zero", description="What fills the border that a shift uncovers."
    )
    flip: Literal["none", "random", "alternating"] = Field(
        "none",
        description="Mirror left to right: by chance, or every second epoch (alternating).",
    )
    rotate: float = Field(0.0, ge=0, le=180, description="Rotate by up to this many degrees.")
    scale: float = Field(0.0, ge=0, lt=1, description="Zoom in or out by up to this share.")
    shear: float = Field(0.0, ge=0, lt=90, description="Shear by up to this many degrees.")
    trivial_augment: bool = Field(
        False, description="One random operation a sample, as in TrivialAugment (wide)."
    )
    cutout: int = Field(
        0, ge=0, description="Blank a random square with sides of this many pixels."
    )
    mixup: float = Field(
        0.0, ge=0, le=1000, description="Blend two samples, weight from Beta(a, a)."
    )
    cutmix: float = Field(
        0.0, ge=0, le=1000, description="Paste a box of another sample, area from Beta(a, a)."
    )


GROUPS: dict[str, type[Strict]] = {
    "model": ModelFields,
    "training": TrainingFields,
    "optimizer": OptimizerFields,
    "schedule": ScheduleFields,
    "augmentation": AugmentationFields,
}


# Fields that came after results were published, each with the value at which a run is as it was
# before there was such a field. There the field is no part of a recipe's identity, so that what was
# measured before still has the sum of its recipe; a default that is changed later has another one.
ADDED: dict[str, object] = {"nonfinite": "stop", "rollback_lr_factor": 0.5}


class Recipe(AugmentationFields, ScheduleFields, OptimizerFields, TrainingFields, ModelFields):
    """Everything that decides what is learned, and nothing about where it runs."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.gradient_accumulation_steps > self.batch_size:
            raise ValueError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} exceeds "
                f"batch_size {self.batch_size}: use at most one part a sample"
            )
        if self.schedule == "multistep" and not self.lr_milestones:
            raise ValueError("schedule multistep needs lr_milestones, such as 30 60 80")
        if self.mixup and self.cutmix:
            raise ValueError("mixup and cutmix are both set: choose one, set the other to 0")
        if self.nesterov and not self.momentum and self.optimizer == "sgd":
            raise ValueError("nesterov needs momentum above 0: add --no-nesterov or raise momentum")
        return self

    def to_yaml(self) -> str:
        """The complete recipe as YAML, which :func:`load_recipe` reads back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @property
    def sha256(self) -> str:
        """Identity of the recipe: SHA-256 of its fields as canonical JSON; see ADDED."""
        fields = self.model_dump(mode="json")
        own = {k: v for k, v in fields.items() if k not in ADDED or v != ADDED[k]}
        canonical = json.dumps(own, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def resource_dir(kind: str) -> Path:
    """Folder ``configs``, ``launch`` or ``slurm``: in the installed package, else in the clone."""
    packaged = PACKAGE / kind
    return packaged if packaged.is_dir() else PACKAGE.parents[1] / kind


def recipe_names() -> list[str]:
    """Names of the recipes that come with distcv."""
    return sorted(path.stem for path in resource_dir("configs").glob("*.yaml"))


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, else the list of them all."""
    known = list(known)
    begins = [name for name in known if len(word) > 2 and name.startswith(word)]
    match = begins or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"choose from {', '.join(known)}"


class RecipeLoader(yaml.SafeLoader):
    """The YAML of a recipe: text, null, lists and mappings; what a text means, its field says.

    So ``yes`` is no number, ``010`` is ten, and a date is not guessed. A key that stands there
    twice is refused, and so is an alias: a few lines of them stand for gigabytes.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq", "map")
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name): write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} stands there twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile("^(~|null|Null|NULL)?$"), ["~", "n", "N", ""]
)


def load_recipe(name_or_file: str | Path) -> Recipe:
    """Read a recipe by its name in ``configs/`` or by the path of a YAML file.

    Raises:
        InputError: no such recipe, not YAML, an unknown key, or a value out of range.
    """
    path, names = Path(name_or_file), recipe_names()
    try:
        if str(name_or_file) in names and not path.is_file():
            path = resource_dir("configs") / f"{name_or_file}.yaml"
        fields = yaml.load(read_text(path, MAX_RECIPE), RecipeLoader)
    except FileNotFoundError:
        raise InputError(f"no recipe {str(name_or_file)!r}: {nearest(str(path), names)}") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        what = " ".join(what.split())
        raise InputError(f"recipe {path}: not a readable YAML file: {what}") from None
    if not isinstance(fields, dict):
        raise InputError(f"recipe {path}: give a mapping of fields, such as 'lr: 0.1'")
    return validated(lambda: Recipe.model_validate(fields), where=f"{path}: ")


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Raise InputError if a run folder was started with another recipe."""
    try:
        before, now = load_recipe(folder / "config.yaml").model_dump(), recipe.model_dump()
    except InputError as error:
        raise InputError(f"{error}: remove it to go on with the recipe of this command") from None
    for name in before:
        if before[name] != now[name]:
            raise InputError(
                f"run folder {folder} was started with {name} {before[name]}, now it is "
                f"{now[name]}: choose another --name, or the same recipe to go on"
            )


def validated(build: Callable[[], T], where: str = "") -> T:
    """Call ``build``; turn pydantic's report into one line that names the field and the value.

    Raises:
        InputError: what pydantic reports, after ``where``.
    """
    try:
        return build()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            problem = f"unknown key {field!r}: {nearest(field, Recipe.model_fields)}"
        elif first["type"] == "missing":
            problem = f"{field} is missing"
        elif not field:
            problem = first["msg"].removeprefix("Value error, ")
        else:
            message = first["msg"][0].lower() + first["msg"][1:]
            value = first["input"]
            shown = value if isinstance(value, str) and value.strip() else repr(value)
            problem = f"{field} = {shown}: {message}"
        raise InputError(where + " ".join(problem.split())) from None
