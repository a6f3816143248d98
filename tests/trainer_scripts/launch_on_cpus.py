"""Pretrain on CPU processes, sharded where accelerate's configuration says so.

accelerate shards on accelerators only and quietly replicates the model on CPUs, so it is told that these are such.
"""

import os
import sys

from accelerate import DistributedType, PartialState

from scfoundation_hf.trainer_scripts.pretrain import pretrain
from scfoundation_hf.trainer_scripts.pretraining_config import read_config

config = read_config(sys.argv[1])
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
pretrain(config)
PartialState().destroy_process_group()
