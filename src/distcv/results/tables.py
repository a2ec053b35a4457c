"""What is made of the result files: docs/results.md, two parts of the README, heads of recipes.

Nothing in them is typed in: :func:`tables` gives the whole text of each file.
"""

import re
from functools import partial
from pathlib import Path

from distcv.command_line import write_file
from distcv.config import InputError
from distcv.results import spread
from distcv.results.analysis import NOT_YET
from distcv.results.documents import Document, read_documents
from distcv.results.files import Measured, read_measured, recipes
from distcv.results.heads import with_head
from distcv.results.page import System, overview, page

OF_DOCUMENT = "_document"  # how the name of a recipe ends that follows a document


def write_tables(clone: Path) -> list[str]:
    """Bring all files up to date; a line for each that was changed.

    Raises:
        InputError: a file can't be read or written.
    """
    changed = []
    for path, text in tables(clone).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_file("--tables", path, partial(path.write_text, text, encoding="utf-8"))
            changed.append(f"written {path}")
    return changed or ["nothing to change"]


def tables(clone: Path) -> dict[Path, str]:
    """Each file that is made of result files, wholly or in part, and what should be in it.

    Raises:
        InputError: a file can't be read, or a part has no place in it.
    """
    known = {name: read_measured(clone, name, recipe) for name, recipe in recipes(clone).items()}
    documents = read_documents(clone)
    systems = systems_of(known, documents)
    files = {
        clone / "docs/results.md": page(systems),
        clone / "README.md": readme(clone / "README.md", systems),
    }
    for name, measured in known.items():
        path, network = clone / f"configs/{name}.yaml", name.removesuffix(OF_DOCUMENT)
        said = documents.get(network) if network != name else None
        files[path] = with_head(path.read_text(encoding="utf-8"), measured, said)
    return files


def systems_of(known: dict[str, Measured], documents: dict[str, Document]) -> list[System]:
    """Recipes by the networks of the documents.

    A recipe beside them belongs to the network that has its model's name, if it has its data.

    Raises:
        InputError: a network of the documents has no recipe.
    """
    named = documents.keys() | {name for name in known if name.endswith(OF_DOCUMENT)}
    others = [measured for name, measured in known.items() if name not in named]
    systems = []
    for name, said in documents.items():
        if name not in known:
            raise InputError(f"results/documents.yaml: no configs/{name}.yaml: add the recipe")
        reproduced = [known[theirs]] if (theirs := name + OF_DOCUMENT) in known else []
        own = name, known[name].recipe.dataset
        more = [m for m in others if (m.recipe.model, m.recipe.dataset) == own]
        systems.append(System(name, said, reproduced, [known[name], *more]))
    return systems


def readme(path: Path, systems: list[System]) -> str:
    """The README with its table of networks and its sentence on the main command anew.

    Raises:
        InputError: it can't be read, or has no place for them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: do this in a clone of distcv") from None
    gap = next(system.ours[0] for system in systems if system.name == "gap")
    for marker, part in {"gap": sentence(gap), "results": overview(systems, "results/")}.items():
        place = re.search(rf"(?<=<!-- {marker} -->\n).*?(?=<!-- end -->)", text, re.DOTALL)
        if place is None:
            raise InputError(f"{path}: no place '<!-- {marker} --> … <!-- end -->': put it in")
        text = text[: place.start()] + part + text[place.end() :]
    return text


def sentence(gap: Measured) -> str:
    """What the README says of its main command."""
    if not gap.results:
        return f"Its accuracy is {NOT_YET}.\n"
    return (
        f"It reaches test accuracy {spread(gap.accuracies)} % (mean ± standard deviation, "
        f"n = {len(gap.results)} seeds, last epoch),\nwithout test-time augmentation, in "
        f"{gap.time} of training and evaluation\non {gap.hardware}{gap.with_flags} "
        "([results/gap.json](results/gap.json)).\n"
    )
