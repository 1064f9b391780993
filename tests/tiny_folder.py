"""Four small files of different kinds, one of which cannot be read."""

from pathlib import Path

FILES = {
    "seal.txt": "A seal eats fish. It sleeps on ice.",
    "krill.md": "# Krill\n\nKrill drift in swarms. A whale eats krill.",
    "page.html": "<html><head><title>Gulls</title></head><body><p>A gull nests on a cliff.</p></body></html>",
    "image.png": "\x89PNG",
}


def write_files(folder: Path) -> Path:
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="latin-1")
    return folder
