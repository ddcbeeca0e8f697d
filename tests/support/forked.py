"""A process that has imported what run.py needs, and forks for each command, as importing takes longer than most commands.

It reads a line of JSON for each, [words, folder, environment, file of the output, file of the errors],
and answers the exit code.
"""

import gc
import json
import os
import runpy
import sys
from importlib import import_module

from lnjac.cli.run import preload

for name in (
    *preload,
    "hydra",
    "lnjac.cli.starts",
    "lnjac.runs.merge",
    "lnjac.sweeps.sweeper",
    "lnjac.sweeps.launchers.local",
):
    import_module(name)
gc.freeze()  # else each child's collector looks through all of it, and so copies its memory

SCRIPT = sys.argv[1]

for line in sys.stdin:
    words, folder, environment, *outputs = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate((os.devnull, *outputs)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    sys.argv = [SCRIPT, *words]
    runpy.run_path(SCRIPT, run_name="__main__")
    break
