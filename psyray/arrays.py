"""The types of arrays; a name's suffix tells the shape, such as `scores_PK`: prompts x responses."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]

Features = Mapping[str, npt.NDArray[np.floating[Any]]]  # [D] by id, in float32 as they are kept
