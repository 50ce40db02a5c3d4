"""Predicted steps beside those that were measured; `--dry-run` shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from plmsae_cli.config.sae import SAE
from plmsae_cli.config.training import Train
from plmsae_cli.runtime.device import known_gpu
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.sae.topk import TopK
from plmsae_cli.training.prediction import PLM_SHARE, StepShape, forecast, forecast_plm, step_seconds

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results.jsonl"
NOTE = re.compile(r"B ([\d,]+), d (\d+), n (\d+), k (\d+); ([\d.]+) ms a step in a row")


def newest() -> dict[str, dict[str, str]]:
    found = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if re.fullmatch(r"sae-step/S\d", row["name"]) and row["who"].startswith("plmsae"):
            found[f"{row['name']} {row['who']}"] = row
    return found


@pytest.mark.parametrize("shape", ["S1", "S2", "S3", "S4"])
def test_predicted_steps_are_near_the_measured_ones(shape: str) -> None:
    checked = 0
    for who, state_bytes in (("plmsae", 8), ("plmsae bf16 moments", 4)):
        row = newest()[f"sae-step/{shape} {who}"]
        gpu, note = known_gpu(row["device"].split(",")[0]), NOTE.search(row["note"])
        assert gpu is not None
        assert note is not None
        tokens, d, latents, k = (int(text.replace(",", "")) for text in note.groups()[:4])
        seconds = step_seconds(StepShape(tokens, d, latents, k, state_bytes), gpu, 1)
        assert seconds == pytest.approx(float(note[5]) / 1e3, rel=0.15)
        checked += 1
    assert checked == 2


def test_more_gpus_take_less_time_and_exchange_more() -> None:
    shape, linked, apart = StepShape(16_384, 2560, 20_480, 32, 8), known_gpu("NVIDIA H100"), known_gpu("NVIDIA L40S")
    assert linked is not None
    assert apart is not None
    one, eight = (step_seconds(shape, linked, gpus) for gpus in (1, 8))
    assert one is not None
    assert eight is not None
    assert one / 8 < eight < one / 2
    assert (step_seconds(shape, apart, 8) or 0) > 4 * eight, "PCIe is slow"


def test_the_forecast_says_hours_and_dollars() -> None:
    options = Train(sae=SAE(num_latents=20_480, k=32), batch_tokens=16_384)
    said = forecast(TopK(2560, 20_480, 32), options, 1000, 5120, ("NVIDIA H100 80GB HBM3", 2), 3.0)
    assert re.fullmatch(
        r"[\d.]+ s on 1 x NVIDIA H100 80GB HBM3 \(\$[\d.]+\), [\d.]+ s on 2 x .* \(\$[\d.]+\), [\d.]+ s on 8 x .* \(\$[\d.]+\)",
        said["predicted"],
    )
    assert " s on 1 x NVIDIA H100," in forecast(TopK(64, 128, 4), options, 10, 128, None, None)["predicted"]
    long = forecast(TopK(2560, 20_480, 32), options, 10**7, 5120, None, None)["predicted"]
    assert re.match(r"\d+\.\d h on 1 x NVIDIA H100, ", long)
    assert forecast(TopK(64, 128, 4), options, 10, 128, ("Unknown card", 1), None) == {}
    jump = Train(sae=SAE(architecture="jumprelu", num_latents=128, target_l0=4))
    assert forecast(JumpReLU(64, 128), jump, 10, 128, None, None) == {}


def test_a_language_models_time_is_its_operations_over_a_share_of_the_peak() -> None:
    found = forecast_plm(1e9, 10**10, ("NVIDIA H100 80GB HBM3", 2), 3.0)
    seconds = 1e19 / (PLM_SHARE * 989.4e12)
    assert f"{seconds / 3600:.1f} h on 1 x" in found["predicted"]
    assert f"(${seconds / 3600 * 3:,.2f})" in found["predicted"], "as many GPU hours cost as much"
    assert "on 2 x" in found["predicted"]
    assert "on 8 x" in found["predicted"]
    assert forecast_plm(1e9, 10**10, ("Some GPU", 1), None) == {}
