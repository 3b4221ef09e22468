"""The rules of the package, read from its source: who imports whom, one operator in five places, what `import sprand` needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sprand
from sprand.kernels import ops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sprand"
MODULES = sorted(PACKAGE.rglob("*.py"))
NATIVE_SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".inl", ".cpp", ".cu"))

# Rooms are the folders of the package. A room imports only rooms left of it; those between two signs do not import each other.
ORDER = "kernels, files < layers < selection < adapters < training, checkpoint < peft, serving < integrations, cli"
FLOORS = [floor.split(", ") for floor in ORDER.split(" < ")]
TOP = ("__init__", "__main__")  # above all rooms
OPEN_TO_ALL = ("version",)
NATIVE = ("_C", "_C_cuda", "_host")  # the compiled modules, below all rooms
DOORS = ("peft", "serving", "integrations", "cli")  # may need more than torch and safetensors


def room_of(name: str) -> str:
    """The room of a dotted name below `sprand`: `layers` for `layers.module`; `__init__` for the package itself."""
    return name.partition(".")[0] or "__init__"


def floor_of(room: str) -> int:
    if room in OPEN_TO_ALL:
        return -1
    if room in TOP:
        return len(FLOORS)
    if room in NATIVE:
        return -1
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"sprand/{room}: no room of that name; there are {ORDER}"
    return found[0]


def origin_of(path: Path, node: ast.ImportFrom) -> str:
    """The module that a statement imports from, absolute."""
    package = ("sprand", *path.relative_to(PACKAGE).parts[:-1])
    return ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module]))) if node.level else node.module


def imports_of(path: Path) -> set[str]:
    """All modules that a file imports, absolute, wherever in the file it does."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = origin_of(path, node)
            modules |= {f"{origin}.{alias.name}" for alias in node.names} if origin == "sprand" else {origin}
    return modules


def called(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_newcomers_read_the_same_rule():
    assert f"    {ORDER}\n" in (ROOT / "CONTRIBUTING.md").read_text()
    listed = re.findall(r"^    ((?:\w+, )*\w+)   +\S", sprand.__doc__, re.M)
    assert [line.split(", ") for line in listed] == FLOORS
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders == {room for floor in FLOORS for room in floor}


@pytest.mark.parametrize("path", MODULES, ids=called)
def test_a_room_imports_only_rooms_left_of_it(path):
    own = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    names = set(sprand.__all__)
    for module in imports_of(path):
        top, _, rest = module.partition(".")
        if top == "sprand":
            if own not in TOP and (not rest or rest in names):
                assert own in ("integrations", "cli"), (
                    f"{called(path)} imports from the package itself ({module}), which imports it"
                )
                continue
            other = room_of(rest)
            assert other == own or floor_of(other) < floor_of(own), f"{called(path)} imports {module}: expected {ORDER}"
        elif own not in DOORS:
            at_hand = top in sys.stdlib_module_names or top in ("torch", "safetensors")
            assert at_hand, f"{called(path)} imports {module}: only doors may need more than torch and safetensors"


@pytest.mark.parametrize("path", MODULES, ids=called)
def test_no_room_reads_what_is_private_to_another(path):
    """An underscore is for the own room: neither imported nor asked for by `getattr` from elsewhere."""
    own = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            origin = origin_of(path, node)
            private = [alias.name for alias in node.names if re.match("_[^_]", alias.name) and alias.name not in NATIVE]
            outside = origin.startswith("sprand") and room_of(origin.removeprefix("sprand").removeprefix(".")) != own
            assert not (private and outside), f"{called(path)} imports {', '.join(private)} of {origin}"


OURS = re.compile(r"_sprand")  # how an attribute starts that we put on a user's model or module


def marks_of(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Our attributes that a file names, by an access or as text, and whether it is their owner: one that sets or defines them."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, ctx=context):
                yield name, isinstance(context, ast.Store)
            case ast.Constant(value=str(name)):
                yield name, False
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.FunctionDef(name=name):
                yield name, True


def test_only_its_room_reads_what_is_put_on_a_users_module():
    used, owned = {}, {}
    for path in MODULES:
        room = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        for name, owner in marks_of(ast.parse(path.read_text())):
            if OURS.match(name):
                used.setdefault(name, set()).add(room)
                if owner:
                    owned.setdefault(name, set()).add(room)
    shared = {name: rooms for name, rooms in used.items() if len(rooms) > 1}
    strangers = {name: sorted(rooms - owned.get(name, set())) for name, rooms in shared.items()}
    assert used and not any(strangers.values()), f"private to other rooms: {strangers}"


def test_kernels_know_tensors_only():
    for path in NATIVE_SOURCES:
        includes = re.findall(r'#include [<"]([^>"]+)', path.read_text())
        torch_headers = [name for name in includes if name.startswith(("torch/", "ATen/", "c10/"))]
        stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/")
        assert all(name.startswith(stable) for name in torch_headers), f"{called(path)}: only the stable ABI of LibTorch"
        if path.suffix == ".cu" or "host" in path.parts:
            assert not torch_headers, f"{called(path)} includes {torch_headers}"


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_one_operator_is_one_name_in_five_places(op):
    assert hasattr(ops, op)
    assert re.search(rf"^def {op}\(", (PACKAGE / "kernels" / "reference.py").read_text(), re.M)
    for folder in sorted({"cpu", "cuda"} - set(ops.ON_BLAS.get(op, ()))):
        text = "".join(path.read_text() for path in sorted((ROOT / "csrc" / folder).glob("*.cpp")))
        assert f'm.impl("{op}"' in text, f"csrc/{folder} registers no {op}"
    assert re.search(rf"\b{op}\b", (ROOT / "tests" / "test_ops.py").read_text())


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "tests").glob("*.py")), *NATIVE_SOURCES], ids=called)
def test_a_file_says_its_job_and_stays_short(path):
    lines = path.read_text().splitlines()
    if path.suffix == ".py":
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    else:
        first = lines[0].removeprefix("//").strip() if lines and lines[0].startswith("//") else ""
    assert len(first) > 15, f"{called(path)}: the first line says what the file is for"
    assert len(lines) <= 400, f"{called(path)}: {len(lines)} lines; a file has 60 to 300, 400 at most"


@pytest.mark.parametrize("path", MODULES, ids=called)
def test_nothing_is_pickled(path):
    """Files are safetensors and JSON: reading one runs no code of whoever wrote it."""
    tree = ast.parse(path.read_text())
    modules = {module.partition(".")[0] for module in imports_of(path)}
    assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {"torch.save", "torch.load", "np.load", "numpy.load", "np.save", "numpy.save"} & set(calls)
    assert "weights_only" not in path.read_text() and "allow_pickle" not in path.read_text()


IMPORT_WITH_LITTLE = """
import sys
import safetensors.torch, torch
class Closed:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("sprand", "torch", "safetensors"):
            raise ModuleNotFoundError(f"import sprand asked for {name}")
sys.meta_path.insert(0, Closed())
import sprand
"""


def test_import_needs_torch_and_safetensors_and_prints_nothing():
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT_WITH_LITTLE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
