"""Who may import whom, and what the code may look like: CONTRIBUTING.md's rules, kept by an AST walk."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vlscale"
MAX_FILE, MAX_FUNCTION, MAX_DEPTH = 400, 60, 2
ONLY = {  # a foreign package -> the modules that may import it
    "deepspeed": {"vlscale.engine"},
    "torch.distributed": {"vlscale.distributed"},
    "tensorboard": {"vlscale.monitor"},
    "torch.utils.tensorboard": {"vlscale.monitor"},
    "wandb": {"vlscale.monitor"},
}
LAZY = {"tensorboard", "torch.utils.tensorboard", "wandb"}  # inside a function only
SEES_RUN_CONFIG = {"vlscale.config", "vlscale.build", "vlscale.train", "vlscale.record"}
NEVER = {  # a part of the house -> what it must not import
    "vlscale.types": ("vlscale",),
    "vlscale.errors": ("vlscale",),
    "vlscale.families": ("vlscale.objectives", "vlscale.data", "vlscale.model", "vlscale.train"),
    "vlscale.objectives": ("vlscale.families", "vlscale.data", "vlscale.model", "vlscale.train"),
    "vlscale.data": ("vlscale.nn", "vlscale.families", "vlscale.objectives", "vlscale.model"),
    "vlscale": ("launchers", "tests"),
}
NN_MAY = ("vlscale.nn", "vlscale.types", "vlscale.distributed")


@dataclass(frozen=True)
class Import:
    """`module` is imported at `line`; `name` is what is taken from it."""

    module: str
    name: str
    line: int
    typing_only: bool
    in_function: bool

    def of(self, package: str) -> bool:
        full = f"{self.module}.{self.name}" if self.name else self.module
        return any(f"{each}.".startswith(f"{package}.") for each in (self.module, full))


@dataclass(frozen=True)
class Source:
    """One parsed module."""

    module: str
    text: str
    tree: ast.Module

    @staticmethod
    def parse(module: str, text: str) -> Source:
        return Source(module, text, ast.parse(text))

    def within(self, package: str) -> bool:
        return f"{self.module}.".startswith(f"{package}.")

    def imports(self) -> list[Import]:
        return list(_imports(self.tree, typing_only=False, in_function=False))


def _imports(node: ast.AST, typing_only: bool, in_function: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, "", node.lineno, typing_only, in_function)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield Import(node.module or "", alias.name, node.lineno, typing_only, in_function)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.body:
            yield from _imports(child, True, in_function)
        for child in node.orelse:
            yield from _imports(child, typing_only, in_function)
    else:
        inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, typing_only, inside)


def house() -> list[Source]:
    sources = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources.append(Source.parse(name, path.read_text(encoding="utf-8")))
    return sources


def foreign_imports(source: Source) -> Iterator[str]:
    """Libraries with one door each."""
    for each in source.imports():
        for package, allowed in ONLY.items():
            if not each.of(package) or each.typing_only:
                continue
            if source.module not in allowed:
                yield f"line {each.line}: {package} is imported by {', '.join(sorted(allowed))} only"
            elif package in LAZY and not each.in_function:
                yield f"line {each.line}: {package} is imported where it is used, not at the top"
    for node in ast.walk(source.tree):
        used = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
        if used and source.module not in ONLY["torch.distributed"]:
            yield f"line {node.lineno}: torch.distributed is used by vlscale.distributed only"


def borders(source: Source) -> Iterator[str]:
    """Parts of the house that do not know each other."""
    for each in source.imports():
        if each.typing_only:
            continue
        for part, forbidden in NEVER.items():
            if source.within(part):
                for other in forbidden:
                    if each.of(other):
                        yield f"line {each.line}: {part} imports {other}"
        if source.within("vlscale.nn") and each.of("vlscale") and not any(map(each.of, NN_MAY)):
            yield f"line {each.line}: nn imports {each.module}"
        yield from _siblings(source, each)


def _siblings(source: Source, each: Import) -> Iterator[str]:
    """A family or objective knows its folder's contract, and none of its neighbours."""
    for folder in ("vlscale.families", "vlscale.objectives"):
        if not source.within(folder) or not each.of(folder):
            continue
        target = each.module if each.module != folder else f"{folder}.{each.name}"
        if target not in (f"{folder}.base", source.module):
            yield f"line {each.line}: {source.module} imports its sibling {target}"


def run_config(source: Source) -> Iterator[str]:
    """Everyone but the loop gets its own part of the configuration."""
    if source.module in SEES_RUN_CONFIG:
        return
    for node in ast.walk(source.tree):
        if (isinstance(node, ast.Name) and node.id == "RunConfig") or (
            isinstance(node, ast.alias) and node.name == "RunConfig"
        ):
            yield f"line {node.lineno}: RunConfig is for config and the loop only"


def signatures(source: Source) -> Iterator[str]:
    """No `**kwargs` in public functions."""
    for node in ast.walk(source.tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or not node.args.kwarg:
            continue
        if not node.name.startswith("_") or node.name.startswith("__"):
            yield f"line {node.lineno}: {node.name} takes **{node.args.kwarg.arg}"


def mutable_state(source: Source) -> Iterator[str]:
    """A module-level list, dict or set is an UPPER_CASE constant; nothing is declared `global`."""
    containers = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for node in source.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        made = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in (
            *("list", "dict", "set", "defaultdict", "Counter", "OrderedDict", "deque"),
        )
        if not (made or isinstance(value, containers)):
            continue
        for target in targets:
            if isinstance(target, ast.Name) and not (target.id.isupper() or target.id == "__all__"):
                yield f"line {node.lineno}: {target.id} is module-level mutable state"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: global {', '.join(node.names)}"


FIELDS = {"caption"}  # of a sample's json, which an objective is named like


def names_compared(source: Source, known: set[str]) -> Iterator[str]:
    """Nobody asks which family or objective it is dealing with."""
    known = (
        known - {source.module.rsplit(".", 1)[-1]} - (FIELDS if source.module.startswith("vlscale.data.") else set())
    )
    for node in ast.walk(source.tree):
        if not isinstance(node, (ast.Compare, ast.MatchValue)):
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and part.value in known:
                yield f"line {part.lineno}: compares with the name '{part.value}'"


def sizes(source: Source) -> Iterator[str]:
    """Short enough to read in one go."""
    lines = len(source.text.splitlines())
    if lines > MAX_FILE:
        yield f"{lines} lines, at most {MAX_FILE}"
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"line {node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}"


def rings(sources: list[Source]) -> list[str]:
    """Modules that import each other in a circle, function-level imports counted."""
    known = {source.module for source in sources}
    graph: dict[str, set[str]] = {}
    for source in sources:
        targets = graph.setdefault(source.module, set())
        for each in source.imports():
            full = f"{each.module}.{each.name}"
            target = full if full in known else each.module
            if target in known and target != source.module and not each.typing_only:
                targets.add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def deep_classes(sources: list[Source]) -> list[str]:
    """Classes of ours that stand more than `MAX_DEPTH` below the first class of ours."""
    bases = {
        node.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
    }

    def depth(name: str) -> int:
        return 1 + max((depth(base) for base in bases[name] if base in bases and base != name), default=0)

    def is_error(name: str) -> bool:  # errors are told apart by class
        return name == "VlscaleError" or any(map(is_error, bases.get(name, [])))

    return [f"{name} is {depth(name)} deep" for name in bases if depth(name) > MAX_DEPTH + is_error(name)]


def objective_and_family_names() -> set[str]:
    folders = (PACKAGE / "families", PACKAGE / "objectives")
    return {path.stem for folder in folders for path in folder.glob("*.py")} - {"__init__", "base"}


def faults(source: Source, known: set[str]) -> list[str]:
    checks = (foreign_imports, borders, run_config, signatures, mutable_state, sizes)
    found = [fault for check in checks for fault in check(source)]
    return [f"{source.module}: {fault}" for fault in [*found, *names_compared(source, known)]]


SOURCES = house()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.module)
def test_a_module_keeps_the_rules(source: Source) -> None:
    assert faults(source, objective_and_family_names()) == []


def test_no_module_imports_itself_by_a_detour() -> None:
    assert rings(SOURCES) == []


def test_inheritance_is_flat() -> None:
    assert deep_classes(SOURCES) == []


VIOLATIONS = {
    "only engine has deepspeed": ("vlscale.train", "import deepspeed"),
    "even inside a function": ("vlscale.train", "def f():\n    from deepspeed.ops import x"),
    "only distributed has torch.distributed": ("vlscale.engine", "import torch.distributed as dist"),
    "in the from form": ("vlscale.engine", "from torch import distributed"),
    "or by attribute": ("vlscale.engine", "import torch\ntorch.distributed.barrier()"),
    "only monitor has tensorboard": ("vlscale.train", "from torch.utils.tensorboard import SummaryWriter"),
    "and only when needed": ("vlscale.monitor", "from torch.utils.tensorboard import SummaryWriter"),
    "wandb too": ("vlscale.train", "def f():\n    import wandb"),
    "types stand alone": ("vlscale.types", "from vlscale.errors import DataError"),
    "errors stand alone": ("vlscale.errors", "from vlscale import types"),
    "nn knows tensors only": ("vlscale.nn.vit", "from vlscale.families.base import Family"),
    "families know no objective": ("vlscale.families.clip", "from vlscale.objectives import itc"),
    "objectives know no family": ("vlscale.objectives.itc", "from vlscale.families.base import Family"),
    "siblings are strangers": ("vlscale.families.clip", "from vlscale.families.albef import Albef"),
    "siblings by folder": ("vlscale.objectives.itc", "from vlscale.objectives import itm"),
    "data knows no network": ("vlscale.data.loader", "from vlscale.nn import vit"),
    "data knows no model": ("vlscale.data.loader", "def f():\n    import vlscale.model"),
    "no launcher": ("vlscale.train", "from launchers import pretrain"),
    "no tests": ("vlscale.train", "import tests.reference"),
    "RunConfig stays in the loop": ("vlscale.engine", "from vlscale.config import RunConfig"),
    "no kwargs": ("vlscale.engine", "def build(**kwargs): ..."),
    "no kwargs in methods": ("vlscale.engine", "class A:\n    def __init__(self, **options): ..."),
    "no registry": ("vlscale.families.clip", "registry = {}"),
    "no annotated registry": ("vlscale.train", "seen: list[int] = list()"),
    "no global": ("vlscale.train", "def f():\n    global seen\n    seen = 1"),
    "no name test": ("vlscale.train", "def f(name):\n    return name == 'albef'"),
    "no name test in a tuple": ("vlscale.train", "def f(name):\n    return name in ('itc', 'x')"),
    "no name test by match": ("vlscale.train", "def f(n):\n    match n:\n        case 'itc': return 1"),
    "short files": ("vlscale.train", "x = 1\n" * 401),
    "short functions": ("vlscale.train", "def f():\n" + "    x = 1\n" * 60),
}


@pytest.mark.parametrize(("module", "text"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_violation_is_found(module: str, text: str) -> None:
    assert len(faults(Source.parse(module, text), {"albef", "itc"})) >= 1


PERMITTED = {
    "a door": ("vlscale.engine", "import deepspeed"),
    "a late door": ("vlscale.monitor", "def f():\n    from torch.utils.tensorboard import SummaryWriter"),
    "a type": ("vlscale.model", "if TYPE_CHECKING:\n    from vlscale.families.base import Family"),
    "a contract": ("vlscale.families.clip", "from vlscale.families.base import Family"),
    "a constant": ("vlscale.config", "SECTIONS = {'a': 1}"),
    "private options": ("vlscale.engine", "def _call(**options): ..."),
    "its own name": ("vlscale.objectives.itc", "def f(name):\n    return name == 'itc'"),
    "a longer word": ("vlscale.train", "import deepspeed_like, torch"),
}


@pytest.mark.parametrize(("module", "text"), PERMITTED.values(), ids=PERMITTED)
def test_what_is_permitted_passes(module: str, text: str) -> None:
    assert faults(Source.parse(module, text), {"albef", "itc"}) == []


def test_a_ring_is_found_even_through_a_function() -> None:
    a = Source.parse("vlscale.a", "from vlscale import b")
    b = Source.parse("vlscale.b", "def f():\n    from vlscale.a import x")
    types_only = Source.parse("vlscale.b", "if TYPE_CHECKING:\n    from vlscale.a import x")
    assert rings([a, b]) != []
    assert rings([a, types_only]) == []


def test_a_deep_class_is_found() -> None:
    flat = "class Family(Module): ...\nclass Albef(Family): ..."
    assert deep_classes([Source.parse("vlscale.a", flat)]) == []
    assert deep_classes([Source.parse("vlscale.a", flat + "\nclass Tcl(Albef): ...")]) == ["Tcl is 3 deep"]
