"""``losia_pro.peft.LosiaConfig`` for ``peft.get_peft_model``; importing this makes LoSiA known to PEFT."""

from .integrations.peft import LosiaConfig

__all__ = ["LosiaConfig"]
