"""What the documentation says is still so: commands that are understood, links that lead somewhere, every setting."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from nnunet_diffusion.cli import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SCRIPT = re.compile(r"\bpython (benchmarks/\w+\.py)")


def commands(page: Path) -> list[str]:
    """The command lines of a page's code blocks; where a block has prompts, only those are commands."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        if language not in ("console", "bash"):
            continue
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        has_prompts = any(line.startswith("$ ") for line in lines)
        found += [line.removeprefix("$ ") for line in lines if line.startswith("$ ") or not has_prompts]
    return found


LINES = [(page.name, line) for page in PAGES for line in commands(page)]
BARE = [(page, line.removeprefix('eval "$(').split(')"')[0]) for page, line in LINES]
OWN = [(page, line) for page, line in BARE if line.startswith("nnunet_diffusion ") and " ... " not in line]


@pytest.mark.parametrize(("page", "line"), OWN, ids=lambda text: text[:60])
def test_the_command_line_understands_what_the_docs_say(page, line):
    arguments = shlex.split(line, comments=True)[1:]
    build_parser().parse_args(arguments)  # exits with a usage error if not


def test_every_command_is_in_the_docs():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in COMMANDS if f"nnunet_diffusion {name}" not in text] == []


def test_every_page_with_commands_is_run():
    """By tests/test_docs_run.py; CONTRIBUTING's are those of make."""
    run = re.findall(r'run_page\(\w+, "([\w/]+\.md)"', (ROOT / "tests" / "test_docs_run.py").read_text())
    assert {Path(name).name for name in run} == {page for page, _ in LINES} - {"CONTRIBUTING.md"}


def test_scripts_of_the_docs_are_there():
    named = {match[1] for _, line in LINES if (match := SCRIPT.search(line))}
    assert named and all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


def test_the_settings_page_is_what_the_classes_say():
    spec = importlib.util.spec_from_file_location("docs_settings", ROOT / "docs" / "settings.py")
    settings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(settings)
    assert settings.PAGE.read_text(encoding="utf-8") == settings.write(), "run python docs/settings.py"


def test_a_comment_beside_a_setting_is_its_description():
    spec = importlib.util.spec_from_file_location("docs_settings", ROOT / "docs" / "settings.py")
    settings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(settings)
    assert settings.comments(Example) == {"one": "first # still | first, and more", "two": "", "three": "third"}


class Example:
    """What the generator reads."""

    one: int = 1  # first # still | first,
    # and more
    two: str = "a # b"
    # a comment after two would be its own, an empty line ends it
    three: float = 3.0  # third
