"""The type checker that runs while the tests do: beartype, for which a whole number is a float too, as PEP 484 says."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
