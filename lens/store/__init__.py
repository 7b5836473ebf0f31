"""The store: an HTTP server that keeps records exactly once and answers from them in milliseconds.

Read in this order: ``folder`` (one data folder, its log and its database), ``log``, ``applier``, ``schema``,
``query`` (the one door for reads), then ``app`` and ``server`` (HTTP).
"""
