"""SQL for users: one SELECT over views of the records, and nothing else.

Read in this order: ``check`` (what is refused), ``functions`` (what may be called), ``views`` (what may be read),
``guest`` (running it within limits).
"""
