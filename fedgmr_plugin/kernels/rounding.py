"""Values that travel in a narrower type than they are computed in.

Legend: S values of one payload.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: `payload_dtype` to the type; None is the model's own.
PAYLOAD_TYPES: dict[str, torch.dtype | None] = {
    "model": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def travelled(values_S: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`values_S` as they arrive where they travel as `dtype`: rounded to nearest, ties to even.

    Finite values beyond the type's largest arrive as infinity. With None they are returned as they are.
    """
    return values_S if dtype is None else values_S.to(dtype).to(values_S.dtype)
