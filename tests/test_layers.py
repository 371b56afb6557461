"""memws.py reads from ground to roof: a section names only what the table allows, and the whole stays small."""

import ast
import re
import symtable
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import pytest

import memws

# Number, name, and the sections that it may name; all may name the header's.
TABLE: dict[int, tuple[str, set[int]]] = {
    0: ("Header", set()),
    1: ("Constants", set()),
    2: ("Errors", {1}),
    3: ("Wire", {1, 2}),
    4: ("Memory", {1, 2}),
    5: ("Store", {1, 2, 3, 4}),
    6: ("LLM", {1, 2, 3, 4}),
    7: ("Tools", {1, 2, 3, 4, 5}),
    8: ("Agent", {1, 2, 3, 4, 5, 6, 7}),
    9: ("Client", {1, 2, 3}),
    10: ("Panel", {1, 2, 3, 9}),
    11: ("Server", set(range(1, 11))),
    12: ("CLI", set(range(1, 12))),
}
# JSON and events are everybody's: sections without the rest of Wire may name these.
CODEC = {"encode_json", "decode_json", "Event"}
LINES, LONGEST, NINE_IN_TEN, MEDIAN = 7_825, 60, 30, 8
"""Lines of the file without the panel's section, and of its functions."""
NEVER = {"TYPE_CHECKING", "globals", "eval", "exec", "compile", "__import__"}
CODE_PACKAGES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "code"}
SQL = re.compile(
    r"\b(SELECT\s.+\sFROM|INSERT\s+(OR\s+\w+\s+)?INTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM|(CREATE|ALTER|DROP)\s+\w+|"
    r"PRAGMA\s+\w+|BEGIN\s+IMMEDIATE)\b",
    re.DOTALL,
)


class Module:
    """The text of memws.py, cut into its sections."""

    def __init__(self, text: str) -> None:
        self.text, self.tree = text, ast.parse(text)
        found = re.finditer(r"^# =+\n# (\d+)\. (.+)\n# =+$", text, re.MULTILINE)
        self.banners = [(int(match[1]), match[2], text.count("\n", 0, match.start())) for match in found]

    @cached_property
    def statements(self) -> list[tuple[int, ast.stmt]]:
        """Top-level statements, each with its section's number; what comes before the first banner is the header."""
        return [(self.section(statement.lineno), statement) for statement in self.tree.body]

    @cached_property
    def scopes(self) -> list[tuple[int, str, symtable.SymbolTable]]:
        """Top-level statements, each a module of its own, so that Python itself tells local names from global ones."""
        found = [(section, ast.unparse(statement)) for section, statement in self.statements]
        return [(section, text.splitlines()[0], symtable.symtable(text, "memws.py", "exec")) for section, text in found]

    def section(self, line: int) -> int:
        return ([0] + [number for number, _, start in self.banners if start < line])[-1]

    @cached_property
    def homes(self) -> dict[str, int]:
        """The section that each top-level name comes from."""
        homes: dict[str, int] = {}
        for section, _, scope in self.scopes:
            for symbol in scope.get_symbols():
                if symbol.is_assigned() or symbol.is_imported():
                    homes.setdefault(symbol.get_name(), section)
        return homes

    @cached_property
    def uses(self) -> list[tuple[int, str, str]]:
        """What sections name, local names aside: (section, the statement's first line, name)."""
        return [(section, line, name) for section, line, scope in self.scopes for name in sorted(global_names(scope))]

    def nodes(self) -> Iterator[tuple[int, ast.AST]]:
        """Every node, with the number of its section."""
        for section, statement in self.statements:
            for node in ast.walk(statement):
                yield section, node


def global_names(scope: symtable.SymbolTable) -> set[str]:
    """The global names that a scope and those inside it refer to."""
    is_top = scope.get_type() == "module"
    names = {each.get_name() for each in scope.get_symbols() if each.is_referenced() and (is_top or each.is_global())}
    return names.union(*map(global_names, scope.get_children()))


# The rules: each gives the faults that it finds.


def upward_names(module: Module) -> list[str]:
    """A section names only its own names, the header's, and those of sections that the table lists."""
    faults = []
    for section, statement, name in module.uses:
        home = module.homes.get(name, 0)
        is_shared = home == 3 and name in CODEC and section > 3
        if home not in {0, section} | TABLE[section][1] and not is_shared:
            faults.append(f"{TABLE[section][0]} names {name} of {TABLE[home][0]}: {statement}")
    return faults


def tricks(module: Module) -> list[str]:
    """No reaching upward without naming, nothing that turns data into code, and raw JSON in Wire only."""
    faults = [f"{name}: {line}" for _, line, name in module.uses if name in NEVER]
    faults += [f"json: {line}" for section, line, name in module.uses if name == "json" and section != 3]
    for _, node in module.nodes():
        annotations = [getattr(node, field, None) for field in ("annotation", "returns")]
        faults += [f"quoted annotation: {ast.unparse(each)}" for each in annotations if each and is_quoted(each)]
        faults += [f"imports: {ast.unparse(node)}" for _ in imported(node) & {"memws", *CODE_PACKAGES}]
        if ast.unparse(node) == "sys.modules[__name__]":
            faults.append(f"imports itself: {ast.unparse(node)}")
    return faults


def is_quoted(annotation: ast.expr) -> bool:
    """Whether an annotation holds a string that stands for a type, which one inside Literal or Annotated does not."""
    if isinstance(annotation, ast.Subscript):
        generic = ast.unparse(annotation.value).split(".")[-1]
        return generic not in {"Literal", "Annotated"} and is_quoted(annotation.slice)
    if isinstance(annotation, ast.Constant):
        return isinstance(annotation.value, str)
    return any(is_quoted(child) for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr))


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "memws").split(".")[0]}
    return set()


def sql_outside_store(module: Module) -> list[str]:
    """Only Store speaks SQL or names sqlite3."""
    faults = [f"sqlite3: {statement}" for section, statement, name in module.uses if name == "sqlite3" and section != 5]
    prose = {id(docstring) for _, node in module.nodes() if (docstring := bare_string(node))}
    for section, node in module.nodes():
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
        if section != 5 and id(node) not in prose and text is not None and SQL.search(text):
            faults.append(f"{TABLE[section][0]}: {text[:60]!r}")
    return faults


def bare_string(node: ast.AST) -> ast.expr | None:
    """The string of a statement that is only a string: a docstring, or the text under a field."""
    is_bare = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.JoinedStr)
    return node.value if is_bare else None  # type: ignore[attr-defined]


def map_and_banners(module: Module) -> list[str]:
    """The docstring's numbered map, the banners and the table agree."""
    banners = {number: " ".join(title.split()) for number, title, _ in module.banners}
    titles = re.findall(r"^\s*(\d+)\. +(.+)$", ast.get_docstring(module.tree) or "", re.MULTILINE)
    in_map = {int(number): " ".join(title.split()) for number, title in titles}
    faults = [
        f"{number}. is {banners.get(number)!r} in its banner and {in_map.get(number)!r} in the map"
        for number in sorted((banners.keys() | in_map.keys()) - {0})
        if banners.get(number) != in_map.get(number)
    ]
    names = {number: re.split(r"\W", title)[0] for number, title in banners.items()}
    for number, (name, _) in TABLE.items():
        if number and names.get(number) != name:
            faults.append(f"{number}. is {name} in the table and {names.get(number)!r} in its banner")
    order = [number for number, _, _ in module.banners]
    return faults + ([f"the order is {order}"] if order != sorted(set(order) & TABLE.keys()) else [])


def too_long(module: Module) -> list[str]:
    """Functions fit in the eye: the longest, nine in ten and the median; and so does the file, but for the panel."""
    nodes = [node for _, node in module.nodes() if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    functions = {f"{node.name} in line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1 for node in nodes}
    sizes = sorted(functions.values()) or [0]
    faults = [f"{size} lines: {name}" for name, size in functions.items() if size > LONGEST]
    for share, tenths, most in (("nine in ten", 9, NINE_IN_TEN), ("half", 5, MEDIAN)):
        size = sizes[max(0, -(-tenths * len(sizes) // 10) - 1)]
        faults += [f"{share} of the functions have up to {size} lines, more than {most}"] if size > most else []
    ends = [start for _, _, start in module.banners[1:]] + [module.text.count("\n") + 1]
    panel = [end - start for (number, _, start), end in zip(module.banners, ends, strict=True) if number == 10]
    lines = module.text.count("\n") - sum(panel)
    return faults + ([f"{lines} lines, more than {LINES}"] if lines > LINES else [])


Rule = Callable[[Module], list[str]]
RULES: list[Rule] = [upward_names, tricks, sql_outside_store, map_and_banners, too_long]


@pytest.fixture(scope="module")
def whole() -> Module:
    return Module(Path(memws.__file__).read_text("utf-8"))


@pytest.mark.parametrize("rule", RULES)
def test_memws(whole: Module, rule: Rule) -> None:
    """memws.py breaks no rule."""
    assert rule(whole) == []
