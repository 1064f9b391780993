"""Peers that several benchmarks share."""

import sys


def print_left_out(peer: str, why: object) -> None:
    """Print on stderr that a peer is left out, and why."""
    print(f"{peer} is left out, its columns stay empty: {why}", file=sys.stderr)
