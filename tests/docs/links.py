"""Check the links of the documents without a network: files must exist, and anchors be headings.

python -m tests.docs.links        (part of `make lint`)
"""

import sys
from pathlib import Path
from urllib.parse import unquote

from tests.docs.documents import ROOT, anchors, documents, links, parse


def broken(path: Path) -> list[str]:
    """Return a sentence for each link of a document to a file or heading that is not there."""
    prose, _ = parse(path)
    sentences = []
    for line, link in links(prose):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            sentences.append(f"{path}:{line}: there is no {name}")
        elif anchor and (target.suffix != ".md" or anchor not in anchors(parse(target)[0])):
            sentences.append(f"{path}:{line}: {target.name} has no heading #{anchor}")
    return sentences


def main() -> int:
    checked = [*documents(), ROOT / "CHANGELOG.md", ROOT / "LOG.md"]
    sentences = [sentence for path in checked for sentence in broken(path)]
    print("\n".join(sentences) or f"All links of {len(checked)} documents lead somewhere.")
    return bool(sentences)


if __name__ == "__main__":
    sys.exit(main())
