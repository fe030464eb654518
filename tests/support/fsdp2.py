"""`cells.py` under FSDP2 on CPU processes.

Accelerate turns FSDP on for GPUs and their like alone, so this trainer puts the plugin into its state by hand. From
there on all is as on a GPU: Accelerate shards the model layer by layer, and the trainer runs unchanged.
"""

import sys

import cells
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


class FSDP2(cells.InOrder):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
            # The other kind, FULL_STATE_DICT, cannot be written from CPU processes, by TRL's own trainer neither.
            state_dict_type="SHARDED_STATE_DICT",
        )
        self.is_fsdp_enabled = True


if __name__ == "__main__":
    cells.main(*sys.argv[1:], trainer_class=FSDP2)
