"""Run `snakemake --lint` and fail on every finding but one.

The linter asks each rule for a conda environment or a container. The workflow uses one pinned
environment for Snakemake and `rad` together (docs/install.md), so that single title is allowed.
Snakemake 9.27 ignores `--lint json`, hence the reading of its text.

Try it: `python tests/lint_workflow.py`.
"""

from __future__ import annotations

import re
import subprocess
import sys

ALLOWED = frozenset({"Specify a conda environment or container for each rule."})
SUBJECT = re.compile(r"^Lints for (?P<subject>.+):$")
FINDING = re.compile(r"^    \* (?P<title>.+):$")


def findings(text: str) -> list[tuple[str, str]]:
    """(rule or file, title) of every finding in the linter's output."""
    found = []
    subject = "workflow"
    for line in text.splitlines():
        if match := SUBJECT.match(line):
            subject = match["subject"]
        elif match := FINDING.match(line):
            found.append((subject, match["title"]))
    return found


def main() -> int:
    """Exit status: 0 when nothing but the allowed title was found and the linter itself ran."""
    command = [sys.executable, "-m", "snakemake", "--lint"]
    process = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    output = process.stdout + process.stderr
    found = findings(output)
    remaining = [(subject, title) for subject, title in found if title not in ALLOWED]
    for subject, title in remaining:
        print(f"{subject}: {title}")
    # no finding and still an error: the workflow could not be read
    broken = process.returncode != 0 and not found
    if broken:
        print(output.strip())
    if remaining or broken:
        return 1
    print(f"snakemake --lint: clean ({len(found)} x the allowed container hint)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
