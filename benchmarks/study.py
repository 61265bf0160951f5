"""Wall and CPU time per stage of a finished study, from Snakemake's benchmark files.

python benchmarks/study.py results/nano
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(root: Path) -> None:
    """Print jobs, wall seconds and CPU seconds of every stage below `root`."""
    print(f"{'stage':<10} {'jobs':>5} {'wall s':>8} {'CPU s':>8} {'peak MiB':>9}")
    total = [0, 0.0, 0.0]
    for stage in sorted(path for path in (root / "benchmarks").iterdir() if path.is_dir()):
        records = [json.loads(file.read_text()) for file in stage.glob("*.jsonl")]
        wall, cpu = (sum(record[key] for record in records) for key in ("s", "cpu_time"))
        peak = max(float(record["max_rss"] or 0) for record in records)
        print(f"{stage.name:<10} {len(records):5} {wall:8.1f} {cpu:8.1f} {peak:9.0f}")
        total = [total[0] + len(records), total[1] + wall, total[2] + cpu]
    print(f"{'sum':<10} {total[0]:5} {total[1]:8.1f} {total[2]:8.1f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
