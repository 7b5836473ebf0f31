"""Real programs without a line of lens, under ``lens run``, in one run: recorded right, and left as they were?

Each row is a test of tests/hooks/test_unprepared.py or test_frameworks.py: it runs its program alone and under lens, in
real processes, and compares exit codes, output bit by bit and what was recorded. Takes some minutes; needs `pip install
'mistrallens[prove]'` for the programs that use a framework.

    python benchmarks/real_programs.py [--json] [--out docs/proofs/lens_run.md]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "trl", "lightning", "megatron-core")
TESTS = ("tests/hooks/test_unprepared.py", "tests/hooks/test_frameworks.py")
Row = tuple[str, str, float]


def run(report: Path) -> int:
    """All tests of the files, long or not; the exit code of pytest."""
    command = [sys.executable, "-m", "pytest", *TESTS, "-m", "long or not long"]
    return subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=False).returncode


def rows_of(report: Path) -> list[Row]:
    """Name, outcome and seconds of each test."""
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name = case.get("name", "").removeprefix("test_").replace("_", " ").replace("[", ": ").rstrip("]")
        rows.append((name, outcomes[0] if outcomes else "passed", float(case.get("time", 0))))
    return rows


def document(rows: list[Row]) -> str:
    """The table with how it was made."""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("python", *PACKAGES))
    passed = sum(outcome == "passed" for _, outcome, _ in rows)
    head = (
        "# Real programs under lens run\n\n"
        f"`make prove-run`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores; {versions}. "
        "Every row is one test of `tests/hooks/test_unprepared.py` or `test_frameworks.py`: a program without a line of "
        "lens, run alone and under `lens run`, by frameworks also with the one line of a callback.\n\n"
        f"**{passed} of {len(rows)} passed, in one run.**\n\n| test | outcome | |\n|---|---|---|\n"
    )
    return head + "".join(f"| {name} | {outcome} | {seconds:.0f} s |\n" for name, outcome, seconds in rows)


def _version(package: str) -> str:
    if package == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run(report)
        rows = rows_of(report)
    if arguments.out:
        arguments.out.write_text(document(rows))
    if arguments.json:
        print(json.dumps({"tests": [dict(zip(("name", "outcome", "seconds"), row, strict=True)) for row in rows]}))
    return code


if __name__ == "__main__":
    sys.exit(main())
