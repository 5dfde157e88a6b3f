"""Every claim of the project, checked. A test is a function test_<claim>: its name is the claim.

Oracles are torch's own functions or a slow version in a few lines. Numbers made by other
libraries are stored with the name of the script in benchmarks/ that made them. Tests that need
Pillow or the real data in ../shared/data say so when they skip.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors are faster on one thread
