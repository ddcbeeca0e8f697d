"""What is chosen for the whole process."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept(root: Path) -> None:
    """Memory of 40 MB is always given back by default, and each array would meet 10,000 page faults."""
    code = """
import resource
import numpy as np
from lnjac.machine import keep_freed_memory
keep_freed_memory()
np.ones(5 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): np.ones(5 << 20)
assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
