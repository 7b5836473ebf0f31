"""Other systems' metrics in and out: OTLP over HTTP, Prometheus remote write, and ``/metrics`` to scrape.

``protobuf`` reads the wire by a table, ``otlp`` and ``remote_write`` make samples of it, ``exposition`` writes what a
Prometheus scrapes, ``route`` answers HTTP. What comes in is stored as any other record, in the run it names.
"""
