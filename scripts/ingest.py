"""A folder of files to an index.

python scripts/ingest.py corpus.path=data/sample/documents index.path=.demo/index
"""

from pathlib import Path

from launch import build, launch


def main(config) -> None:
    from terminal import progress_bars

    from rag import pipeline

    corpus, index = Path(config.corpus.path).expanduser(), Path(config.index.path).expanduser()
    stages = (build(config[name]) for name in ("chunker", "embedder", "analyzer"))
    with progress_bars() as update:
        report = pipeline.ingest(corpus, index, *stages, update)
    print(
        f"{report.documents} documents, {report.chunks} chunks ({report.embedded} embedded anew), "
        f"{report.tokens} tokens in {report.seconds:.1f} s -> {index}"
    )
    for skipped in report.skipped:
        print(f"skipped {skipped.path}: {skipped.reason}")


if __name__ == "__main__":
    launch(main, "ingest")
