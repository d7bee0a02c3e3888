"""Potentials: what a lineage gains at a level, ``log G_k``, from the values along it (FK steering, 2501.06848).

The product of all potentials along a lineage is ``exp(λ r(x0))`` for each of them, since the terminal one is
``G_0 = exp(λ r(x0)) / Π_{k} G_k``: the target does not depend on the choice, only the variance does.
"""

from flowalign.potentials.base import Potential
from flowalign.potentials.fk import Difference, Immediate, Maximum, Sum
from flowalign.potentials.tempered import Tempered

__all__ = ["Difference", "Immediate", "Maximum", "Potential", "Sum", "Tempered"]
