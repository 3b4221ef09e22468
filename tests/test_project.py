"""What the project says of itself in several places is the same in all: versions, dates, tools, make targets, names of files."""

from __future__ import annotations

import datetime
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import sprand

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def versions() -> list[tuple[str, str]]:
    """Versions and dates of the changelog, in its order."""
    return re.findall(r"^## \[([^\]]+)\](?: - (.*))?$", read("CHANGELOG.md"), re.M)


def test_the_changelog_has_the_version_and_dates_in_order():
    (unreleased, none), *released = versions()
    assert (unreleased, none) == ("Unreleased", "")
    assert released[0][0] == sprand.__version__, "sprand/version.py: no entry of that version on top of CHANGELOG.md"
    numbers = [tuple(map(int, version.split("."))) for version, _ in released]
    dates = [datetime.date.fromisoformat(date) for _, date in released]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in released)
    assert all(len(number) == 3 for number in numbers)
    assert numbers == sorted(set(numbers), reverse=True) and dates == sorted(dates, reverse=True)


def test_the_changelog_has_the_usual_headings_only():
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", read("CHANGELOG.md"), re.M)) <= kinds


def test_the_citation_is_of_this_version():
    citation, released = yaml.safe_load(read("CITATION.cff")), dict(versions())
    assert citation["version"] == sprand.__version__
    assert str(citation["date-released"]) == released[sprand.__version__]
    assert citation["license"] == PROJECT["license"]
    papers = {reference["url"].rpartition("/")[2] for reference in citation["references"]}
    assert papers == {"2502.15975", "2412.13488"}


def test_pre_commit_has_the_tools_of_the_dev_extra():
    hooks = [hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    used = {pin for hook in hooks for pin in hook["additional_dependencies"]}
    of_dev = {pin for pin in PROJECT["optional-dependencies"]["dev"] if not pin.startswith("mypy")}
    assert used == of_dev and all("==" in pin for pin in used)


def test_nothing_that_git_ignores_is_tracked():
    """A build or an environment in a commit would take the place of everyone's own."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split() == []


def limits():
    spec = importlib.util.spec_from_file_location("write_limits", ROOT / "docs" / "write_limits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_limits_lists_every_refusal():
    """In whatever order a merge has left the rows."""
    written, now = read("docs/limits.md").splitlines(), limits().page().splitlines()
    assert sorted(written) == sorted(now), "an error is new or reads otherwise: run `python docs/write_limits.py`"


REFUSALS = """
ELSEWHERE = "use another place"
def refuse(what, instead):
    raise ValueError(f"{what}: expected a whole model, got a sharded one; {instead}")
def first(name, value):
    refuse("first", ELSEWHERE)
    if value is None:
        raise TypeError(_reason(name))
    raise ValueError(f"{name}: expected a number, got {value!r}")
def second(path):
    refuse("second", "do it before")
    how = "load it in 16 bits"
    raise NotImplementedError(f"{path} is quantized, " "and stays so; " + f"{how}")
def _reason(name):
    return f"{name}: these {len(name)} letters cannot be trained; write others"
"""


def test_limits_are_read_from_the_source_with_what_callers_say(tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "door.py").write_text(REFUSALS)
    assert limits().rows(tmp_path) == {
        "Quantized bases": ["| *path* is quantized, and stays so | load it in 16 bits |"],
        "Several devices, sharded and wrapped models": [
            "| first: expected a whole model, got a sharded one | use another place |",
            "| second: expected a whole model, got a sharded one | do it before |",
        ],
        "PEFT": ["| these … letters cannot be trained | write others |"],
    }


def commands(workflow: Path) -> list[str]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_what_a_developer_calls(workflow):
    assert commands(workflow)
    for command in commands(workflow):
        program, *arguments = command.split()
        assert (program == "make" and arguments[0] in TARGETS) or (ROOT / program).is_file(), command


def test_the_checks_run_the_commands_of_the_readme_as_printed():
    """An environment or options that only the checks have would hide what fails for a reader."""
    printed = re.findall(r"^(make (?:test|demo))\b", read("README.md"), re.M)
    assert sorted(printed) == ["make demo", "make test"]
    called = [line.strip() for line in read(".ci/run").splitlines() if re.search(r"\bmake (test|demo)\b", line)]
    assert 'section "Tests" make test' in called
    assert [line for line in called if re.search(r"(env|\w+=\S*) +make (test|demo)", line)] == []


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_issue_forms_ask_for_the_doctor(form):
    fields = yaml.safe_load(form.read_text())["body"]
    (doctor,) = (field for field in fields if field.get("id") == "doctor")
    assert "sprand doctor" in doctor["attributes"]["label"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_what_contributors_are_told_is_there(page):
    text = read(page)
    told = {target for targets in re.findall(r"`make ([a-z ]+)`", text) for target in targets.split()}
    told |= {
        target for block in re.findall(r"```\n(.*?)```", text, re.S) for target in re.findall(r"^make ([a-z]+)", block, re.M)
    }
    assert told and told <= TARGETS
    named = [word for word in re.findall(r"`([^`\s]+)`", text) if re.fullmatch(r"[\w./]+\.(py|toml|cff|md)|[\w./]+/", word)]
    rooms = (ROOT, ROOT / "sprand")
    assert [word for word in named if word != "dist/" and not any((room / word).exists() for room in rooms)] == []
    assert all((ROOT / link).is_file() for link in re.findall(r"\]\((\w[\w./]+\.md)\)", text))


def test_names_in_the_steps_of_contributing_exist():
    text = read("CONTRIBUTING.md")
    for name, file in {
        "ORACLES": "tests/test_selection.py", "OPTIONS": "tests/test_selection.py", "needs_none": "tests/test_selection.py",
        "SCHEMAS": "sprand/kernels/schemas.py", "ON_BLAS": "sprand/kernels/schemas.py",
        "_arguments": "sprand/kernels/selftest.py",
        "ROUNDED": "sprand/kernels/selftest.py", "sample_calls": "tests/test_ops.py",
        "run_every_operator": "tests/test_cuda_training.py",
    }.items():  # fmt: skip
        assert name in text and re.search(rf"\b{name}\b", read(file)), f"{name} in {file}"
