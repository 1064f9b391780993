"""The check of links finds what leads nowhere, and passes what leads somewhere."""

import pytest

from tests.docs import documents, links


@pytest.fixture
def page(tmp_path):
    """page(text) writes a document beside other.md, which has headings, and a picture."""
    (tmp_path / "other.md").write_text("# One heading\n\n## It's 1-2, `k`!\n\n## Same\n\n## Same\n")
    (tmp_path / "a b.png").touch()

    def write(text: str):
        (tmp_path / "page.md").write_text(text)
        return tmp_path / "page.md"

    return write


@pytest.mark.parametrize(
    "text",
    [
        '[a](other.md) and ![b](a%20b.png) and <img src="other.md">',
        "[a](other.md#one-heading) [b](other.md#its-1-2-k) [c](other.md#same) [d](other.md#same-1)",
        "# Here\n\n[up](#here)",
        "[far](https://example.org/nothing) [mail](mailto:a@example.org)",
        "`[code](nothing.md)`\n\n```text\n[block](nothing.md)\n```\n",
    ],
)
def test_links_that_lead_somewhere_pass(page, text):
    assert links.broken(page(text)) == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("first\n\n[a](nothing.md)", "page.md:3: there is no nothing.md"),
        ("![b](other.png)", "page.md:1: there is no other.png"),
        ("[c](other.md#two)", "page.md:1: other.md has no heading #two"),
        ("[d](other.md#same-2)", "page.md:1: other.md has no heading #same-2"),
        ("[e](#nowhere)", "page.md:1: page.md has no heading #nowhere"),
        ("```text\n# Code\n```\n[f](#code)", "page.md:4: page.md has no heading #code"),
        ('<img src="nothing.png">', "page.md:1: there is no nothing.png"),
    ],
)
def test_links_that_lead_nowhere_are_named(page, text, wanted):
    [sentence] = links.broken(page(text))
    assert sentence.endswith(wanted)


def test_every_link_of_the_documents_leads_somewhere():
    assert [sentence for path in documents.documents() for sentence in links.broken(path)] == []


def test_a_block_without_an_end_is_an_error(page):
    with pytest.raises(ValueError, match="has no end"):
        documents.parse(page("```bash\nmake demo\n"))
