"""Save and load models, folded ones included, in files that cannot be mistaken for something else.

A ``.pt`` file holds the tensors under the names of ``state_dict()``, and beside them the manifest as JSON text. Its key
says what to do, because it is what ``load_state_dict`` on the unfolded model prints. Without ``arch`` the file also holds
the pickled module, so that the model can be rebuilt. A ``.safetensors`` file holds tensors, and the manifest in its
metadata.

Loading a folded model rebuilds it: a fresh unfolded model, then the edits of the manifest, then the tensors by name,
strictly. What a *file* says is trusted only as far as it cannot run code: its manifest may name an architecture of timm
or torchvision; ``package.module:factory`` must come from the user.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfuse import architectures, deploy, model_files, surgery
from normfuse.errors import LoadError
from normfuse.formats import Format, sniff
from normfuse.manifest import make_manifest
from normfuse.report import Report
from normfuse.state_dicts import StateDict, copy_in, fit, load_strictly, strip_prefixes, unnest
from normfuse.unpickle import unpickle
