"""`limits`: a plan beyond them is refused in words before anything runs, unless with `--yes`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.cli.limits import beyond, forecast
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.launching import Price
from plmsae_cli.runtime.task import Artifact, Plan, Task

TASK = Task("t", "embed", ("f",))
PLANS = [
    Plan(
        "embed",
        [TASK],
        {"a": Artifact("f", "k", False, 1, 3 * 10**12), "b": Artifact("g", "k", True, 1, 7)},
        {"hours": 5},
    ),
    Plan("shuffle", [TASK], {"a": Artifact("h", "k", False, 1, 10**12)}, {"layer-1": {"usd_requests": 1.5}}),
    Plan("optimize", [], {"a": Artifact("i", "k", True, 1, 10**15)}, {"layer-1": {"usd_requests": 99.0}}),
]


def test_the_forecast_is_hours_of_all_gpus_new_bytes_and_their_prices() -> None:
    found = forecast(PLANS, Price(gpu_hour=2.0, tb_day=0.5), gpus=8)
    assert (found.gpu_hours, found.bytes) == (40.0, 4 * 10**12)
    assert found.usd == pytest.approx(40 * 2.0 + 4 * 0.5 + 1.5)
    assert forecast(PLANS, Price(), gpus=0).usd == 1.5


def test_each_sentence_names_the_figure_and_the_limit() -> None:
    def told(**limits: Any) -> list[str]:
        body = {"embed": {"fasta": "x", "layers": [1]}, "price": {"gpu_hour": 2.0}, "limits": limits}
        return beyond(Experiment.model_validate(body), forecast(PLANS, Price(gpu_hour=2.0), gpus=8))

    assert told(gpu_hours=39.5) == ["40 GPU hours are predicted, limits.gpu_hours is 39.5"]
    assert told(bytes="3TB") == ["4 TB of data would be made, limits.bytes is 3 TB"]
    assert told(usd=80.0) == ["81.50 dollars are predicted, limits.usd is 80"]
    assert told(gpu_hours=40.0, bytes="4TB", usd=81.5) == []
    assert len(told(gpu_hours=0.0, bytes=1, usd=0.0)) == 3


def test_nothing_is_begun_beyond_a_limit_but_with_yes(
    plmsae: Callable[..., Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(evaluation="", data=tmp_path / "data", more="limits: {bytes: 10kB}\n")
    for verb in ("run", "embed", "validate"):
        refused = plmsae(verb, path)
        assert refused.code == 2, refused.err
        assert "limits.bytes is 10 kB" in refused.err
        assert "--yes" in refused.err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.safetensors"))
    assert plmsae("run", path, "--yes").code == 0
    assert plmsae("run", path).code == 0  # there is nothing left to make
    assert json.loads(plmsae("run", path, "--json").out)["queue"][0]["state"] == "skipped"

    # What is there already may do, and another setting have been meant.
    (there,) = (tmp_path / "data").glob("embed-*")
    for change, said in (
        (
            ("holdout: 0.1", "holdout: 0.2"),
            f"the nearest that is there, {there}, differs in embed.holdout: 0.1 -> 0.2\n",
        ),
        (("seed: 3", "seed: 4"), f"the nearest that is there, {tmp_path}/data/shuffle-"),
    ):
        path.write_text(path.read_text().replace(*change))
        refused = plmsae("run", path, "--set", "limits.bytes=1")
        assert refused.code == 2
        assert said in refused.err
        path.write_text(path.read_text().replace(*reversed(change)))


def test_dollars_need_prices() -> None:
    with pytest.raises(ValueError, match="without prices"):
        Experiment.model_validate({"embed": {"fasta": "x", "layers": [1]}, "limits": {"usd": 3}})
