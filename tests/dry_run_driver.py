"""Dry-runs studies one after another in this process and prints how many jobs each rule has.

    python tests/dry_run_driver.py FOLDER study.yaml study.yaml,overlay.yaml ...

Before each study stands a line `=== study.yaml,overlay.yaml`; the job table is Snakemake's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from snakemake.api import SnakemakeApi
from snakemake.settings.enums import Quietness
from snakemake.settings.types import ConfigSettings, OutputSettings, ResourceSettings

ROOT = Path(__file__).resolve().parent.parent


def main(folder: Path, studies: list[str]) -> None:
    """Plan every study in `folder`; the first fault is raised."""
    for study in studies:
        print(f"=== {study}", file=sys.stderr, flush=True)
        files = [ROOT / "config" / name for name in study.split(",")]
        quiet = {Quietness.RULES, Quietness.REASON, Quietness.HOST}
        with SnakemakeApi(OutputSettings(quiet=quiet)) as api:
            workflow = api.workflow(
                resource_settings=ResourceSettings(cores=1),
                config_settings=ConfigSettings(configfiles=files),
                snakefile=ROOT / "Snakefile",
                workdir=folder,
            )
            workflow.dag().execute_workflow(executor="dryrun")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
