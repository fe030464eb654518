"""axolotl: a recipe's block `qtarget:` is the target, where `plugins:` names `QTargetPlugin` of this module."""

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator
from transformers import Trainer

from ..target.config import QTargetConfig
from ..training.mixin import QTargetMixin


# Keys of a recipe with which axolotl makes another trainer or another loss.
_OTHER_LOSSES = ("rl", "reward_model", "process_reward_model", "trainer_cls", "use_eaft", "orpo_alpha")


def settings_of(block: str | Mapping[str, Any]) -> dict[str, Any]:
    """What the mixin takes, from a block: a method's name, or fields of `QTargetConfig` and `ref_model`.

    Raises:
        ValueError: it is no target.
    """
    if isinstance(block, str):
        return {"qtarget_config": QTargetConfig.coerce(block), "ref_model": None}
    fields = dict(block)
    ref_model = fields.pop("ref_model", None)
    return {"qtarget_config": QTargetConfig.coerce(fields), "ref_model": ref_model}


def check_recipe(recipe: Mapping[str, Any]) -> None:
    """Raise unless a recipe has a target, and no other loss."""
    if not recipe.get("qtarget"):
        raise ValueError(
            "`plugins` names the QTargetPlugin and the recipe has no `qtarget`: add `qtarget: target_sft`, or another "
            "method, or a block of fields."
        )
    for name in _OTHER_LOSSES:
        if recipe.get(name):
            raise ValueError(f"`{name}` makes another loss than that of `qtarget`: remove one of them.")
    if (recipe.get("context_parallel_size") or 1) > 1:
        raise ValueError(
            "`context_parallel_size` splits sequences over ranks by axolotl's own means, which `qtarget` does not "
            "support: set it to 1."
        )
    settings_of(recipe["qtarget"])


class QTargetArgs(BaseModel):
    """The block of a recipe. axolotl checks it, and the rest of the recipe with it, before it loads anything."""

    qtarget: str | dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_one_loss(cls, recipe: Any) -> Any:
        check_recipe(recipe)
        return recipe


class QTargetPlugin(BasePlugin):
    """Has axolotl train toward an explicit target distribution.

    Examples:
        >>> # recipe.yaml
        >>> # plugins: [trl_qtarget.integrations.axolotl.QTargetPlugin]
        >>> # qtarget: {method: target_sft, eta: 0.3}
    """

    def get_input_args(self) -> str:
        return f"{__name__}.{QTargetArgs.__name__}"

    def get_trainer_cls(self, cfg: Any) -> type[Trainer]:
        """axolotl's trainer with the target of a recipe."""
        return trainer_class(settings_of(cfg.qtarget))


def trainer_class(settings: Mapping[str, Any]) -> type[Trainer]:
    """axolotl's trainer over the mixin, with these of the mixin's arguments."""
    from axolotl.core.trainers.base import AxolotlTrainer  # after axolotl has patched what it patches

    class Target(QTargetMixin, Trainer):
        pass

    # The mixin is under axolotl's trainer, which makes of a batch what some models need and then asks for the loss.
    class AxolotlQTargetTrainer(AxolotlTrainer, Target):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **settings, **kwargs)

    return AxolotlQTargetTrainer
