import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks here are tiny, and PyTorch is not yet imported
