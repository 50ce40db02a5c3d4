"""Where published inputs are: one table of addresses, with what their publishers say of sizes and checksums."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.download import Checksum, length

ESM2_URL = "https://dl.fbaipublicfiles.com/fair-esm/models"
ESM2_HEAD_URL = "https://dl.fbaipublicfiles.com/fair-esm/regression"
ESM2_HEAD = "-contact-regression.pt"
"""The contact head of a model is published beside it, under its name and this."""
UNIPROT_URL = "https://ftp.uniprot.org/pub/databases/uniprot/current_release"
REST_URL = "https://rest.uniprot.org/uniprotkb/stream"
HUB_URL = "https://huggingface.co"
TOKENS = "Synthyra/{}_packed"
"""Data sets of token files on the hub, by their name: a file for about 100 million tokens."""
ESMFOLD = "facebook/esmfold_v1"

MIRROR = "PLMSAE_MIRROR"
"""Environment variable: an address below which every published one stands as HOST/PATH."""
_TIMEOUT = 30.0
_FIELDS = (
    "accession,id,protein_name,organism_name,length,sequence,cc_cofactor,xref_pfam,ft_act_site,ft_binding,ft_disulfid,"
    "ft_carbohyd,ft_lipid,ft_mod_res,ft_signal,ft_transit,ft_helix,ft_turn,ft_strand,ft_coiled,ft_compbias,ft_domain,"
    "ft_motif,ft_region,ft_zn_fing,ft_topo_dom,ft_transmem,go_id,ec"
)
ESM2_NAMES = (
    "esm2_t6_8M_UR50D", "esm2_t12_35M_UR50D", "esm2_t30_150M_UR50D", "esm2_t33_650M_UR50D", "esm2_t36_3B_UR50D",
    "esm2_t48_15B_UR50D",
)  # fmt: skip


@dataclass(frozen=True)
class Remote:
    """One file to fetch."""

    name: str
    url: str
    size: int | None
    checksum: Checksum | None


@dataclass(frozen=True)
class Source:
    """Something a user may ask for by name."""

    name: str
    help: str
    kind: str
    """`data` or `weights`: where it goes unless told."""
    find: Callable[[int, str | None], list[Remote]]
    """(number of chunks, mirror) -> files; asks the publisher for sizes and checksums."""
    files: str
    """What its files are called, as a regular expression."""


def sources() -> dict[str, Source]:
    """All of them, by name."""
    uniref, knowledge = "uniref/uniref50", "knowledgebase/complete"
    found = [
        Source(
            "uniref50", "UniRef50, FASTA: a protein for each cluster at half identity", "data",
            lambda _, mirror: _uniprot(uniref, "uniref50.fasta.gz", mirror), r"uniref50\.fasta(\.gz)?",
        ),
        Source(
            "swissprot", "Swiss-Prot with its annotations, as a flat file", "data",
            lambda _, mirror: _uniprot(knowledge, "uniprot_sprot.dat.gz", mirror), r"uniprot_sprot\.dat(\.gz)?",
        ),
        Source(
            "swissprot-fasta", "Swiss-Prot, FASTA", "data",
            lambda _, mirror: _uniprot(knowledge, "uniprot_sprot.fasta.gz", mirror), r"uniprot_sprot\.fasta(\.gz)?",
        ),
        Source(
            "swissprot-tsv", "Swiss-Prot with its annotations, as a table", "data",
            lambda _, mirror: [_table(mirror)], r"uniprot_sprot\.tsv(\.gz)?",
        ),
        *(
            Source(
                name, f"{title}, as token files: --num-chunks for training, valid and test", "data",
                lambda chunks, mirror, name=name: _tokens(name, chunks, mirror),  # type: ignore[misc]
                rf"{name}_(train|valid|test)_\d+\.bin",
            )
            for name, title in (("omg_prot50", "OMG-prot50"),)
        ),
        *(
            Source(
                name, f"ESM-2, {name.split('_')[2]} parameters", "weights",
                lambda _, mirror, name=name: _esm2(name, mirror),  # type: ignore[misc]
                rf"{name}(-contact-regression)?\.pt",
            )
            for name in ESM2_NAMES
        ),
        Source("esmfold", "ESMFold v1, a folder that transformers reads", "weights", lambda _, mirror: _esmfold(mirror),
               r"esmfold_v1(/.*)?"),
    ]  # fmt: skip
    return {source.name: source for source in found}


def command_for(text: str) -> str | None:
    """The command that fetches a published file which a text names, such as a message about a file that is missing."""
    for source in sources().values():
        if re.search(rf"(?<![\w.-]){source.files}(?![\w.-])", text):
            return f"`plmsae fetch {source.name}` downloads it"
    return None


def mirrored(url: str, mirror: str | None) -> str:
    """The address on the mirror, or as published."""
    base = mirror or os.environ.get(MIRROR)
    return url if not base else f"{base.rstrip('/')}/{url.partition('://')[2]}"


def _uniprot(folder: str, name: str, mirror: str | None) -> list[Remote]:
    base = f"{UNIPROT_URL}/{folder}"
    size, md5 = _metalink(_read(mirrored(f"{base}/RELEASE.metalink", mirror)), name)
    url = mirrored(f"{base}/{name}", mirror)
    checksum = None if md5 is None else Checksum("md5", md5)
    return [Remote(name, url, size if size is not None else length(url), checksum)]


def _metalink(content: bytes, name: str) -> tuple[int | None, str | None]:
    """Size and MD5 of a file by a release's own list; None for what it does not say."""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise UserError(f"RELEASE.metalink cannot be read: {error}", "the mirror gives something else") from error
    for file in root.iter():
        if _tag(file) == "file" and file.get("name") == name:
            parts = {_tag(part): (part.text or "").strip() for part in file.iter() if part.get("type") in (None, "md5")}
            size = parts.get("size", "")
            return (int(size) if size.isdigit() else None), parts.get("hash") or None
    return None, None


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _table(mirror: str | None) -> Remote:
    query = {"query": "reviewed:true", "format": "tsv", "compressed": "true", "fields": _FIELDS}
    # Made when asked for: no size, no checksum, no resuming.
    return Remote("uniprot_sprot.tsv.gz", mirrored(f"{REST_URL}?{urllib.parse.urlencode(query)}", mirror), None, None)


def _esm2(name: str, mirror: str | None) -> list[Remote]:
    found = []
    for file, base in ((f"{name}.pt", ESM2_URL), (f"{name}{ESM2_HEAD}", ESM2_HEAD_URL)):
        url = mirrored(f"{base}/{file}", mirror)
        found.append(Remote(file, url, length(url), None))
    return found


def _tokens(name: str, chunks: int, mirror: str | None) -> list[Remote]:
    found = {remote.name: remote for remote in _hub(f"datasets/{TOKENS.format(name)}", mirror)}
    train = sorted(file for file in found if re.fullmatch(rf"{name}_train_\d+\.bin", file))
    if chunks > len(train):
        raise UserError(
            f"{name} has {len(train)} chunks, {chunks} were asked for", f"lower --num-chunks to {len(train)}"
        )
    ends = sorted(file for file in found if re.fullmatch(rf"{name}_(valid|test)_\d+\.bin", file))
    return [found[file] for file in [*ends, *train[:chunks]]]


def _esmfold(mirror: str | None) -> list[Remote]:
    found = _hub(f"models/{ESMFOLD}", mirror)
    names = {remote.name for remote in found}
    # The same weights are there in several formats; one that cannot hold code is enough.
    weights = "model.safetensors" if "model.safetensors" in names else "pytorch_model.bin"
    wanted = {weights, "config.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"}
    return [
        Remote(f"esmfold_v1/{each.name}", each.url, each.size, each.checksum) for each in found if each.name in wanted
    ]


def _hub(where: str, mirror: str | None) -> list[Remote]:
    """The files at the top of a repository of the hub; of large ones it knows the SHA-256."""
    url = mirrored(f"{HUB_URL}/api/{where}/tree/main", mirror)
    said = _read(url)
    try:
        listed = json.loads(said)
        files = [each for each in listed if each["type"] == "file" and re.fullmatch(r"[\w.-]+", each["path"])]
        place = where.removeprefix("models/")
        return [
            Remote(
                each["path"],
                mirrored(f"{HUB_URL}/{place}/resolve/main/{each['path']}", mirror),
                int(each["size"]),
                Checksum("sha256", each["lfs"]["oid"]) if "lfs" in each else None,
            )
            for each in files
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{url} is no list of files: {error}", "the mirror gives something else") from error


def _read(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as reply:
            return bytes(reply.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(
            f"{url} does not answer: {error}", "is there a network? --mirror names another place"
        ) from error


def place_of(source: Source, folder: Path | None, cache: Path) -> Path:
    """Where its files go: as told, else where `model.weights` looks for weights, and `data/` for the rest."""
    if folder is not None:
        return folder
    return cache / "weights" if source.kind == "weights" else Path("data")
