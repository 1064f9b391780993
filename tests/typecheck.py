"""Configure beartype, the type checker of the tests: an integer is accepted as a float, as in PEP 484."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def unchecked(kind: type, **values: object) -> object:
    """Make an instance of a dataclass of rag without this checker, as other programs make it."""
    made = object.__new__(kind)
    kind.__init__.__wrapped__(made, **values)
    return made
