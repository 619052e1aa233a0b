"""The stages of bench/gpu.py. Each stage has a file of its own name, such as memory.py, and a line of `STAGES` in stage.py.

The other files are not stages:

- stage.py: the list of stages and their arguments.
- process.py: a stage's process, its limit and its rows.
- outcome_files.py: the files with a stage's rows, and the summary.
- jobs.py: parts of a stage that may fail separately.
- days.py: the data of stages training and loading.
- cuda_tests.py: a part of stage correctness.
"""
