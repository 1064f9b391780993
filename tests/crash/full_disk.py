"""Fill the disk: from each call of scripts/ingest.py on, or at each free size of a file system of 300 KiB.

The old state stays, the error is one sentence, and the exit code is 2.

    python -m tests.crash.full_disk 100 0 FOLDER    with FOLDER on a small file system of its own
"""

import contextlib
import io
import itertools
import os
import random
import runpy
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rag import pipeline
from rag.embed.bag_of_words import BagOfWords
from rag.index.lexical.analyzer import Analyzer
from rag.types import UserError
from tests.crash import campaign
from tests.crash.campaign import ROOT, Trial
from tests.crash.damage import or_error
from tests.crash.kills import Case
from tests.crash.trap import Ended, forked, trapped
from tests.crash.workloads import CHUNKER, Workload, enter, look_at_index, write_corpus

_SCRIPTS = ROOT / "scripts"
_MOST = 96 << 10  # free bytes in the last trial, more than the index takes


def ingest(corpus: Path, home: Path) -> tuple[int, str]:
    """Run scripts/ingest.py as a script; return its exit code and stderr."""
    enter(home)
    os.chdir(home.parent)
    sys.argv = [
        "ingest.py", f"corpus.path={corpus}", f"index.path={home / 'index'}", "embedder=bag_of_words", "chunker=fixed",
        f"chunker.size={CHUNKER.size}", f"chunker.overlap={CHUNKER.overlap}", f"hydra.run.dir={home.parent / 'run'}",
    ]  # fmt: skip
    captured = io.StringIO()
    with contextlib.redirect_stderr(captured), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(str(_SCRIPTS / "ingest.py"), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0), captured.getvalue()
    raise RuntimeError("a script ends by exiting")


def call(corpus: Path, home: Path) -> tuple[int, str]:
    """Call what `ingest` runs; return the exit code and error message that the script would give."""
    enter(home)
    try:
        pipeline.ingest(corpus, home / "index", CHUNKER, BagOfWords(), Analyzer(stemmer="english"))
    except UserError as error:
        return 2, str(error)
    return 0, ""


def outcome(case: Case, home: Path, ended: Ended) -> tuple[str, str]:
    """Return (outcome, detail) of a run of `ingest` on a disk that may have been full."""
    code, errors = (None, "") if ended.result is None else ended.result
    found = or_error(lambda: case.workload.look(home))
    if found != (case.new if code == 0 else case.old):
        return "lost", f"exit code {code}: {errors} {ended.text}"
    if code is None:
        return ("hang" if ended.hung else "traceback"), f"signal {ended.signal} {ended.text}"
    errors = "\n".join(
        line for line in errors.splitlines() if line.strip() and "\u2501" not in line
    )  # no progress bars
    if "\n" in errors or code not in (0, 2) or (code == 2) != bool(errors):
        return "not one sentence", f"exit code {code}: {errors}"
    if code == 0:
        return "new", ""
    left = sorted(path.name for path in (home / "index").iterdir() if path.name.startswith("."))
    return ("rubbish", f"{left}") if left else ("refused", errors)


def _case(folder: Path, draw: random.Random, size: tuple[int, int]) -> tuple[Case, Path]:
    """Return an index of one corpus, and another corpus whose index will replace it."""
    corpora = [write_corpus(folder / name, draw, *size) for name in ("first", "second")]
    workload = Workload(
        "ingest again",
        lambda home: _checked(ingest(corpora[0], home)),
        lambda home: _checked(ingest(corpora[1], home)),
        partial(look_at_index, BagOfWords),
        True,
    )
    return Case.of(workload, folder), corpora[1]


def _checked(done: tuple[int, str]) -> None:
    if done[0] != 0:
        raise RuntimeError(done[1])


def trials(first: int, count: int, folder: Path) -> Iterator[Trial]:
    sys.path.insert(0, str(_SCRIPTS))
    small = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    yield from _small(first, count, folder, small) if small else _refused(first, count, folder)


def _refused(first: int, count: int, folder: Path) -> Iterator[Trial]:
    """Yield trials with a full disk from each call on; one in ten runs the script, the others what it calls."""
    numbers = itertools.count()
    for seed in itertools.count():
        draw, trial_folder = random.Random(seed), folder / str(seed)
        case, corpus = _case(
            trial_folder, draw, (3, 30) if seed == 0 else (draw.randint(2, 9), draw.choice([40, 400]))
        )
        points = list(range(1, case.calls + 1))
        draw.shuffle(points)
        for at in points:
            if (number := next(numbers)) >= count:
                return
            if number < first:
                continue
            run = ingest if number % 10 == 0 else call
            done = f"{run.__name__}, no room from call {at} of {case.calls} on"
            campaign.begin(number, done)
            home = trial_folder / "home"
            shutil.copytree(case.before, home)
            ended = trapped(partial(run, corpus, home), home, full_at=at)
            if ended.result is not None:
                ended = Ended(ended.result[0])
            result, detail = outcome(case, home, ended)
            yield Trial(number, result, done, detail)
            shutil.rmtree(home)
        shutil.rmtree(trial_folder)


def _small(first: int, count: int, folder: Path, small: Path) -> Iterator[Trial]:
    """Yield trials with different free sizes of a small file system, from none to more than the index takes."""
    case, corpus = _case(folder, random.Random(3), (8, 120))
    home = small / "home"
    for number in range(first, count):
        room = number * _MOST // count
        shutil.copytree(case.before, home)
        free = os.statvfs(small)
        left = free.f_bavail * free.f_bsize - room
        if left < 0:
            return
        (small / "ballast").write_bytes(bytes(left))
        done = f"{room} bytes left"
        campaign.begin(number, done)
        result, detail = outcome(case, home, forked(partial(ingest, corpus, home)))
        yield Trial(number, result, done, detail)
        shutil.rmtree(home)
        (small / "ballast").unlink()
        shutil.rmtree(small / "run", ignore_errors=True)


if __name__ == "__main__":
    campaign.main(trials)
