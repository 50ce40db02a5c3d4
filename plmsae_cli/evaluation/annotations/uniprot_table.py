"""UniProtKB's tables as its REST interface writes them: one line a protein, one column a kind of feature."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.annotations.entries import Entry, Feature, cofactors, location, position

COLUMNS = {
    "ft_act_site": ("Active site", "ACT_SITE"),
    "ft_binding": ("Binding site", "BINDING"),
    "ft_disulfid": ("Disulfide bond", "DISULFID"),
    "ft_carbohyd": ("Glycosylation", "CARBOHYD"),
    "ft_lipid": ("Lipidation", "LIPID"),
    "ft_mod_res": ("Modified residue", "MOD_RES"),
    "ft_signal": ("Signal peptide", "SIGNAL"),
    "ft_transit": ("Transit peptide", "TRANSIT"),
    "ft_helix": ("Helix", "HELIX"),
    "ft_turn": ("Turn", "TURN"),
    "ft_strand": ("Beta strand", "STRAND"),
    "ft_coiled": ("Coiled coil", "COILED"),
    "ft_compbias": ("Compositional bias", "COMPBIAS"),
    "ft_domain": ("Domain [FT]", "DOMAIN"),
    "ft_motif": ("Motif", "MOTIF"),
    "ft_region": ("Region", "REGION"),
    "ft_zn_fing": ("Zinc finger", "ZN_FING"),
    "ft_topo_dom": ("Topological domain", "TOPO_DOM"),
    "ft_transmem": ("Transmembrane", "TRANSMEM"),
}
"""REST field -> the column's name in a download, and the feature key in its cells."""


def table_entries(path: Path, file: TextIO) -> Iterator[Entry]:
    """The proteins of the table; columns may have the names of downloads (`Domain [FT]`) or of fields (`ft_domain`).

    Raises:
        UserError: no accession or no sequence column, or a line with fewer cells than the header.
    """
    csv.field_size_limit(sys.maxsize)
    with file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        place = {name.strip(): index for index, name in enumerate(next(lines))}

        def column(*names: str) -> int | None:
            return next((place[name] for name in names if name in place), None)

        accession, sequence = column("Entry", "accession"), column("Sequence", "sequence")
        if accession is None or sequence is None:
            raise UserError(
                f"{path} has no column Entry or Sequence", "ask UniProt for the fields accession,sequence,ft_..."
            )
        features = [(key, at) for field, (title, key) in COLUMNS.items() if (at := column(title, field)) is not None]
        cofactor, pfam = column("Cofactor", "cc_cofactor"), column("Pfam", "xref_pfam")
        places = column("Subcellular location [CC]", "cc_subcellular_location")
        for number, cells in enumerate(lines, start=2):
            if not cells:
                continue
            if len(cells) <= max(at for at in (accession, sequence, *(at for _, at in features))):
                raise UserError(f"{path} line {number} has only {len(cells)} cells", "is the file cut short?")
            found = [feature for key, at in features for feature in cell_features(key, cells[at])]
            if cofactor is not None and cofactor < len(cells):
                found += cofactors(cells[cofactor])
            families = cells[pfam].split(";") if pfam is not None and pfam < len(cells) else []
            where = location(cells[places]) if places is not None and places < len(cells) else ""
            yield Entry(cells[accession], cells[sequence].upper(), tuple(found), tuple(f for f in families if f), where)


def cell_features(key: str, cell: str) -> list[Feature]:
    """The features of one cell: `DOMAIN 3..9; /note="SH3 1"; /evidence="..."; DOMAIN 20..30; ...`."""
    # Quoted values are consumed whole, so a key or a semicolon inside one is not taken for a feature.
    token = re.compile(rf'(?:^|(?<=[;\s])){key} ([^;\s]+)|/(\w+)="((?:[^"]|"")*)"')
    found: list[tuple[str, dict[str, str]]] = []
    for match in token.finditer(cell):
        if match[1] is not None:
            found.append((match[1], {}))
        elif found:
            found[-1][1].setdefault(match[2], match[3])
    features = []
    for text, values in found:
        if (ends := position(text)) is not None:
            features.append(Feature(key, *ends, note=values.get("note", ""), ligand=values.get("ligand", "")))
    return features
