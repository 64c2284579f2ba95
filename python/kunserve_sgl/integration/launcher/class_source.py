"""Classes of SGLang, read from their source: importing them would cost the launcher seconds."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class ClassSource:
    """Reads a class as it is written in `module`."""

    module: str
    node: ast.ClassDef

    @property
    def name(self) -> str:
        """Gives the name that the class statement gives it."""
        return self.node.name

    @functools.cached_property
    def lineage(self) -> tuple[ClassSource, ...]:
        """Returns this class and its bases, the nearest first; without those whose source is not found."""
        found = [self]
        for base in self.node.bases:
            cls = find_class(self.module, base.id) if isinstance(base, ast.Name) else None
            if cls is not None:
                found += [each for each in cls.lineage if each not in found]
        return tuple(found)

    def own_method(self, name: str) -> Function | None:
        """Returns the method of that name that the class itself has, not its bases; None where it has none."""
        return next((each for each in self.node.body if isinstance(each, Function) and each.name == name), None)

    def method(self, name: str) -> tuple[ClassSource, Function] | None:
        """Returns the class that has the method of that name, its own or inherited, and the method; None where there is
        none."""
        for cls in self.lineage:
            if (function := cls.own_method(name)) is not None:
                return cls, function
        return None

    def takes(self, method: str, argument: str) -> bool:
        """Tells whether the method has an argument of that name."""
        found = self.method(method)
        if found is None:
            return False
        arguments = found[1].args
        return argument in (each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))

    def has(self, attribute: str) -> bool:
        """Tells whether the class or an object of it may have that attribute."""
        return any(attribute in cls._names or any(cls.values_of(attribute)) for cls in self.lineage)

    @property
    def _names(self) -> set[str]:
        functions = {each.name for each in self.node.body if isinstance(each, Function)}
        return functions | {name for each in self.node.body for name, _ in _assigned(each)}

    def values_of(self, attribute: str) -> Iterator[ast.expr]:
        """Yields what methods of this class, not of its bases, assign to that attribute of an object."""
        for node in ast.walk(self.node):
            yield from (value for name, value in _assigned(node) if name == f"self.{attribute}")

    def class_of(self, value: ast.expr, owner: ClassSource) -> ClassSource | None:
        """Finds the class of what a method of `owner`, one of the lineage, makes with that expression; None where the
        source does not say it in so many words."""
        if not isinstance(value, ast.Call):
            return None
        if isinstance(value.func, ast.Name):
            return find_class(owner.module, value.func.id)
        name = _name_of(value.func)
        if not name.startswith("self."):
            return None
        maker = self.method(name.removeprefix("self."))
        if maker is None:
            return None
        returned = [node.value for node in ast.walk(maker[1]) if isinstance(node, ast.Return) and node.value]
        return self.class_of(returned[0], maker[0]) if len(returned) == 1 else None


def find_class(module: str, name: str) -> ClassSource | None:
    """Finds what `name` means in `module`, if that is a class whose source is found."""
    tree = _tree(module)
    if tree is None:
        return None
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return ClassSource(module, statement)
    followed = {module.partition(".")[0], "sglang"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in followed and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find_class(str(node.module), alias.name)
    return None


def names_in(module: str, variable: str) -> set[str]:
    """Returns the names in what `module` assigns to that variable at its top."""
    tree = _tree(module)
    values = [value for node in tree.body for name, value in _assigned(node) if name == variable] if tree else []
    return {node.id for value in values for node in ast.walk(value) if isinstance(node, ast.Name)}


def modules_of(package: str) -> dict[str, Path]:
    """Returns the modules right inside `package`, and their files."""
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return {f"{package}.{path.stem}": path for folder in folders for path in sorted(Path(folder).glob("*.py"))}


@functools.cache
def _tree(module: str) -> ast.Module | None:
    package = module.rpartition(".")[0]
    path = modules_of(package).get(module) if package else None
    if path is None:
        path = modules_of(module).get(f"{module}.__init__")
    return None if path is None else ast.parse(path.read_bytes())


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        yield _name_of(node.target), node.value
    if isinstance(node, ast.Assign):
        for target in node.targets:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                yield _name_of(each), node.value


def _name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
