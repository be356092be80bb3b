"""The types of arrays; a name's suffix tells the shape, such as `scores_PK`: prompts x responses."""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]
