"""Stage times of a finished run, as lines of results.jsonl.

    plmsae run experiments/quickstart.yaml
    python benchmarks/quickstart.py runs/quickstart --name quickstart --command "plmsae run experiments/quickstart.yaml"

Each line is the wall time of one stage as status.json recorded it, with what the stage did in the note.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True, help="prefix of the lines' names")
    parser.add_argument("--command", required=True, help="the command that made the run")
    parser.add_argument("--commit", help="default: this checkout's")
    options = parser.parse_args()

    def read(name: str) -> dict[str, object]:
        return json.loads((options.run / name).read_text())  # type: ignore[no-any-return]

    seconds = read("status.json")["stage_seconds"]
    about = read("environment.json")
    fidelity = read("eval/metrics.json")["fidelity"]
    last = json.loads([line for line in (options.run / "metrics.jsonl").read_text().splitlines() if "loss" in line][-1])
    assert isinstance(seconds, dict)
    assert isinstance(fidelity, dict)
    commit = (
        options.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    notes = {
        "train": f"{last['tokens']:,} tokens; held-out FVU {fidelity['fvu']:.4f} at L0 {fidelity['l0_mean']:.0f}",
        "eval": f"{fidelity['heldout_rows']:,} held-out rows, {fidelity['heldout_proteins']} proteins through the spliced model",
    }
    stamp = time.strftime("%Y-%m-%d")
    with RESULTS.open("a", encoding="utf-8") as file:
        for stage, value in seconds.items():
            line = {
                "name": f"{options.name}/{stage}",
                "who": "plmsae",
                "value": value,
                "unit": "s",
                "run": f"{options.name}-{stamp}-{commit}",
                "device": f"{about['device']}, {about['cpus']} cores",
                "date": stamp,
                "commit": commit,
                "command": options.command,
                "note": notes.get(stage, f"{fidelity['dead_window_tokens']:,} training rows"),
            }
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
