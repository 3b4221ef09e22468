"""Hooks of mkdocs: pages of files outside of docs/ (results, examples, CONTRIBUTING.md), and the texts of `sprand --help`."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
TOP = ("CHANGELOG", "CODE_OF_CONDUCT", "CONTRIBUTING", "SECURITY")
OUTSIDE = re.compile(rf"\]\((?:\.\./)((?:\.\./)*(?:benchmarks/|examples/|(?:{'|'.join(TOP)})\.md)[^)]*)\)")
EXAMPLE = re.compile(r"[.]py$")
HIDDEN = re.compile(r"^<!--- .*?-->\n", re.MULTILINE | re.DOTALL)
HELP = "<!-- sprand --help -->"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link the repository that this clone is of, where it knows that; a user's name in its address is left out."""
    asked = ["git", "-C", str(ROOT), "config", "--get", "remote.origin.url"]
    address = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip().removesuffix(".git")
    address = re.sub(r"^(?:ssh://)?git@([^:/]+)[:/]", r"https://\1/", address)
    if address.startswith("https://"):
        config.repo_url, config.repo_name = re.sub(r"//[^/@]*@", "//", address), "Repository"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to, under the path that it has in the repository."""
    top = [ROOT / f"{name}.md" for name in TOP]
    outside = [*top, ROOT / "benchmarks" / "README.md", *sorted((ROOT / "benchmarks" / "results").rglob("*"))]
    for path in outside:
        if path.suffix in (".md", ".png", ".csv"):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted((ROOT / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{path.stem}.md", content=example_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/ to the pages above, drop blocks that only the tests see, and put in the command line's help."""
    if page.file.src_uri.startswith("benchmarks/"):
        markdown = markdown.replace("../docs/", "../")
    elif page.file.src_uri in {f"{name}.md" for name in TOP}:
        markdown = markdown.replace("](docs/", "](")
    else:
        markdown = OUTSIDE.sub(lambda found: f"]({EXAMPLE.sub('.md', found[1])})", markdown)
    markdown = HIDDEN.sub("", markdown)
    return markdown.replace(HELP, command_line()) if HELP in markdown else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A notebook's links to pages, which its plugin leaves alone."""
    return re.sub(r'href="([a-z_/]+)[.]md"', r'href="\1.html"', html) if page.file.src_uri.endswith(".ipynb") else html


def example_page(path: Path) -> str:
    """A page that shows an example whole."""
    text = path.read_text()
    about = ast.get_docstring(ast.parse(text)) or ""
    return f"# {path.name}\n\n{about}\n\n```python\n{text}```\n"


def command_line() -> str:
    """The help of every command, as the parser prints it."""
    os.environ["COLUMNS"] = "100"
    from sprand.cli.main import build_parser

    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    texts = [("sprand", parser), *((f"sprand {name}", command) for name, command in commands.choices.items())]
    return "\n\n".join(f"## {name}\n\n```text\n{command.format_help()}```" for name, command in texts)
