"""What the pages say is what the code has: made pages are up to date, links lead somewhere, commands parse."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lens
from lens.cli.main import build_parser
from lens.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
COMMAND = re.compile(r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*lens (.+?)(?:\s{2,}#.*|\s+[|>&].*)?$", re.M)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_pages_made_from_the_code_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nif this is meant: python docs/reference.py"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        there = page.parent / path if path else page
        assert there.exists(), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{name_of(page)}: {target}"


def anchors(page: Path) -> set[str]:
    """The names by which headings of a page are reached."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_taken(parser: argparse.ArgumentParser, words: list[str]) -> bool:
    try:
        parser.parse_args(words)
    except SystemExit as ended:
        return ended.code == 0
    return True


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_shown_is_one_that_lens_takes(page: Path) -> None:
    parser = build_parser()
    for kind, block in BLOCK.findall(page.read_text()):
        if kind not in ("", "sh", "bash") or "[OPTIONS]" in block:
            continue
        for words in COMMAND.findall(block):
            if any(mark in words for mark in ("…", "...")) or words.split()[0].isupper():
                continue
            assert is_taken(parser, shlex.split(words.replace("PID", "1"))), f"{name_of(page)}: lens {words}"


def test_every_public_function_has_its_place_on_a_page() -> None:
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("hook.md", "reading.md"))
    assert [name for name in lens.__all__ if f"lens.{name}(" not in pages] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_setting_named_exists(page: Path) -> None:
    known = {f"LENS_{name.upper()}" for name in Settings.__dataclass_fields__} | {
        "LENS_CONFIG",
        "LENS_AUTOLOAD",
        "LENS_ATTACH",
        "LENS_CLICKHOUSE_URL",  # of the tests
    }
    named = set(re.findall(r"\bLENS_[A-Z_]+\b", page.read_text()))
    assert named <= known
