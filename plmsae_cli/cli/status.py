"""`status`: how far one run is, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plmsae_cli.cli.exits import DONE, checked
from plmsae_cli.cli.show import dollars, print_json, size


def show_status(run: Path, as_json: bool) -> int:
    """One run: state, stage, times, last metrics, figures."""

    def work() -> int:
        from plmsae_cli.report.table import summary
        from plmsae_cli.runtime.foretold import compared, cost
        from plmsae_cli.runtime.processes import live_state, state_words
        from plmsae_cli.runtime.results import best_trial, last_metrics
        from plmsae_cli.runtime.run_folder import find_run, read_json

        folder = find_run(run)
        status = read_json(folder / "status.json") or {}
        if live_state(status) != "running":
            status.pop("waiting", None)
        told = compared(folder, status.get("stage_seconds", {}))
        last, best = last_metrics(folder), best_trial(folder)
        usd = cost(folder, status.get("stage_seconds", {}))
        if as_json:
            body = {
                "run": str(folder),
                **status,
                "state": live_state(status),
                "last": last,
                "compared": told,
                "usd": usd,
            }
            print_json(**body, **({"best": best._asdict()} if best else {}))
            return DONE
        print(f"{folder}: {state_words(status)}" + (f", in {status['stage']}" if status.get("stage") else ""))
        if status.get("waiting"):
            print(f"  {status['waiting']}")
        if status.get("together", 1) > 1:
            print(f"  trains with {status['together'] - 1} other SAE(s) on one reading of the dataset")
        if counts := _trial_states(folder):
            print("  trials: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
        for line in best_line(folder):
            print(f"  {line}")
        if status.get("error"):
            print(f"  error: {status['error']}")
        if last:
            print("  last: " + ", ".join(f"{k} {v:.5g}" for k, v in last.items() if isinstance(v, (int, float))))
        for name, value in summary(folder):
            print(f"  {name}: {value}")
        for line in foretold_lines(folder):
            print(f"  {line}")
        return DONE

    return checked(work)


def best_line(folder: Path) -> list[str]:
    """Of a sweep that has one: the trial that is ahead."""
    from plmsae_cli.runtime.results import best_trial

    best = best_trial(folder)
    return [f"best by {best.metric}: {best.value:.5g}, {_point(best.values)} (trials/{best.hash})"] if best else []


def _point(values: Mapping[str, Any]) -> str:
    from plmsae_cli.config.tree import plain

    return ", ".join(f"{name.rpartition('.')[2]}={plain(value)}" for name, value in values.items())


def foretold_lines(folder: Path) -> list[str]:
    """Of each stage what was predicted beside what it came to, and where a price was set what all came to."""
    from plmsae_cli.runtime.foretold import compared, cost
    from plmsae_cli.runtime.run_folder import read_json

    spent = (read_json(folder / "status.json") or {}).get("stage_seconds", {})
    told = compared(folder, spent)
    lines = [f"{s}: predicted {_words(t['predicted'])}; came to {_words(t['measured'])}" for s, t in told.items()]
    usd = cost(folder, spent)
    return lines if usd is None else [*lines, f"cost: {dollars(usd)}"]


def _words(figures: dict[str, float]) -> str:
    """12 s, 3.1 GB a GPU, $0.40"""
    from plmsae_cli.report.words import seconds

    found = [seconds(figures["seconds"])] if "seconds" in figures else []
    found += [f"{size(figures['memory'])} a GPU"] if "memory" in figures else []
    found += [dollars(figures["usd"])] if "usd" in figures else []
    return ", ".join(found)


def _trial_states(folder: Path) -> dict[str, int]:
    """How many trials of a sweep are in which state, those that have not begun as pending; empty for other runs."""
    from plmsae_cli.runtime.processes import live_state
    from plmsae_cli.runtime.run_folder import read_json

    sweep = read_json(folder / "sweep.json")
    counts: dict[str, int] = {}
    for trial in [] if sweep is None else sweep["trials"]:
        status = read_json(folder / "trials" / trial["hash"] / "status.json")
        state = "pending" if status is None else live_state(status)
        counts[state] = counts.get(state, 0) + 1
    return counts
