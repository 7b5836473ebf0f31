"""Diagnosis: what holds a run back, on which rank, what it costs and what to do. Pure functions of records.

`diagnose` is the verdict, `ledger` the account of where the time went. Read `engine`, then `examine`, `changes` and
`signatures`.
"""

from lens.diagnosis.engine import diagnose
from lens.diagnosis.ledger import ledger

__all__ = ["diagnose", "ledger"]
