"""Run-time shape checks: every jaxtyping annotation of rag is enforced by beartype while the tests run."""

from jaxtyping import install_import_hook

install_import_hook("rag", "beartype.beartype")  # before anything imports rag
