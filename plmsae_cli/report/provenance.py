"""What a run was made from and with."""

from __future__ import annotations

from typing import Any

from plmsae_cli.report.reading import STAGE_ORDER, Run
from plmsae_cli.report.words import clean, count, shortened


def layer(run: Run) -> Any:
    """The layer that was explained, None where nothing says."""
    layers = run.asked("embed", "layers") or [None]
    for candidate in ((run.scores or run.dictionary).get("layer"), run.asked("train", "layer")):
        if candidate is not None:
            return candidate
    return layers[0] if len(layers) == 1 else None


def model(run: Run) -> str | None:
    """The language model that was explained, or trained; None where nothing says."""
    plm = run.asked("train", "plm")
    if run.asked("train", "kind") == "plm" and plm:
        shape = f"{plm.get('num_layers')} layers of width {plm.get('hidden_size')}"
        return f"{plm.get('architecture')}, {shape}" if plm.get("num_layers") else plm.get("architecture")
    if run.asked("train") is None and run.asked("embed") is None:
        return None  # it compares several, and trains or explains none
    if run.dictionary.get("weights", run) is None:
        return "not known: activations were imported"
    weights = run.asked("model", "weights")
    return None if weights is None else str(weights)


def provenance(run: Run) -> list[tuple[str, str]]:
    """What the run was made from and with, as (name, value)."""
    found: list[tuple[str, Any]] = [("model", model(run)), ("layer", layer(run))]
    digests = _digests(run.artifacts) | _digests(run.dictionary)
    found += [(f"{name} (sha256)", shortened(value)) for name, value in digests.items()]
    found.append(("proteins", run.asked("embed", "fasta") or run.asked("train", "plm", "fasta")))
    width = "" if run.num_latents is None else f", {count(run.num_latents)} latents"
    found.append(("dictionary", f"{run.architecture}{width}" if run.architecture else None))
    if imported := run.dictionary.get("imported"):
        found.append(("imported from", f"{imported['path']} ({imported['format']})"))
    fidelity = run.fidelity
    if fidelity.get("heldout_rows") is not None:
        proteins = fidelity.get("heldout_proteins")
        whose = "" if proteins is None else f" of {count(proteins)} held-out proteins"
        found.append(("scored on", f"{count(fidelity['heldout_rows'])} residues{whose}"))
    versions = run.environment.get("versions") or {}
    found.append(("device", run.environment.get("device")))
    found.append(("platform", run.environment.get("platform")))
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    found.append(("python", run.environment.get("python")))
    if commit := run.environment.get("commit"):
        changed = " with local changes" if run.environment.get("dirty") else ""
        found.append(("commit", shortened(commit) + changed))
    return [(clean(name, 40), clean(value, 400)) for name, value in found if value not in (None, "")]


def artifact_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """Stage, rows, key and folder of every artifact the run points to."""
    found = []
    for stage in sorted(run.artifacts, key=_place):
        facts = run.artifacts[stage]
        rows = facts.get("rows")
        found.append(
            (clean(stage, 40), "" if rows is None else count(rows), clean(facts.get("key") or "", 40),
             clean(facts.get("folder") or "", 400))
        )  # fmt: skip
    return found


def _place(stage: str) -> tuple[int, str]:
    base = stage.partition("-")[0]
    return (STAGE_ORDER.index(base) if base in STAGE_ORDER else len(STAGE_ORDER)), stage


def _digests(value: Any, name: str = "content") -> dict[str, str]:
    """Every text field called *sha256 below `value`: what it identifies -> the hash."""
    found: dict[str, str] = {}
    for key, each in value.items() if isinstance(value, dict) else ():
        if isinstance(each, dict):
            found |= _digests(each, key)
        elif isinstance(each, str) and key.endswith("sha256"):
            found[key.removesuffix("sha256").rstrip("_") or name] = each
    return found
