"""What `benchmarks/race_caching.py` is made of."""

import os

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # which it reads once, when it is imported
