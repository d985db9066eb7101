"""TCL's fine-tuning for retrieval: ALBEF's runner for it, a second view for the twin, and two more objectives."""

from __future__ import annotations

from typing import Any

from tests.reference import albef as pretraining
from tests.reference import albef_retrieval
from tests.reference.compare import Folder
from tests.reference.tcl import THIRD
from vlscale.model import Encodings
from vlscale.objectives import imc, itc, lmi
from vlscale.objectives.base import FamilyLike
from vlscale.types import Visual

POOL = 4  # the authors always average to 4 x 4 cells here


def run(folder: Folder) -> dict[str, pretraining.Values]:
    """{outputs file: {name: tensor}} of every step."""
    return pretraining.run_steps(folder, Runner)


class Runner(albef_retrieval.Runner):
    """ALBEF's with the twin on the second view, and its contrast among six terms."""

    twin_view = "augmented"

    def build_contrasts(self, family: FamilyLike) -> dict[str, Any]:
        """Contrast across modalities and within each, by picture; and of whole and parts."""
        view, queue = self.twin_view, self.config["queue_size"]
        across = itc.Config(weight=THIRD, momentum_visual=view, queue=queue, same_picture="positive")
        within = imc.Config(weight=THIRD, momentum_visual=view, queue=queue, same_picture="positive")
        parts = lmi.Config(weight=THIRD, momentum_visual=view, pool=POOL)
        return {
            "itc": itc.build(across, family),
            "imc": imc.build(within, family),
            "lmi": lmi.build(parts, family),
        }

    def views(self, inputs: pretraining.Tensors) -> dict[str, Visual]:
        """Two of each picture."""
        return {"clean": Visual(inputs["image"]), "augmented": Visual(inputs["image_aug"])}

    def contrast_values(self, enc: Encodings, losses: pretraining.Losses) -> pretraining.Tensors:
        """ALBEF's, and the four further terms."""
        within, local = losses["imc"].metrics, losses["lmi"].metrics
        return {
            **super().contrast_values(enc, losses),
            "loss_i2i": within["imc/i2i"],
            "loss_t2t": within["imc/t2t"],
            "loss_i2i_local": local["lmi/image"],
            "loss_t2t_local": local["lmi/text"],
        }
