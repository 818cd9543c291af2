"What the package imports is what settings.ini asks for, and constraints.txt pins it."
import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = configparser.ConfigParser(delimiters=["="], interpolation=None)
SETTINGS.read(ROOT/"settings.ini")
EXTRAS = [key for key in SETTINGS["DEFAULT"] if key.endswith("_requirements")]


def canonical(name: str) -> str:
    "A distribution's name as pip compares it"
    return re.sub(r"[-_.]+", "-", name).lower()


def asked(key: str) -> set[str]:
    "Distributions in a list of requirements"
    return {canonical(re.match(r"[\w.-]+", word)[0]) for word in SETTINGS["DEFAULT"][key].split()}


def imported() -> dict[str, set[str]]:
    "Top-level names that the package imports, inside functions too -> modules that do"
    found = {}
    for path in (ROOT/"peer_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names: found.setdefault(name.split(".")[0], set()).add(path.stem)
    return {name: who for name, who in found.items() if name not in sys.stdlib_module_names and name != "peer_nb"}


def test_every_import_is_asked_for():
    known, owners = set().union(asked("requirements"), *(asked(key) for key in EXTRAS)), packages_distributions()
    missing = {}
    for name, who in imported().items():
        distributions = {canonical(d) for d in owners.get(name, [name])}
        if not distributions & known: missing[name] = sorted(who)
    assert not missing, f"settings.ini does not ask for what these modules import: {missing}"


@pytest.mark.parametrize("key", ["requirements", *EXTRAS])
def test_constraints_pin_what_is_asked_for(key):
    pinned = {canonical(line.split("==")[0]) for line in (ROOT/"constraints.txt").read_text().splitlines() if "==" in line}
    assert asked(key) <= pinned, asked(key) - pinned
