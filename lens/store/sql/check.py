"""Decides whether a user's SQL is one harmless SELECT. Nothing is searched for in its text: the engine's own parser
reads it, and every node of the tree it finds must be of a kind that is allowed.

First the text goes to the parser as data (``formatQuerySingleLine`` of a literal), which never runs it, refuses
several statements and drops comments. Its answer is then put in parentheses, where the grammar has no place for
INTO OUTFILE, FORMAT or anything but a SELECT, and ``EXPLAIN AST`` shows the tree. What runs later is that same text
in the same parentheses, so there is no second reading that could differ.

A bare name can be a function too (``arrayMap(file, …)``), so no name may be that of a function that may not be
called. Last, `resolved` asks the engine what it would really call and read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from lens.store.engine import Store, quote
from lens.store.errors import BadQueryError, StoreError
from lens.store.sql.functions import IN_FUNCTIONS, TYPED, is_allowed, words_of

MOST_TEXT = 65_536
"""Longest SQL, in characters."""
_HINT = "send one SELECT over the views of docs/sql.md"

# Kinds that carry no name, and so nothing to check but their place.
_BARE = frozenset(
    words_of("""
SelectWithUnionQuery SelectIntersectExceptQuery SelectQuery ExpressionList Asterisk QualifiedAsterisk Subquery
TablesInSelectQuery TablesInSelectQueryElement TableExpression TableJoin ArrayJoin OrderByElement WithElement
WindowDefinition WindowListElement ColumnsListMatcher ColumnsTransformerList ColumnsExceptTransformer
ColumnsReplaceTransformer ColumnsReplaceTransformer::Replacement
""")
)
_NAMED = frozenset({"Identifier", "TableIdentifier", "Function", "Literal"})
_REFUSED = {
    "Set": "SETTINGS are the server's to choose",
    "ColumnsApplyTransformer": "APPLY is not taken: name the columns",
    "SampleRatio": "SAMPLE is not taken: filter by rank or step",
}
_NODE = re.compile(
    r"(?P<indent> *)(?P<kind>[A-Za-z:]+)(?: (?P<name>\S.*?))??(?: \(alias (?P<alias>[^()\n]+)\))?"
    r"(?: \(children (?P<children>\d+)\))?"
)
_CALLED = re.compile(r"function_name: ([^\s,]+)")
_READ = re.compile(r"table_name: ([^\s,]+)")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_TYPE = re.compile(
    r"'(?:\b(?:Nullable|Array|Tuple|Map|LowCardinality|U?Int\d+|Float32|Float64|String|Bool|Date|Date32|DateTime|"
    r"DateTime64|Decimal|Decimal32|Decimal64)\b|[(), 0-9])+'"
)
"""Types that may be cast to: plain values. States of aggregates, for one, are bytes that the engine would trust."""
_TEXT = re.compile(r"'([^'\\]*)'")


@dataclass
class Node:
    """One node of the tree: its kind, the name or value it carries, its alias, its children."""

    kind: str
    name: str = ""
    alias: str = ""
    children: list[Node] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Select:
    """A SELECT that passed: its text as the engine writes it, and the tree."""

    text: str
    tree: Node

    def tables(self) -> set[str]:
        """Names after FROM and JOIN: views, and the query's own WITH elements."""
        right_sides = (node.children[0].children[1] for node in self.tree.walk() if _is_in(node))
        named = (node.name for node in right_sides if node.kind == "Identifier")
        return {node.name for node in self.tree.walk() if node.kind == "TableIdentifier"} | set(named)

    def may_read(self, column: str) -> bool:
        """Whether a column of a view can be meant anywhere: by its name, or by an asterisk (but that of ``count(*)``)."""
        counted = {id(each) for node in self.tree.walk() if node.kind == "Function" and node.name == "count"
                   for arguments in node.children for each in arguments.children}  # fmt: skip
        for node in self.tree.walk():
            if node.kind in ("Asterisk", "QualifiedAsterisk") and id(node) not in counted:
                return True
            if node.kind == "Identifier" and node.name.rpartition(".")[2] == column:
                return True
        return False

    def pinned(self, view: str, column: str) -> set[str] | None:
        """The only values of a text column that can count wherever a view is read; None if that is not sure.

        Sure is ``FROM view WHERE column = 'x' AND …`` (or IN): then no other row of the view has to be read.
        """
        if " HAVING " in self.text or " QUALIFY " in self.text:
            return None  # in the tree they look like WHERE
        if any(node.alias == column for node in self.tree.walk()):
            return None
        if view in {node.name for node in self.tree.walk() if node.kind == "Identifier"}:
            return None
        reads = sum(node.kind == "TableIdentifier" and node.name == view for node in self.tree.walk())
        values: set[str] = set()
        for node in self.tree.walk():
            found = _pins(node, view, column) if node.kind == "SelectQuery" else None
            if found is not None:
                values |= found
                reads -= 1
        return values if reads == 0 else None


def checked(store: Store, sql: str, forbidden: frozenset[str]) -> Select:
    """The SELECT of this text; `forbidden` are names of functions, in lower case, that nothing may be called by.

    Raises:
        BadQueryError: it is no single SELECT, or holds something that is not allowed.
    """
    if len(sql) > MOST_TEXT:
        raise BadQueryError(f"the SQL is longer than {MOST_TEXT} characters", "ask for less at once")
    if "\0" in sql:
        raise BadQueryError("the SQL holds a zero character", _HINT)
    text = _written_by_engine(store, sql)
    if not text.startswith(("SELECT ", "WITH ")):
        raise BadQueryError(f"only SELECT is taken, not {text.split(' ', 1)[0][:20]}", _HINT)
    try:
        lines = store.query(f"EXPLAIN AST SELECT * FROM (\n{text}\n)").column(0).to_pylist()
    except StoreError as error:
        raise BadQueryError(
            f"this is not only a SELECT: {_reason(error)}", "leave out INTO, FORMAT, SETTINGS and parameters"
        ) from error
    tree = _inner(_tree("\n".join(lines)))
    for node in tree.walk():
        _check(node)
        if node.kind == "Identifier" and (node.name.lower() in forbidden or node.name.startswith("__")):
            raise BadQueryError(f"{node.name[:60]} is the name of a function that is not taken", "use another name")
    return Select(text, tree)


def resolved(plan: str, own_functions: frozenset[str], tables: frozenset[str]) -> None:
    """Refuse a query whose EXPLAIN QUERY TREE calls or reads what is neither allowed nor the views' own.

    Raises:
        BadQueryError: it does.
    """
    for name in _CALLED.findall(plan):
        if name not in own_functions and not is_allowed(name):
            raise BadQueryError(f"the function {name[:60]} is not taken", "docs/sql.md lists those that are")
    if "TABLE_FUNCTION" in plan or set(_READ.findall(plan)) - tables:
        raise BadQueryError("only the views can be read", _HINT)


def _written_by_engine(store: Store, sql: str) -> str:
    try:
        return str(store.scalar(f"SELECT formatQuerySingleLine({quote(sql)})"))
    except StoreError as error:
        raise BadQueryError(f"the SQL cannot be read: {_reason(error)}", _HINT) from error


def _reason(error: StoreError) -> str:
    """The engine's own words, without its codes and without our wrapping."""
    text = str(error).partition("DB::Exception: ")[2] or str(error)
    return text.partition(": In scope")[0].partition(" (line ")[0][:200]


def _tree(text: str) -> Node:
    """The tree that EXPLAIN AST printed. Lines that do not fit the counts of children would be a name with a line
    break in it: refused, so that no name can pass for a node."""
    lines = text.rstrip("\n").split("\n")
    position = 0

    def node_at(depth: int) -> Node:
        nonlocal position
        match = _NODE.fullmatch(lines[position]) if position < len(lines) else None
        if match is None or len(match["indent"]) != depth:
            raise BadQueryError("a name in the SQL is too odd", "use letters, digits and _ in names and aliases")
        position += 1
        node = Node(match["kind"], match["name"] or "", match["alias"] or "")
        node.children = [node_at(depth + 1) for _ in range(int(match["children"] or 0))]
        return node

    root = node_at(0)
    if position != len(lines):
        raise BadQueryError("a name in the SQL is too odd", "use letters, digits and _ in names and aliases")
    return root


def _inner(root: Node) -> Node:
    """What stands in the parentheses that we put around the text."""
    node = root
    for kind, place in (
        ("SelectWithUnionQuery", 0), ("ExpressionList", 0), ("SelectQuery", 1), ("TablesInSelectQuery", 0),
        ("TablesInSelectQueryElement", 0), ("TableExpression", 0),
    ):  # fmt: skip
        if node.kind != kind or len(node.children) != place + 1:
            raise BadQueryError("this is not only a SELECT", _HINT)
        node = node.children[place]
    if node.kind != "Subquery":
        raise BadQueryError("this is not only a SELECT", _HINT)
    return node


def _check(node: Node) -> None:
    """Refuse a node that is not allowed."""
    if node.kind not in _BARE and node.kind not in _NAMED:
        raise BadQueryError(_REFUSED.get(node.kind, f"{node.kind} is not taken"), _HINT)
    if node.kind == "TableExpression" and any(child.kind == "Function" for child in node.children):
        raise BadQueryError(f"table functions are not taken: {node.children[0].name[:60]}", _HINT)
    if node.kind == "TableIdentifier" and not re.fullmatch(r"[A-Za-z_]\w*", node.name):
        raise BadQueryError(f"{node.name[:60]} is not a view", _HINT)
    if node.kind == "Identifier" and not _NAME.fullmatch(node.name):
        raise BadQueryError(f"{node.name[:60]!r} is too odd a name", "use letters, digits and _ in names")
    if node.kind == "Function":
        if not is_allowed(node.name):
            raise BadQueryError(f"the function {node.name[:60]} is not taken", "docs/sql.md lists those that are")
        if _is_in(node):
            right = node.children[0].children[1]
            if right.kind == "Identifier" and "." in right.name:
                raise BadQueryError(f"IN {right.name[:60]}: only a view or a list", _HINT)
        if node.name.lower() in TYPED and not _TYPE.fullmatch(_last_argument(node).name):
            raise BadQueryError(
                f"{node.name} to {_last_argument(node).name[:60]} is not taken",
                "cast to numbers, text, dates, lists",
            )


def _is_in(node: Node) -> bool:
    return (
        node.kind == "Function"
        and node.name.lower() in IN_FUNCTIONS
        and len(node.children) > 0
        and len(node.children[0].children) == 2
    )


def _last_argument(call: Node) -> Node:
    arguments = call.children[0].children if call.children else []
    return arguments[-1] if arguments else Node("Literal")


def _pins(query: Node, view: str, column: str) -> set[str] | None:
    """What a SELECT that reads one view alone says its column must be."""
    places = [index for index, child in enumerate(query.children) if child.kind == "TablesInSelectQuery"]
    if len(places) != 1 or len(query.children[places[0]].children) != 1:
        return None
    read = next(
        node for node in query.children[places[0]].walk() if node.kind not in _BARE or node.kind == "Subquery"
    )
    if read.kind != "TableIdentifier" or read.name != view:
        return None
    for child in query.children[places[0] + 1 :]:
        if child.kind != "Function":
            break
        conditions = child.children[0].children if child.name == "and" else [child]
        for condition in conditions:
            found = _literals(condition, {column, f"{read.alias or view}.{column}"})
            if found is not None:
                return found
    return None


def _literals(condition: Node, names: set[str]) -> set[str] | None:
    """The texts that ``name = 'x'`` or ``name IN ('x', 'y')`` allows; None for any other condition."""
    if condition.kind != "Function" or condition.name not in ("equals", "in"):
        return None
    sides = condition.children[0].children
    if len(sides) != 2 or sides[0].kind != "Identifier" or sides[0].name not in names or sides[1].kind != "Literal":
        return None
    text = sides[1].name
    if match := _TEXT.fullmatch(text):
        return {match[1]}
    inside = re.fullmatch(r"(?:Tuple_\((.*)\)|Array_\[(.*)\])", text)
    if condition.name != "in" or inside is None:
        return None
    items = (inside[1] or inside[2] or "").split(", ")
    matches = [_TEXT.fullmatch(item) for item in items]
    return {match[1] for match in matches if match} if all(matches) else None
