"""Settings of all tests: nothing is downloaded. Makes ``helpers`` importable (pytest's rootdir)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
