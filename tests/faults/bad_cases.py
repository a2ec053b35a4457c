"""Generated recipes and command lines in which one thing is wrong: for ``bad_input``."""

import json
from typing import Any, NamedTuple

from hypothesis import strategies as st

from distcv.command_line import CommandLine, known_flags
from distcv.config import Recipe
from faults.commands import command

# The other commands, with the words that they can't do without.
COMMANDS = {
    "results": [], "compare": ["a", "b"], "report": [], "predict": ["run", "x.png"],
    "export": ["run", "--to", "onnx"], "bench": [], "submit": ["x.sh"], "data": [], "doctor": [],
    "summary": ["--model", "gap"], "sync": [], "dashboard": [],
}  # fmt: skip
FIELDS = sorted(Recipe.model_fields)
VALID = {name: json.dumps(value) for name, value in Recipe().model_dump(mode="json").items()}
# Texts of YAML that stand where a value should.
ODD = (
    "yes no on off true null ~ .inf -.inf .nan 1e999 -1 0 1.5 -0.0 1e-3 0x10 0o7 010 1_000 1:30 "
    "2026-01-01 12:00 = << ! !!str !!int !!float !!python/none !!binary !!set !!timestamp & * | > "
    "@ ` % - ? : # [] {} [1,2,3] [[1]] {a:1} [0.9,2] [a,b] '' \"\" 'x \"x [1 {a \\ \\x00 \\t"
).split(" ")
LONG = ["9" * 400, "9" * 5000, "0x" + "f" * 5000, "x" * 5000, "[" + "1," * 2000 + "]", "1e99999"]


class Case(NamedTuple):
    """An input, and what a refusal has to name: one of these."""

    given: Any
    names: tuple[str, ...]
    certain: bool = True
    """Whether it is wrong whatever was drawn; a value may happen to be right."""


def misspelt(words: list[str]) -> st.SearchStrategy[str]:
    """One of these with one character more, less or another."""

    def edit(word: str, place: int, kind: str, letter: str) -> str:
        place = min(2, len(word) - 1) + place % max(1, len(word) - 2)  # after the dashes of a flag
        tail = word[place + (kind != "more") :]
        return word[:place] + ("" if kind == "less" else letter) + tail

    kinds, letters = st.sampled_from(["more", "less", "other"]), st.sampled_from("aeqxz0_-.:/é")
    edited = st.builds(edit, st.sampled_from(words), st.integers(0, 99), kinds, letters)
    right = {word.replace("_", "-") for word in words}
    return edited.filter(lambda word: word.replace("_", "-") not in right)


# Recipes

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from([10**30, -(10**30), 1e308, 5e-324, 2**63, "gap ", "None", "\x1b[2J", "\u202e"]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)
as_yaml = values.map(json.dumps) | st.sampled_from(ODD) | st.sampled_from(LONG)
keys = misspelt(FIELDS) | st.sampled_from(["1", "0.1", "yes", '""', "<<", "x" * 60, "lr.0", "LR"])
contradictions = st.sampled_from([
    ("mixup: 0.5\ncutmix: 1", ("mixup", "cutmix")),
    ("batch_size: 8\ngradient_accumulation_steps: 9", ("gradient_accumulation_steps",)),
    ("schedule: multistep", ("lr_milestones",)),
    ("momentum: 0\noptimizer: sgd", ("momentum",)),
])  # fmt: skip
ALIASES = [
    b"lr: &a [*a]", b"&a a: *a", b"lr: *b", b"lr: &a {b: *a}", b"lr: &a 1\nmomentum: *a",
    b"a: &a [x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9))
                                for c in range(ord("b"), ord("k"))),
]  # fmt: skip
BOMBS = [
    b"", b"\n", b"lr", b"- lr: 1", b"\xff\xfe", "lr: 1".encode("utf-16"), b"lr: \x00",
    b"lr: \xc3\x28", b"\tlr: 1", b"lr:\t1", b"lr: 1\n--- \nlr: 2", b"lr: 1\n}", b"lr: 1\n lr: 2",
    b"[" * 3000, b"{a: " * 3000, b"- " * 3000, b"? " * 3000, b"'lr: 1", b'"lr": "1',
    b"? [lr]\n: 1", b"%YAML 3.0\n---\nlr: 1", b"!!set {lr}",
    b"!!python/object/apply:os.system ['true']", b"lr: !!python/name:os.system", b"x" * 70_000,
    b"lr: 1\n" + b"#" * 70_000,
]  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> Case:
    """The bytes of a recipe in which one thing is wrong, among others that are right."""
    kind = draw(st.sampled_from(["key", "value", "value", "twice", "pair", "whole", "alias"]))
    if kind == "alias":
        return Case(draw(st.sampled_from(ALIASES)), ("an alias",))
    if kind == "whole":
        return Case(draw(st.sampled_from(BOMBS) | st.binary(max_size=200)), ("recipe",))
    name = draw(st.sampled_from(FIELDS))
    lines, names = f"{name}: {draw(as_yaml)}", (name, "not a readable YAML file", "unknown key")
    if kind == "key":
        name = draw(keys)
        lines, names = f"{name}: 1", (f"{name.strip(chr(34))!r}", "not a readable YAML file")
    elif kind == "twice":
        lines = f"{name}: {VALID[name]}\n{name}: {VALID[name]}"
        names = (f"{name!r} stands there twice",)
    elif kind == "pair":
        lines, names = draw(contradictions)
    used = {line.split(":")[0] for line in lines.split("\n")}
    others = draw(st.lists(st.sampled_from(sorted(set(FIELDS) - used)), unique=True, max_size=4))
    if kind == "pair":
        others = []
    whole = [f"{other}: {VALID[other]}" for other in others]
    whole.insert(draw(st.integers(0, len(others))), lines)
    return Case("\n".join(whole).encode("utf-8", "replace"), names, certain=kind != "value")


# Command lines

FLAGS = [flag for flag in known_flags(CommandLine) if "tyro" not in flag and flag != "--help"]
BOOLEANS = [flag for flag in FLAGS if f"--no-{flag[2:]}" in FLAGS or flag.startswith("--no-")]
VALUED = [flag for flag in FLAGS if flag not in BOOLEANS]
OPTIONAL = {"--track", "--lr-milestones"}  # of no value, too
# What an argument can hold on Linux: no NUL, and bytes that are no UTF-8 as surrogates.
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
arguments = st.one_of(
    st.sampled_from(
        ["", " ", "-1", "0", "1.5", "nan", "-inf", "1e999", "None", "True", "x", "../x", "/etc",
         ".", "\udc80", "\x1b[2J", "\n", "1\n2", "9" * 30, "9" * 5000, "x" * 5000, "1,2", "[1]",
         "=", "@x", "gap", "mnist", "sgd", "fp64", "https://u:p@h/", "~", "/dev/zero"]
    ),
    st.integers().map(str), st.floats().map(str), words,
).filter(lambda word: not word.startswith("--"))  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn) -> Case:
    """The flags of distcv.train, one of them wrong."""
    kind = draw(st.sampled_from(["flag", "value", "value", "missing", "stray", "boolean", "pair"]))
    flag = draw(st.sampled_from(VALUED))
    field, value = flag[2:].replace("-", "_"), draw(arguments)
    shown = repr(value)[:50]  # a long one loses its middle
    equals = draw(st.booleans())
    if kind == "flag":
        flag = draw(misspelt(FLAGS) | words.map(lambda word: f"--{word}"))
        given, names = [flag, value], (repr(flag.split("=")[0]), "unrecognized argument")
    elif kind == "value":
        given = [f"{flag}={value}"] if equals else [flag, value]
        names = (flag, field, shown, "had a password")
    elif kind == "missing":
        flag = draw(st.sampled_from([one for one in VALUED if one not in OPTIONAL]))
        following = draw(st.sampled_from([[], ["--compile"], ["--epochs", "3"]]))
        given, names = [flag, *following], (flag,)
    elif kind == "stray":
        given, names = [value], (shown, "had a password")
    elif kind == "boolean":
        flag = draw(st.sampled_from(BOOLEANS))
        given, names = [f"{flag}={value}"], (shown, flag, "had a password")
    else:
        lines, fields = draw(contradictions)
        pairs = [line.split(": ") for line in lines.split("\n")]
        given = [f"--{name.replace('_', '-')}={value}" for name, value in pairs]
        names = (*fields, *(f"--{name.replace('_', '-')}" for name in fields))
    right = [[], ["--epochs", "3"], ["--seed=7", "--no-compile"], ["--model", "vgg8"]]
    return Case([*draw(st.sampled_from(right)), *given], names, certain=kind != "value")


@st.composite
def other_command_lines(draw: st.DrawFn) -> Case:
    """A command and its flags, one of them wrong."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    module = command(name)
    cls = getattr(module, "Arguments", None) or module.SummaryArguments
    flags = [flag for flag in known_flags(cls) if "tyro" not in flag and flag != "--help"]
    if draw(st.booleans()):
        flag = draw(misspelt([*flags, *FLAGS]))
        return Case((name, [flag]), (repr(flag.split("=")[0]), "unrecognized argument"))
    flag, value = draw(st.sampled_from(flags)), draw(arguments)
    names = (flag, repr(value)[:50], "had a password")
    return Case((name, [f"{flag}={value}"]), names, certain=False)
