"""Looking after a data folder: its size, how long records are kept, runs that go, parts merged.

Read in this order: ``retention`` (the rules, and what is past them), ``keeper`` (what is done about it), ``route``.
"""
