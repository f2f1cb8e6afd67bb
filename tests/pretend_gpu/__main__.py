"""Run a module where a GPU seems to be: `python -m tests.pretend_gpu MODULE ARGUMENTS...`"""

import runpy
import sys

from tests.pretend_gpu import machine  # noqa: F401  before torch

if len(sys.argv) < 2:
    sys.exit(__doc__)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
