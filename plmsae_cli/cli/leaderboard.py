"""`ls --leaderboard`."""

from __future__ import annotations

from pathlib import Path

from plmsae_cli.cli.exits import DONE, checked
from plmsae_cli.cli.listing import require_root
from plmsae_cli.cli.show import print_json, table


def show_leaderboard(root: Path, track: str, as_json: bool) -> int:
    """Language-model runs, best first."""

    def work() -> int:
        from plmsae_cli.config.errors import UserError
        from plmsae_cli.runtime.leaderboard import TARGET_LOSS, TRACKS, leaderboard
        from plmsae_cli.runtime.progress import clock

        if track not in TRACKS:
            raise UserError(f"--leaderboard: there is no track {track}", f"one of: {', '.join(TRACKS)}")
        require_root(root, "ls")
        found = leaderboard(root, track)
        if as_json:
            print_json(track=track, runs=[entry.dump() for entry in found])
            return DONE
        if not found:
            asked = f"below its target loss ({TARGET_LOSS} unless it names one)" if track == "speed" else "validated"
            print(f"no language-model run in {root} was {asked} yet")
            return DONE
        rows = [
            [
                str(place),
                entry.run,
                "-" if entry.parameters is None else f"{entry.parameters:,}",
                entry.hardware,
                "-" if entry.seconds is None else clock(entry.seconds),
                "-" if entry.cost is None else f"{entry.cost:.2f}",
                f"{entry.loss:.4f}",
                "-" if entry.representations is None else f"{entry.representations:.3f}",
                entry.commit or "-",
            ]
            for place, entry in enumerate(found, start=1)
        ]
        print(table(rows, ["", "run", "parameters", "hardware", "time", "cost", "loss", "representations", "commit"]))
        return DONE

    return checked(work)
