"""Imported by a process that ranks are forked from: whatever a rank imports, so that it starts in milliseconds."""

# ruff: noqa: F401
from __future__ import annotations

import gc

import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage3
import torch
import torch._dynamo  # a second and a half, which the first draw on the meta device asks for

import vlscale.data.scenes.regions
import vlscale.train

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # DeepSpeed collects garbage again and again: what is here need not be looked through
