"""Write every table of figures from the JSON lines of results/bench: its full pages, docs/performance.md, README.md.

    results/bench/NAME.md       all figures of NAME.jsonl
    docs/performance.md         narrow tables, those of NARROW, between <!-- table:NAME --> and <!-- /table:NAME -->
    README.md                   the cases of README_CASES, between <!-- figures --> and <!-- /figures -->

A case is compared with its best peer, the one with the lowest ratio. Where two kinds of machine have records, each
narrow table is written for both, and README's gets a column with the ratios of the second.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from rag.bench import page
from rag.bench.record import PERCENT_OF_PEAK, Record, columns, read_records, rows_of, short
from rag.bench.timing import Row
from rag.runtime.files import atomic_file
from rag.runtime.machine.measurement import Figure, Spread
from rag.types import UserError

RESULTS, PERFORMANCE, README = Path("results", "bench"), Path("docs", "performance.md"), Path("README.md")

_BLOCK = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(?P<end><!-- /table:\2 -->)", re.S)
_FIGURES = re.compile(r"(<!-- figures -->\n).*?(?P<end><!-- /figures -->)", re.S)


@dataclass(frozen=True, slots=True)
class PeerTable:
    """A table of one figure of ours in all cases, with the best peer, the ratio and the share of a peak."""

    bench: str  # NAME of results/bench/NAME.jsonl
    figure: str
    ratio: str = ""  # what follows the peer's name in the name of the ratio


@dataclass(frozen=True, slots=True)
class ColumnTable:
    """A table of some columns of the full table."""

    bench: str
    columns: Mapping[str, str]  # header in the full table -> header here
    cases: str = ""  # a regular expression that is found in a case


@dataclass(frozen=True, slots=True)
class ReadmeCase:
    """A line of README's table."""

    label: str
    bench: str
    case: str
    figure: str
    ratio: str = ""


NARROW: Mapping[str, PeerTable | ColumnTable] = {
    "first-token": PeerTable("pipeline", "first token ms", ", first"),
    "last-token": PeerTable("pipeline", "last token ms", ", last"),
    "quality": ColumnTable(
        "quality",
        {
            "ours: change of F1": "change of F1",
            "ours: change of contains": "of contains",
            "ours: change of log-likelihood": "of log-likelihood",
            "ours: mean KL": "mean KL",
        },
    ),
    "generate": PeerTable("generate", "tokens/s"),
    "evaluation": PeerTable("evaluation", "answers/s"),
    "question-answering": ColumnTable(
        "question_answering",
        {
            "ours: mean": "ours",
            "llama-cpp-python: mean": "llama-cpp-python",
            "llama-cpp-python: ours minus it, mean": "difference",
            "llama-cpp-python: ours minus it, low": "lower bound",
            "llama-cpp-python: ours minus it, high": "upper bound",
        },
        "questions",
    ),
    "attention": PeerTable("attention", "ms"),
    "embed": PeerTable("embed", "tokens/s"),
    "search": PeerTable("search", "ms"),
    "growth": ColumnTable(
        "growth",
        {
            "ours: exponent": "exponent",
            "ours: standard error": "standard error",
            "ours: theory": "in theory",
        },
        "fitted",
    ),
}

README_CASES = (
    ReadmeCase(
        "question to first token, 855-token prompt",
        "pipeline",
        "int8, reuse none",
        "first token ms",
        ", first",
    ),
    ReadmeCase("question to 64th token", "pipeline", "int8, reuse none", "last token ms", ", last"),
    ReadmeCase(
        "first token, `kv_reuse=blend` (answers change; the peer prefills all)",
        "pipeline",
        "int8, reuse blend",
        "first token ms",
        ", first",
    ),
    ReadmeCase(
        "first token, `kv_reuse=chunk` (answers change; the peer prefills all)",
        "pipeline",
        "int8, reuse chunk",
        "first token ms",
        ", first",
    ),
    ReadmeCase("prefill of 1,024 tokens", "generate", "prefill 1024, int8", "tokens/s"),
    ReadmeCase("decode after 256 tokens", "generate", "decode at 256, int8", "tokens/s"),
    ReadmeCase(
        "speculative decoding of answers", "generate", "decode of answers, int8, speculative", "tokens/s"
    ),
    ReadmeCase("100 questions in one call", "evaluation", "100 questions, int8, reuse none", "answers/s"),
    ReadmeCase("embedding, float32", "embed", "float32, 1000 texts, 132472 tokens", "tokens/s"),
    ReadmeCase("embedding, bfloat16", "embed", "bfloat16, 1000 texts, 132472 tokens", "tokens/s"),
    ReadmeCase("attention of 2,048 tokens, forward", "attention", "B1 H9 K3 D64 T=2048 forward", "ms"),
    ReadmeCase("the same with backward", "attention", "B1 H9 K3 D64 T=2048 forward+backward", "ms"),
    ReadmeCase("exact search, 200,000 vectors", "search", "N=200000 E=384 k=10 queries=1 exact", "ms"),
    ReadmeCase("the same, `vector_index=int8`", "search", "N=200000 E=384 k=10 queries=1 int8", "ms"),
)


def write_tables(root: Path) -> list[Path]:
    """Write all tables of the repository at `root` and return the files that changed."""
    changed = []
    for path, text in generated(root).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with atomic_file(path, "w") as file:
                file.write(text)
            changed.append(path)
    return changed


def generated(root: Path) -> dict[Path, str]:
    """Return the text of each file with tables, as the records make it.

    Raises:
        UserError: a file, a marker, a record or a case is missing.
    """
    records = {path.stem: read_records(path) for path in sorted((root / RESULTS).glob("*.jsonl"))}
    found = {}
    for name, some in records.items():
        stem = root / RESULTS / name
        picture = f"{name}.png" if stem.with_suffix(".png").is_file() else None
        found[stem.with_suffix(".md")] = page.markdown(name, some, picture)
    found[root / PERFORMANCE] = _filled(
        root / PERFORMANCE,
        _BLOCK,
        [f"table:{name}" for name in NARROW],
        lambda block: narrow_table(block[2], records),
    )
    found[root / README] = _filled(root / README, _FIGURES, ["figures"], lambda _: readme_table(records))
    return found


def _filled(
    path: Path, marked: re.Pattern[str], names: Sequence[str], block_text: Callable[[re.Match[str]], str]
) -> str:
    """Return the file's text with the text of each marked block replaced. Raises UserError where one is missing."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    filled = marked.sub(lambda block: f"{block[1]}\n{block_text(block)}\n\n{block['end']}", text)
    found = [block[1].split()[1] for block in marked.finditer(text)]
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"{path} has no block for a table, {missing[0]}: write its two markers, <!-- {missing[0]} --> and "
            f"<!-- /{missing[0]} -->."
        )
    return filled


def narrow_table(name: str, records: Mapping[str, Sequence[Record]]) -> str:
    """Return a table of NARROW for each kind of machine, each with the command that made it.

    Args:
        name: The table's name.
        records: The records of each benchmark, oldest first.

    Raises:
        UserError: there is no such table, or its benchmark has no record.
    """
    if name not in NARROW:
        raise UserError(f"{PERFORMANCE} marks the table {name!r}: choose one of {', '.join(NARROW)}")
    chosen = NARROW[name]
    if chosen.bench not in records:
        raise UserError(f"{RESULTS / chosen.bench}.jsonl is missing: run the benchmark with keep={RESULTS}")
    full = f"[Full table](../{RESULTS.as_posix()}/{chosen.bench}.md)"
    parts = []
    for machine, record in page.latest(records[chosen.bench]).items():
        rows = rows_of(record)
        lines = _selected(chosen, rows) if isinstance(chosen, ColumnTable) else _compared(chosen, rows)
        parts += [page.table(lines), f"{page.run_facts(record)}; {machine}. {full}."]
    return "\n\n".join(parts)


def _selected(chosen: ColumnTable, rows: Sequence[Row]) -> list[list[str]]:
    headers, lines = columns(rows)
    at = [headers.index(header) for header in chosen.columns]
    lines = [[line[0], *(line[i] for i in at)] for line in lines if re.search(chosen.cases, line[0])]
    return _shared_words([["case", *chosen.columns.values()], *lines])


def _compared(chosen: PeerTable, rows: Sequence[Row]) -> list[list[str]]:
    header = ["case", f"ours, {chosen.figure}", "best peer", "ratio", "share of peak"]
    lines = [header, *([row.case, *comparison(row, chosen.figure, chosen.ratio)] for row in rows)]
    if all(share == "-" for *_, share in lines[1:]):
        lines = [line[:-1] for line in lines]
    return _shared_words(lines)


def _shared_words(lines: list[list[str]]) -> list[list[str]]:
    """Move the words that several cases all begin with into the header."""
    header, *rest = lines
    words = [line[0].split() for line in rest]
    shared = len(list(takewhile(lambda same: len(set(same)) == 1, zip(*words, strict=False))))
    if len(rest) < 2 or not shared:
        return lines
    cases = [[" ".join(case[shared:]), *line[1:]] for case, line in zip(words, rest, strict=True)]
    return [[f"case: {' '.join(words[0][:shared])} ...", *header[1:]], *cases]


def comparison(row: Row, figure: str, ratio: str) -> list[str]:
    """Return the cells of a case: our figure, the best peer's, their ratio, and our largest share of a peak.

    Args:
        row: The case.
        figure: The name of the figure.
        ratio: What follows a peer's name in the name of its ratio.
    """
    peers = {
        peer: row.ratio[peer + ratio] for peer in row.peers if peer != "exact" and not peer.startswith("ours")
    }
    shares = {name: value for name, value in row.ours.items() if name.endswith(PERCENT_OF_PEAK)}
    best = min(peers, key=peers.__getitem__, default=None)
    return [
        short(row.ours[figure]),
        "-" if best is None else f"{short(_median(row.peers[best][figure]))} {best}",
        "-" if best is None else f"{peers[best]:.3g}",
        "-" if not shares else _share_text(*max(shares.items(), key=lambda share: _median(share[1]))),
    ]


def _share_text(name: str, percent: Figure) -> str:
    unit = name.removesuffix(PERCENT_OF_PEAK)
    return f"{_median(percent):.0f}% of {'bandwidth' if unit.startswith('GB/s') else unit.split()[0]}"


def _median(figure: Figure) -> float:
    return figure.median if isinstance(figure, Spread) else float(figure)


def readme_table(records: Mapping[str, Sequence[Record]]) -> str:
    """Return README's table, below a sentence that names the machine and the days.

    Args:
        records: The records of each benchmark, oldest first.

    Raises:
        UserError: no record of the first kind of machine has one of the cases.
    """
    first, *others = dict.fromkeys(page.machine_name(one) for some in records.values() for one in some)
    header = [
        "case",
        "ours",
        "best peer",
        "ratio",
        "share of peak",
        *(f"ratio, {machine}" for machine in others),
    ]
    lines, days = [header], []
    for chosen in README_CASES:
        found = _latest_case(chosen, records, first)
        if found is None:
            raise UserError(
                f"{RESULTS / chosen.bench}.jsonl has no case {chosen.case!r}: run the benchmark, or change README_CASES"
            )
        record, row = found
        days.append(record["machine"]["date"][:10])
        _, peer, times, share = comparison(row, chosen.figure, chosen.ratio)
        ours = f"{short(_median(row.ours[chosen.figure]))} {chosen.figure.split()[-1]}"
        elsewhere = [_latest_case(chosen, records, machine) for machine in others]
        ratios = [comparison(one[1], chosen.figure, chosen.ratio)[2] if one else "-" for one in elsewhere]
        lines.append([chosen.label, ours, peer, times, share, *ratios])
    link = f"[How it was measured, all cases and their commands]({PERFORMANCE.as_posix()})"
    span = " to ".join(dict.fromkeys([min(days), max(days)]))
    return f"{first}, {span}; a ratio above 1 means that ours is better. {link}.\n\n{page.table(lines)}"


def _latest_case(
    chosen: ReadmeCase, records: Mapping[str, Sequence[Record]], machine: str
) -> tuple[Record, Row] | None:
    """Return the last record of the machine that has the case, and the case."""
    for record in reversed(records.get(chosen.bench, ())):
        for row in rows_of(record):
            if row.case == chosen.case and page.machine_name(record) == machine:
                return record, row
    return None
