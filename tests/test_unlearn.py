from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inner_oracle import encode_all, flat, relative
from tiny import examples, tiny_policy
from transformers import AdamW, get_scheduler  # noqa: F401
