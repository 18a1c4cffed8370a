"""Small hostile models, each the trap of one bug, with what ``fold-bn`` must do with every norm of each.

``ZOO`` maps a name to a :class:`Trap`. The models are grouped by what they test: who else reads a value or a weight
(:mod:`sharing`), which layers and routes fold (:mod:`layers`), values that are extreme (:mod:`values`), and what the
readers must see (:mod:`readers`).
"""

from __future__ import annotations

from tests.zoo import layers, readers, sharing, values
from tests.zoo.trap import FOLDED, ZOO, Trap

__all__ = ["FOLDED", "ZOO", "Trap", "layers", "readers", "sharing", "values"]
