"""The page of hooks, types and capabilities, from the source that declares them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from types import ModuleType

from trainer_core import capabilities, hookspecs, run, types
from trainer_core.catalogue import Catalogue
from trainer_core.planner import occasion

NO_USER_YET: dict[str, str] = {}
"""Hook → why neither core nor a plugin of this repository implements it."""

CORE_USES = {
    "build_optimizer": "core's own optimisers (`optim.py`)",
    "compute_loss": "core's flow matching loss (`flow.py`)",
}
"""Hook → the implementation in core."""

_LABEL = re.compile(r"^(Called|Returns|Arguments|Must not)\b")
_FIELD = re.compile(r"^([a-z]\w*(?:, [a-z]\w*)*): ")


def hooks_page(catalogue: Catalogue) -> str:
    """Return ``docs/reference/hooks.md``."""
    lines = ["# Hooks", "", *_prose(inspect.getdoc(hookspecs) or ""), ""]
    lines += [
        "This page is generated from `hookspecs.py`, `types.py`, `planner/occasion.py`, "
        "`capabilities.py` and `run.py`."
    ]
    for node in hook_nodes():
        lines += _hook(node, catalogue)
    for title, module, about in (
        ("Types", types, "What travels between core and plugins; all are frozen dataclasses."),
        ("Types of trainer plan", occasion, inspect.getdoc(occasion) or ""),
        ("Capabilities", capabilities, inspect.getdoc(capabilities) or ""),
        ("The run", run, "What a hook gets as `run`, and typed state that plugins share."),
    ):
        lines += ["", f"## {title}", "", *_prose(about)]
        for declared in _body(module):
            lines += _declaration(module, declared)
    return "\n".join(lines) + "\n"


def hook_nodes() -> list[ast.FunctionDef]:
    """Return the hooks as they stand in the source, in life-cycle order."""
    return [node for node in _body(hookspecs) if isinstance(node, ast.FunctionDef)]


def users(hook: str, catalogue: Catalogue) -> list[str]:
    """Return the plugins of the catalogue that implement a hook."""
    return [entry.name for entry in catalogue.usable() if hook in entry.hooks]


def _hook(node: ast.FunctionDef, catalogue: Catalogue) -> Iterator[str]:
    yield from ("", f"## {node.name}", "", "```python", *_signature(hookspecs, node), "```", "")
    yield from (*_prose(ast.get_docstring(node) or ""), "")
    found = [f"`{name}`" for name in users(node.name, catalogue)]
    if node.name in CORE_USES:
        found.append(CORE_USES[node.name])
    if found:
        yield f"Implemented by: {', '.join(found)}."
    else:
        yield f"No first-party user yet: {NO_USER_YET.get(node.name, 'unexplained')}."


def _declaration(module: ModuleType, node: ast.stmt) -> Iterator[str]:
    """Return the lines of a public class or named type; none for anything else."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        name = node.targets[0].id
        if name[0].isupper() and len(name) > 1:
            yield from ("", f"### {name}", "", "```python", *_source(module, node), "```")
        return
    if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
        return
    yield from ("", f"### {node.name}")
    fields = [line for item in node.body if _is_field(item) for line in _source(module, item)]
    if fields:
        yield from ("", "```python", *fields, "```")
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    names = [item.split(":")[0] for item in fields if item[0].isalpha()] or _attributes(methods)
    yield from ("", *_prose(ast.get_docstring(node) or "", names))
    for method in methods:
        if not method.name.startswith("_") and not _is_setter(method):
            yield from _method(module, method)


def _method(module: ModuleType, node: ast.FunctionDef) -> Iterator[str]:
    signature = " ".join(line.strip() for line in _signature(module, node))
    signature = (
        signature.replace("( ", "(").replace(", )", ")").replace(" )", ")").removesuffix(":")
    )
    is_property = any(ast.unparse(item) == "property" for item in node.decorator_list)
    shown = f"{node.name}: {ast.unparse(node.returns)}" if is_property and node.returns else None
    about = " ".join(_plain(ast.get_docstring(node) or "").split())
    yield from ("", f"- `{shown or signature.removeprefix('def ')}`: {about}")


def _attributes(methods: Sequence[ast.FunctionDef]) -> list[str]:
    """Return the properties of a class and what its methods assign to ``self``."""
    inner = [item for method in methods for item in ast.walk(method)]
    stored = [item for item in inner if isinstance(item, ast.Attribute)]
    names = [item.attr for item in stored if isinstance(item.ctx, ast.Store)]
    return [*names, *(method.name for method in methods if method.decorator_list)]


def _is_setter(node: ast.FunctionDef) -> bool:
    return any(isinstance(item, ast.Attribute) for item in node.decorator_list)


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def _body(module: ModuleType) -> list[ast.stmt]:
    return ast.parse(inspect.getsource(module)).body


def _source(module: ModuleType, node: ast.stmt) -> list[str]:
    lines = inspect.getsource(module).splitlines()[node.lineno - 1 : node.end_lineno]
    return [line[node.col_offset :] for line in lines]


def _signature(module: ModuleType, node: ast.FunctionDef) -> list[str]:
    lines = inspect.getsource(module).splitlines()
    end = node.body[0].lineno - 1
    return [line.rstrip()[node.col_offset :] for line in lines[node.lineno - 1 : end]]


def _plain(text: str) -> str:
    """Return a docstring's text with the marks of Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"``\1``", text)
    return text.replace("``", "`")


def _prose(docstring: str, fields: Sequence[str] = ()) -> list[str]:
    """Return a docstring as Markdown: labelled lines are paragraphs, described fields a list.

    fields: names whose description may also begin in the middle of a line.
    """
    lines: list[str] = []
    in_list = False
    text = _plain(inspect.cleandoc(docstring))
    if fields:
        one = f"(?:{'|'.join(fields)})"
        text = re.sub(rf"(?<=[.\])]) (?={one}(?:, {one})*: )", "\n", text)
    for line in text.splitlines():
        if match := _FIELD.match(line):
            if not in_list and lines and lines[-1]:
                lines.append("")
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            lines.append(f"- {names}: {line[match.end() :]}")
            in_list = True
        elif in_list and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            in_list = False
            if _LABEL.match(line) and lines and lines[-1]:
                lines.append("")
            lines.append(line)
    return lines
