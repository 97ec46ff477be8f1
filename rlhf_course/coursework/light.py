"""Which statements at the top of a cell are definitions, and which do the notebook's work.

Functions, classes and imports are definitions. So is an assignment that calls nothing but builtins,
torch, numpy, the like, and functions of the notebook that keep to those themselves: a constant, an
alias, a wrapped function. What calls the course's trainer, plots or reads files is work.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
TRIES = (ast.Try, getattr(ast, "TryStar", ast.Try))
BLOCKS = (ast.If, ast.With, *TRIES)
ALIAS = getattr(ast, "TypeAlias", ())  # `type Row = …`, from Python 3.12 on

LIBRARIES = {
    "abc", "cmath", "collections", "contextlib", "copy", "dataclasses", "datetime", "decimal",
    "einops", "enum", "fractions", "functools", "itertools", "jaxtyping", "logging", "math",
    "numbers", "numpy", "operator", "os", "pathlib", "random", "re", "scipy", "statistics",
    "string", "time", "torch", "types", "typing", "typing_extensions", "warnings",
}  # fmt: skip
MATHS = {
    "beyond_ppo", "distributed.pipeline", "distributed.placement", "distributed.weight_sync",
    "errors", "evaluation", "gpt", "kl_control", "mdp", "moments", "padding", "planning.memory",
    "ppo", "ppo_ptx", "reward_model", "rollout", "sampling", "sft",
}  # fmt: skip
"""The modules of the course in which nothing trains."""
BUILTINS = {
    "abs", "all", "any", "bool", "bytearray", "bytes", "callable", "chr", "classmethod", "complex",
    "dict", "divmod", "enumerate", "filter", "float", "format", "frozenset", "getattr", "globals",
    "hasattr", "hash", "int", "isinstance", "issubclass", "iter", "len", "list", "locals", "map",
    "max", "min", "next", "object", "ord", "pow", "property", "range", "repr", "reversed", "round",
    "set", "setattr", "slice", "sorted", "staticmethod", "str", "sum", "super", "tuple", "type",
    "vars", "zip",
}  # fmt: skip


class Names:
    """What the names at the top of a notebook stand for.

    Imports and functions count wherever they are written, since cells are run in any order;
    values become known as `admit` sees them.
    """

    def __init__(self, trees: list[ast.Module], reads: dict[str, set[str]]):
        """reads: name of each function and class -> the global names that it reads."""
        self.paths: dict[str, str] = {}
        self.stars = False
        self.functions = set(reads)
        self.makers: set[str] = set()
        self.holders: set[str] = set()
        self.values: set[str] = set()
        for tree in trees:
            for node in ast.walk(tree):
                if isinstance(node, IMPORTS):
                    self._import(node)
                elif isinstance(node, DEFINITIONS) and _hands_out_a_function(node):
                    self.makers.add(node.name)
        foreign = {name for name, path in self.paths.items() if not _is_light(path)}
        working = {name for name, read in reads.items() if read & foreign}
        while True:  # a function works when one that it calls does
            more = {name for name, read in reads.items() if read & working} - working
            if not more:
                break
            working |= more
        self.working = working

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            where = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            if alias.name == "*":
                self.stars |= _is_light(f"{where}*")
            elif alias.asname or where:
                self.paths[alias.asname or alias.name] = where + alias.name
            else:
                top = alias.name.partition(".")[0]
                self.paths[top] = top

    # ------------------------------------------------------------------------------ statements

    def admit(self, node: ast.stmt) -> bool:
        """True for a definition; the names that an assignment binds are values from then on."""
        if isinstance(node, (*DEFINITIONS, *IMPORTS)) or (ALIAS and isinstance(node, ALIAS)):
            return True
        if isinstance(node, BLOCKS):
            held = [self.admit(inner) for inner in inside(node)]  # each of them is to be seen
            return self.opens(node) and any(held)
        if isinstance(node, ast.Expr):
            named = isinstance(node.value, ast.NamedExpr)  # (size := 3)
            bound = [node.value.target] if named else []
            value = node.value.value if named else None
        elif isinstance(node, ASSIGNMENTS):
            bound = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = node.value
        else:
            return False
        targets = {n.id for n in names(*bound) if isinstance(n.ctx, ast.Store)}
        if value is None or not all(self.light(part, targets) for part in (value, *bound)):
            return False
        self.values |= targets
        return True

    def opens(self, node: ast.stmt) -> bool:
        """True where the conditions of a block may be evaluated, those of its elifs included."""
        if isinstance(node, ast.With):
            return all(self.light(item.context_expr) for item in node.items)
        if isinstance(node, TRIES):
            return all(h.type is None or self.light(h.type) for h in node.handlers)
        further = node.orelse[0] if len(node.orelse) == 1 else None
        return self.light(node.test) and (not isinstance(further, ast.If) or self.opens(further))

    # ----------------------------------------------------------------------------- expressions

    def light(self, node: ast.AST, targets: set[str] | frozenset = frozenset()) -> bool:
        """True where evaluating an expression calls nothing but what is named above.

        targets: the names that get its value. `loss = loss(x)` is a slip, not a definition.
        """
        if isinstance(node, ast.Lambda):  # its body waits
            defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            return all(self.light(part, targets) for part in defaults)
        if isinstance(node, (ast.Await, ast.Yield, ast.YieldFrom)):
            return False
        if isinstance(node, ast.Call) and not self._callable(node.func, targets):
            return False
        return all(self.light(part, targets) for part in ast.iter_child_nodes(node))

    def _callable(self, node: ast.expr, targets: set[str] | frozenset) -> bool:
        path = self.path(node)
        if path:
            return _is_light(path)
        if isinstance(node, ast.Name):
            name = node.id
            if name in self.functions | self.values:
                return name not in targets | self.working
            return name in BUILTINS or self.stars
        if isinstance(node, ast.Attribute):  # a method, of a value
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            return not isinstance(root, ast.Name) or self._callable(root, frozenset())
        if isinstance(node, ast.Lambda):
            return self.light(node.body, targets)
        if isinstance(node, ast.Subscript):
            return self._callable(node.value, targets)
        return isinstance(node, ast.Call)

    def path(self, node: ast.expr) -> str:
        """The dotted name below an imported one: "torch.nn.functional.relu", or ""."""
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in self.paths:
            return ""
        return ".".join([self.paths[node.id], *reversed(parts)])

    # -------------------------------------------------------------------------------- functions

    def defined(self, node: ast.stmt) -> set[str]:
        """The names that a definition makes a function or a class of, as far as its text tells.

        An object one of whose attributes is set counts: `Controller.update = update`.
        """
        if isinstance(node, DEFINITIONS):
            return {node.name}
        if isinstance(node, BLOCKS):
            held = [inner for inner in inside(node) if self.admit(inner)]
            return {name for inner in held for name in self.defined(inner)}
        found = set()
        for target, value in _pairs(node):
            if isinstance(target, ast.Attribute):
                found |= {n.id for n in names(target)}
            elif isinstance(target, ast.Name) and self._makes_a_function(value):
                found.add(target.id)
            elif isinstance(target, ast.Name) and self._holds_a_function(value):
                self.holders.add(target.id)
            elif isinstance(target, (ast.Tuple, ast.List)) and self._is_holder(value):
                found |= {n.id for n in target.elts if isinstance(n, ast.Name)}
        self.functions |= found
        return found

    def _holds_a_function(self, value: ast.expr) -> bool:
        """`mine = (f, g)`, kept to get them back after names were used otherwise."""
        kept = value.values if isinstance(value, ast.Dict) else getattr(value, "elts", ())
        return any(isinstance(n, ast.Name) and n.id in self.functions for n in kept)

    def _is_holder(self, value: ast.expr) -> bool:
        return isinstance(value, ast.Name) and value.id in self.holders

    def _makes_a_function(self, value: ast.expr) -> bool:
        if isinstance(value, ast.Lambda):
            return True
        if isinstance(value, ast.Name):
            return value.id in self.functions or value.id in self.paths
        if isinstance(value, ast.Attribute):
            return bool(self.path(value))
        if isinstance(value, ast.Subscript):  # mine[0]
            return self._is_holder(value.value)
        if isinstance(value, ast.IfExp):
            return self._makes_a_function(value.body) or self._makes_a_function(value.orelse)
        if not isinstance(value, ast.Call):
            return False
        if any(n.id in self.functions for n in value.args if isinstance(n, ast.Name)):
            return True  # wrap(f), torch.no_grad()(f)
        made = isinstance(value.func, ast.Name) and value.func.id in self.makers  # make_f(3)
        return made or self.path(value.func).startswith("functools.")  # partial(F.relu)


def _hands_out_a_function(node: ast.stmt) -> bool:
    """True for a function that returns one of its own, and for a class that can be called."""
    if isinstance(node, ast.ClassDef):
        methods = {method.name for method in node.body if isinstance(method, DEFINITIONS)}
        return bool(methods & {"__call__", "forward"})
    own = {inner.name for inner in ast.walk(node) if isinstance(inner, DEFINITIONS)} - {node.name}
    values = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return)]
    return any(
        isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id in own)
        for value in values
    )


def inside(block: ast.stmt) -> Iterator[ast.stmt]:
    """The statements one level below an if, with or try, in their order."""
    yield from block.body
    for handler in getattr(block, "handlers", ()):
        yield from handler.body
    yield from getattr(block, "orelse", ())
    yield from getattr(block, "finalbody", ())


def names(*nodes: ast.AST) -> Iterator[ast.Name]:
    """Every plain name in some expressions."""
    for node in nodes:
        yield from (n for n in ast.walk(node) if isinstance(n, ast.Name))


def _pairs(node: ast.stmt) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Target and value of an assignment, one by one where both are lists: `a, b = f, g`."""
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        yield node.target, node.value
    for target in node.targets if isinstance(node, ast.Assign) else ():
        both = (target, node.value)
        if all(isinstance(side, (ast.Tuple, ast.List)) for side in both):
            if len(target.elts) == len(node.value.elts):
                yield from zip(target.elts, node.value.elts, strict=True)
        else:
            yield both


def _is_light(path: str) -> bool:
    """True for a name of a library that is not suspected of work."""
    top, _, rest = path.partition(".")
    if top == "rlhf_course":
        return not rest or any(f"{rest}.".startswith(f"{module}.") for module in MATHS)
    return top in LIBRARIES
