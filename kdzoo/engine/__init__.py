"""The room where DeepSpeed lives; no other room imports it."""

import os

import torch

# Gathered heads and their gradients are large and come and go on every step: in huge pages, where the system offers
# them, a CPU run spends its time on products and not on page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if not torch.cuda.is_available():
    # DeepSpeed looks for its accelerator when it is first imported, and warns where it has to guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
