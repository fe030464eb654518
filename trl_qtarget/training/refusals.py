"""What a trainer with a target refuses once it stands: ways to train in which its loss would be another."""

from typing import Any

from accelerate.utils import DistributedType, is_peft_model

from ..priors.fit import check_kind


def refuse_what_cannot_work(trainer: Any) -> None:
    """Raise where the loss of a `transformers.Trainer` would not be that of the target; keep Liger off the head.

    Raises:
        ValueError: of the model's kind, the processes, or the options.
    """
    accelerator, model, args = trainer.accelerator, trainer.model, trainer.args
    check_kind("model", model)
    if is_peft_model(model) and model.active_peft_config.peft_type == "CPT":
        raise ValueError(
            "`peft_config` is of CPT, which computes a loss of its own from the logits, in the place of the target: "
            "use another method of prompt learning."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"`{type(trainer).__name__}` does not train with `nn.DataParallel`, which `Trainer` uses where a process "
            "sees several GPUs: launch with `accelerate launch` or `torchrun`, or make one GPU visible "
            "(`CUDA_VISIBLE_DEVICES`)."
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "`fsdp_version=1` flattens the parameters of the LM head, which "
            f"`{type(trainer).__name__}` reads by themselves: set `fsdp_version: 2` in the Accelerate configuration."
        )
    if args.use_liger_kernel:
        options = args.liger_kernel_config or {}
        if options.get("fused_linear_cross_entropy"):
            raise ValueError(
                "`liger_kernel_config={'fused_linear_cross_entropy': True}` replaces the model's forward, where the "
                "target's loss is computed: leave it out. Liger's kernels of the layers are used all the same."
            )
        # Its default is True.
        args.liger_kernel_config = {**options, "fused_linear_cross_entropy": False}
