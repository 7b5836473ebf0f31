"""The ``lens`` command: one file a verb, each with `HELP`, `configure(parser)` and `run(arguments)`."""
