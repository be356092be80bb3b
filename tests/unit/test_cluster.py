"""The Ray session, where Ray does not do what it is asked."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import ray

from psyray.cluster import ray_session
from psyray.config import Config
from psyray.errors import PsyrayError


def test_a_ray_that_does_not_start_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**settings: Any) -> NoReturn:
        assert settings["address"] == "local"
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with (
        pytest.raises(PsyrayError, match="did not start on this machine: The current node timed out"),
        ray_session(Config()),
    ):
        pass
