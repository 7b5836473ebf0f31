"""A run's records as files for other tools, streamed: nothing is held but a few batches of rows.

``rows`` reads, ``files`` writes Parquet, CSV and ZIP, ``perfetto`` the trace of all ranks, ``route`` answers HTTP.
"""
