"""A way for vLLM to load a scored model without its score head, in whatever process imports this.

The processes of an engine import the class that `worker_extension_cls` names before they load the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

FORMAT = "psyray_body"
EXTENSION = f"{__name__}.KnowsTheFormat"


@register_model_loader(FORMAT)
class BodyLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's loader, deaf to the score head."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(replace(load_config, load_format="auto"))

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
        """All weights but the score head's."""
        return (pair for pair in super().get_all_weights(model_config, model) if not pair[0].startswith("score."))


class KnowsTheFormat:
    """Adds nothing to a worker but the import of this module."""
