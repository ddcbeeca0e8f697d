"""Imported last by the server from which workers fork: what it holds is shared with them and lives as long as it does.

Looking for garbage in it would copy its memory to each worker, and take the server most of a second when it ends.
"""

import gc

gc.freeze()
