"""Visual search: questions on pictures too large to be seen whole, made here (`generator`) or read from others' files.

`scene` draws, `question` is what any question is, `pyvision`, `parquet` and `benchmarks` read.
"""
