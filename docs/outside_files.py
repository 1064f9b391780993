"""A hook of mkdocs: files outside docs/ that a page links to become part of the website, under their own paths.

So `[the log](../LOG.md)` works in the repository and on the website.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = ("CHANGELOG.md", "LOG.md")  # in mkdocs.yml's nav
_LINK = re.compile(r"(\]\()((?:\.\./)+)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to."""
    linked = {ROOT / name for name in ALWAYS}
    for page in files.documentation_pages():
        folder = Path(page.abs_src_path).parent
        linked |= {(folder / up / name).resolve() for _, up, name in _LINK.findall(page.content_string)}
    for path in sorted(linked):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and not name.startswith("docs/"):
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave docs/ point to these files: docs/ is the root of the website."""
    depth = page.file.src_uri.count("/")
    leaving = "../" * (depth + 1)
    return _LINK.sub(lambda m: m[1] + m[2].removeprefix("../") + m[3] if m[2] == leaving else m[0], markdown)
