"""Writes limits.md: what the package refuses and what to do instead, read from the errors that its source raises."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "limits.md"
KINDS = ("ValueError", "TypeError", "NotImplementedError", "RuntimeError", "CliError")
GROUPS = {  # what a user does: the guide to it, and which files and words are about it; the first that fits
    "Quantized bases": ("guides/quantized.md", r"quantiz"),
    "Several devices, sharded and wrapped models": ("guides/distributed.md", r"\bsharded\b|DTensor|ZeRO|DataParallel|FSDP"),
    "Choosing what trains": ("guides/choosing.md", r"^(selection|layers)/|^adapters/(apply|disjoint)|SprandConfig"),
    "Training": ("guides/choosing.md", r"^training/"),
    "Adapters of a model": ("guides/merging.md", r"^adapters/"),
    "Checkpoints and other files": ("guides/merging.md", r"^(checkpoint|files)/"),
    "PEFT": ("guides/trainer.md", r"^peft/"),
    "Trainer, axolotl and vLLM": ("guides/trainer.md", r"^integrations/"),
    "Serving": ("guides/merging.md", r"^serving/"),
    "The command line": ("command_line.md", r"^cli/"),
    "Building blocks": ("api/building_blocks.md", r""),
}
MALFORMED = re.compile(
    "damaged|another copy|checksum|not finite|do not (agree|follow)|expected [^;]* got [^;]*$|expected sorted"
    "|no parameter that it|not UTF-8|not JSON|is empty|no rows|no column|cannot be read|could not (write|be fetched)"
    "|could be loaded|cannot be written|is the right|[Nn]o (file|directory|text)"
)
FILLED_IN = {"name", "path", "file", "folder", "code", "dtype", "strategy", "layout", "adapter_name", "head", "called", "to"}
SAYS_NO = re.compile(r"; |\b(cannot|could not|not|nothing|no|instead|only)\b")
ABOUT = """# Limits

## In short

- The CUDA kernels are compiled for sm_80, sm_90a and PTX without spilling a register, and run thread by thread on the CPU in the
  tests. On a GPU they were tested and measured on one H100 (`benchmarks/gpu_check.sh` does it on yours); nothing is known of
  other cards, nor of several GPUs.
- Single entries save time over LoRA, not memory: each takes 24 bytes in float32 (delta, gradient, two moments, index, base; in
  columns 20) where a LoRA weight takes 16. With few tokens LoRA is a little smaller, with many they are level
  ([memory](results.md#memory)).
- Layers other than linear ones and embeddings (convolutions, norms, recurrent layers, expert tensors) train through the dense
  gradient of that one tensor.
- Weights whose memory is not contiguous (`channels_last`) are refused. Second derivatives are not supported.
- `DynamicMask` does not see gradients of single entries inside of `torch.compile` (there `grow="random"` works), nor sharded
  weights.
- `sprand.peft` works with PEFT 0.21 and newer, whose hooks for methods from outside it needs: one without them is refused in a
  sentence, one that was never tested is warned of.
- Sharded models (FSDP2, ZeRO-3) are saved, disabled and resumed, but not merged or switched there; tensor parallelism is refused.

## What is refused

What sprand refuses, in the words of its errors, and what to do instead. Malformed and damaged input is left out; its
errors say what was expected and what came. The tables are read from the source by `python docs/write_limits.py`.
"""

Names = Mapping[str, ast.expr]


class Source:
    """The functions and string constants of the package, by name, and where functions are called.

    Args:
        folder: of the package.
    """

    def __init__(self, folder: Path) -> None:
        self.trees = {path.relative_to(folder).as_posix(): ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}
        self.calls: dict[str, list[tuple[ast.Call, Names]]] = defaultdict(list)
        self.defined = Counter[str]()
        self.returned: dict[str, ast.expr] = {}  # what a function that makes a text makes, as `name()`
        for tree in self.trees.values():
            names = dict(_assigned(tree.body))
            self.defined.update(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.defined.update(inner.name for inner in node.body if isinstance(inner, ast.FunctionDef))
                elif isinstance(node, ast.FunctionDef):
                    texts = [last.value for last in node.body if isinstance(last, ast.Return) and _is_text(last.value)]
                    self.returned |= {f"{node.name}()": text for text in texts}
                elif isinstance(node, ast.Call):
                    self.calls[ast.unparse(node.func).rpartition(".")[2]].append((node, names))

    def refusals(self) -> Iterator[tuple[str, str]]:
        """Each file and message of an error that it raises; one that a caller completes once for each caller."""
        for file, tree in self.trees.items():
            for function, node in _raised(tree):
                names = self.returned | dict(_assigned(tree.body)) | dict(_assigned(function.body if function else ()))
                for message in _messages(tree, node.exc.args[0]):
                    for given in self._callers(function, message):
                        yield file, _text(message, names | given)

    def _callers(self, function: ast.FunctionDef | None, message: ast.expr) -> Iterator[Names]:
        """What callers give for the parameters in a message; nothing where they give no text."""
        own = [argument.arg for argument in function.args.args if argument.arg != "self"] if function else []
        used = {node.id for node in ast.walk(message) if isinstance(node, ast.Name)} & {*own}
        all_given = []
        for call, names in self.calls[function.name] if used and self.defined[function.name] == 1 else ():
            given = dict(zip(own, call.args, strict=False)) | {keyword.arg: keyword.value for keyword in call.keywords}
            resolved = {name: names.get(ast.unparse(given[name]), given[name]) for name in used & given.keys()}
            texts = {name: value for name, value in resolved.items() if isinstance(value, ast.Constant)}
            all_given += [texts] if texts else []
        yield from all_given or [{}]


def _raised(tree: ast.AST, function: ast.FunctionDef | None = None) -> Iterator[tuple[ast.FunctionDef | None, ast.Raise]]:
    """Every refusal of a file, with the function that it stands in."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=kind), args=[_, *_])) if kind in KINDS:
                yield function, node
            case ast.FunctionDef():
                yield from _raised(node, node)
            case _:
                yield from _raised(node, function)


def _assigned(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """The names that a block gives texts to."""
    for statement in body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if _is_text(value):
                yield name, value
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                yield from ((name.id, value) for name, value in zip(names, values, strict=True) if _is_text(value))


def _is_text(node: ast.expr) -> bool:
    inner = node.body if isinstance(node, ast.IfExp) else node
    return isinstance(inner, ast.JoinedStr) or (isinstance(inner, ast.Constant) and isinstance(inner.value, str))


def _messages(tree: ast.Module, message: ast.expr) -> list[ast.expr]:
    """The message, or all that a function of the file may give as the message."""
    if isinstance(message, ast.Call) and isinstance(message.func, ast.Name):
        makers = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == message.func.id]
        return [node.value for maker in makers for node in ast.walk(maker) if isinstance(node, ast.Return)] or [message]
    return [message]


def _text(node: ast.expr, names: Names) -> str:
    """A message as a reader sees it: what is filled in stands as the name it has in the source, or as dots."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, names) for part in parts)
        case ast.BinOp(left=left, right=right):
            return _text(left, names) + _text(right, names)
        case ast.FormattedValue(value=value) | ast.IfExp(body=value):
            return _text(value, names)
        case ast.Call(func=ast.Name(id=name)) if f"{name}()" in names:
            return _text(names[f"{name}()"], {})
        case ast.Name(id=name) if name in names:
            return _text(names[name], {other: names[other] for other in names if other != name})
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in FILLED_IN:
            return f"*{name}*"
        case ast.Call(func=ast.Attribute(value=template, attr="format")):
            return _text(template, names).replace("{}", "…")
    return "…"


def rows(folder: Path) -> dict[str, list[str]]:
    """The rows of the tables by what a user does, sorted."""
    tables: dict[str, set[str]] = {group: set() for group in GROUPS}
    for file, message in Source(folder).refusals():
        if MALFORMED.search(message) or not SAYS_NO.search(message):
            continue
        group = next(name for name, (_, about) in GROUPS.items() if re.search(about, file) or re.search(about, message))
        text = re.sub("…[…*]*…", "…", re.sub(r"^(\*name\*|…|: )+(?=\w)", "", message)).removesuffix(".").replace("|", "\\|")
        what, instead = (re.fullmatch(r"(.*)(?:; |\. (?=[A-Z]))(.*)", text) or re.fullmatch("(.*)()", text)).groups()
        tables[group].add(f"| {what} | {instead} |")
    return {group: sorted(lines, key=str.casefold) for group, lines in tables.items() if lines}


def page(folder: Path = ROOT / "sprand") -> str:
    """The text of limits.md."""
    parts = [ABOUT]
    for group, lines in rows(folder).items():
        guide = GROUPS[group][0]
        title = (ROOT / "docs" / guide).read_text().partition("\n")[0].removeprefix("# ")
        parts += ["", f"### {group}", "", f"How it is done: [{title}]({guide}).", ""]
        parts += ["| refused | instead |", "|---|---|", *lines]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
