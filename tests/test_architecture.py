"""The rules of the package, read from its source: who imports whom, one operator in five places, what `import sprand` needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sprand import ops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sprand"
MODULES = sorted(PACKAGE.rglob("*.py"))
NATIVE_SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".inl", ".cpp", ".cu"))

# Rooms, from the operators up to the doors. A module of a room may import from its own and from the rooms it names.
ROOMS = {
    "ops": (
        "ops",
        "checks",
        "reference",
        "native",
        "host",
        "schedule",
        "schedule_run8",
        "selftest",
        "sharding",
        "topk",
        "tuning",
        "version",
        "_C",
        "_C_cuda",
        "_host",
    ),
    "core": ("pattern", "candidates", "functional", "layers", "optim", "optimizer_order"),
    "policy": ("config", "files", "forms", "states", "targets", "selection"),
    "assembly": (
        "model",
        "applying",
        "combining",
        "mixing",
        "frozen",
        "adapter",
        "adapter_file",
        "checkpoint",
        "dynamic",
        "exchange",
        "plots",
        "rates",
        "summary",
        "__init__",
    ),
    "doors": ("peft", "integrations", "serving", "cli", "__main__"),
}
MAY_IMPORT = {
    "ops": set(),
    "core": {"ops"},
    "policy": {"pattern", "topk"},
    "assembly": {"ops", "core", "policy"},
    "doors": {"ops", "core", "policy", "assembly"},
}
OPEN_TO_ALL = {"version"}


def name_of(path: Path) -> str:
    """The first name below `sprand`: `ops` for sprand/ops.py, `cli` for everything in sprand/cli."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def room_of(name: str) -> str:
    found = [room for room, names in ROOMS.items() if name in names]
    assert found, f"sprand/{name}: in which room is it? (ROOMS in {Path(__file__).name})"
    return found[0]


def imports_of(path: Path) -> set[str]:
    """All modules that a file imports, absolute, wherever in the file it does."""
    package = ("sprand", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = (
                ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module]))) if node.level else node.module
            )
            found |= {f"{origin}.{alias.name}" for alias in node.names} if origin == "sprand" else {origin}
    return found


def called(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=called)
def test_a_module_imports_only_what_its_room_may(path):
    room, known = room_of(name_of(path)), sum(ROOMS.values(), ())
    for module in imports_of(path):
        top, _, rest = module.partition(".")
        if top == "sprand":
            other = rest.partition(".")[0]
            if other not in known:
                assert room == "doors", f"{called(path)} imports from the package itself ({module}), which imports it"
                continue
            allowed = other in OPEN_TO_ALL | MAY_IMPORT[room] or room_of(other) in MAY_IMPORT[room] | {room}
            assert allowed, f"{called(path)} ({room}) imports {module} ({room_of(other)})"
        elif room != "doors":
            at_hand = top in sys.stdlib_module_names or top in ("torch", "safetensors")
            assert at_hand, f"{called(path)} imports {module}: only doors may need more than torch and safetensors"


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
    assert re.search(rf"^def {op}\(", (PACKAGE / "reference.py").read_text(), re.M)
    for folder in ("cuda",) if op in ops.CUDA_ONLY else ("cpu", "cuda"):
        text = "".join(path.read_text() for path in sorted((ROOT / "csrc" / folder).glob("*.cpp")))
        assert f'm.impl("{op}"' in text, f"csrc/{folder} registers no {op}"
    tests = "test_sddmm_run8.py" if op == "sddmm_run8" else "test_ops.py"
    assert re.search(rf"\b{op}\b", (ROOT / "tests" / tests).read_text())


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
