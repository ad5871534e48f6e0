"""Imported last by a server from which processes are forked: in none of them does Python's collector look through what is imported.

It would do so as each begins, find nothing, and copy a hundred megabytes of memory, for it writes to each object that it looks at.
"""

import gc

gc.collect()
gc.freeze()
