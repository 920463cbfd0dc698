"""
Functions in Python files, found by `ast`: to blank them, to replace them, to take them from what a
student hands in, and to see whether one file repeats a formula of another. Nothing here runs any code.

A function is named as in "heun_step" or "DisCoDiff.forward". Files are given as their text.
"""

import ast
import builtins
import json
import textwrap

FUNCTIONS = (ast.FunctionDef, ast.ClassDef)


class Wrong(Exception):
    """What is wrong with an answer, in words for the student."""


def find(tree, name):
    """-> the node of this function in a parsed file, None if there is none"""
    for part in name.split("."):
        tree = next((node for node in tree.body if isinstance(node, FUNCTIONS) and node.name == part), None)
        if tree is None:
            return None
    return tree


def lines_of(text, name):
    """-> lines of a file, the function's node, and where its first line (of decorators), its body and its end are"""
    node = find(ast.parse(text), name)
    if node is None:
        raise LookupError(f"there is no {name}")
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    return text.splitlines(), node, first, node.body[0].lineno - 1, node.end_lineno


def text_of(text, name):
    """The text of a function, as it stands in its file."""
    lines, _, first, _, end = lines_of(text, name)
    return "\n".join(lines[first:end])


def with_function(text, name, function):
    """The file's text with another text for this function."""
    lines, _, first, _, end = lines_of(text, name)
    return "\n".join([*lines[:first], function, *lines[end:], ""])


def edited(text, name, edits):
    """The file's text with pieces of a function replaced: [(old, new)]. Raises LookupError unless old is there once."""
    function = text_of(text, name)
    for old, new in edits:
        if function.count(old) != 1:
            raise LookupError(f"{name} has {old!r} {function.count(old)} times, not once")
        function = function.replace(old, new)
    return with_function(text, name, function)


def statements(node):
    """The body of a function without its docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def blanked(text, name, message):
    """The file's text with this function's body replaced by an exception. Signature and docstring stay."""
    lines, node, first, body, _ = lines_of(text, name)
    if statements(node) is not node.body:
        body = node.body[0].end_lineno
    raises = f"{' ' * (node.col_offset + 4)}raise NotImplementedError({json.dumps(message)})"
    return with_function(text, name, "\n".join([*lines[first:body], raises]))


def parsed(text, name="the file"):
    """-> the parsed file. Raises Wrong if Python can't read it."""
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise Wrong(f"{name}, line {error.lineno}: {error.msg}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise Wrong(f"{name} can't be read: {type(error).__name__}") from None


def read_answer(file):
    """The parsed file that a student handed in."""
    try:
        return parsed(file.read_text(encoding="utf-8-sig"), file.name)
    except UnicodeDecodeError:
        raise Wrong("the submission is not a text file in UTF-8") from None


def in_their_class(name, function):
    """A function's text as it is handed in: a method below the line of its class."""
    owner, _, _ = name.rpartition(".")
    function = textwrap.dedent(function)
    return f"class {owner}:\n{textwrap.indent(function, '    ')}" if owner else function


def answered(text, name, answer):
    """The file's text with the body that `answer`, a parsed file, has for this function.

    Everything else, the signature too, stays as it is. A class may appear several times in the answer.
    Raises Wrong if the function is missing or has other arguments.
    """
    lines, node, first, body, _ = lines_of(text, name)
    owner, _, method = name.rpartition(".")
    places = [answer] if not owner else [c for c in answer.body if isinstance(c, ast.ClassDef) and c.name == owner]
    given = next((found for place in places if (found := find(place, method))), None)
    if not isinstance(given, ast.FunctionDef):
        raise Wrong(f"there is no {name}")
    if arguments(given) != arguments(node):
        raise Wrong(f"{name} takes ({arguments(given)}): keep the arguments of the hand-out, ({arguments(node)})")
    written = "\n".join(map(ast.unparse, statements(given))) or "pass"
    written = textwrap.indent(written, " " * (node.col_offset + 4))
    return with_function(text, name, "\n".join([*lines[first:body], written]))


def arguments(node):
    """The names of a function's arguments, with their stars."""
    a = node.args
    starred = [f"{star}{arg.arg}" for star, arg in (("*", a.vararg), ("**", a.kwarg)) if arg]
    return ", ".join([*(arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)), *starred])


NUMERICS = {"torch", "numpy", "math", "functools", "itertools"}  # what an answer may import
SUSPICIOUS = {"os", "sys", "open", "exec", "eval", "compile", "globals", "locals", "vars", "getattr", "setattr",
              "delattr", "modules", "save", "load", "tofile", "fromfile", "memmap", "f_back", "gi_frame"}


def suspicious(answer):
    """What a parsed answer uses that numerics does not need: modules, names, attributes, and those that it sets."""
    used = set()
    for part in ast.walk(answer):
        if isinstance(part, ast.Import):
            used |= {alias.name.split(".")[0] for alias in part.names} - NUMERICS
        elif isinstance(part, ast.ImportFrom):
            used |= {(part.module or "").split(".")[0]} - NUMERICS
        elif isinstance(part, ast.Name) and (part.id in SUSPICIOUS or part.id.startswith("__")):
            used.add(part.id)
        elif isinstance(part, ast.Attribute) and (
                part.attr in SUSPICIOUS or part.attr.startswith("_") or not isinstance(part.ctx, ast.Load)):
            used.add(part.attr)
    return sorted(used)


def names_in(text):
    """The names that a file defines or imports at its top level, builtins among them."""
    names = {*dir(builtins), "__file__"}
    for node in ast.parse(text).body:
        if isinstance(node, FUNCTIONS):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names


def names_used(node):
    """The names that a function reads, and doesn't define itself."""
    read, own = set(), set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            (read if isinstance(part.ctx, ast.Load) else own).add(part.id)
        elif isinstance(part, ast.arg):
            own.add(part.arg)
        elif isinstance(part, (*FUNCTIONS, ast.ExceptHandler)) and part.name:
            own.add(part.name)
        elif isinstance(part, ast.alias):
            own.add((part.asname or part.name).split(".")[0])
    return read - own


# ----------------------------------------------------------------------------------------------------
# does one file repeat a formula of another?

SIZE = 12  # of the smallest formula that counts, in nodes of its tree


def terms(node, operation):
    """The terms of a sum, or the factors of a product: a * (b * c) has three."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, operation):
        return [*terms(node.left, operation), *terms(node.right, operation)]
    return [node]


def formulas(function):
    """The larger expressions in a function, without their names, sums and products in a fixed order.

    -> {this form: a node that has it}
    """
    found = {}

    def normal(node):
        """-> form, size; notes those of the node and all below it"""
        if isinstance(node, ast.Name):
            return "_", 1
        if isinstance(node, ast.Constant):
            return repr(node.value), 1
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and isinstance(
                node.slice, (ast.Constant, ast.UnaryOp)):
            return "_", 1  # an entry is as good as a name
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
            parts = sorted(normal(part) for part in terms(node, type(node.op)))
            parts.insert(0, (type(node.op).__name__, 1))
        else:
            parts = [normal(child) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)]
        size = 1 + sum(size for _, size in parts)
        kind = type(node).__name__ + (f".{node.attr}" if isinstance(node, ast.Attribute) else "")
        form = f"{kind}({','.join(text for text, _ in parts)})"
        if size >= SIZE and isinstance(node, (ast.expr, ast.Assign, ast.AugAssign, ast.Return)):
            found[form] = node
        return form, size

    normal(function)
    return found


def repeats(answers, texts):
    """Where do files repeat a formula of an answer?

    answers: nodes of functions; texts: {file: text}. -> ["file: function: its largest such formula"]
    """
    secret, found = {form for node in answers for form in formulas(node)}, []
    for file, text in texts.items():
        tree = ast.parse(text)
        inside = [(f"{c.name}.{f.name}", f) for c in tree.body if isinstance(c, ast.ClassDef)
                  for f in c.body if isinstance(f, ast.FunctionDef)]
        for name, node in [*((f.name, f) for f in tree.body if isinstance(f, ast.FunctionDef)), *inside]:
            if same := [ast.unparse(part) for form, part in formulas(node).items() if form in secret]:
                found.append(f"{file}: {name}: {max(same, key=len)}")
    return found
