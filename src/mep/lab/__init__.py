"""The measurements: `mep bench`, `mep bench speed`, `mep profile` and `mep study`.

A measurement is two files. `bench.py` has the command, its defaults, its table and its picture, and imports nothing
heavy before they are needed; `bench_measure.py` has what is measured. So have the others.
"""
