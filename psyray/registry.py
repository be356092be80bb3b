"""The champion in MLflow's registry: which version it is, and making another version champion.

    psyray promote runs/demo              the champion that a finished run exported
    psyray promote psyray-policy/3        an earlier version: going back

A run registers its policy and its reward model under one fingerprint, that of its export, so both move together.
"""

from __future__ import annotations

from pathlib import Path

from psyray.addresses import redact
from psyray.errors import PsyrayError
from psyray.lineage import in_registry, in_runs
from psyray.mlflow_client import registry, registry_beside, registry_of

MODELS = ("psyray-policy", "psyray-reward")


def promote(model: str, runs: Path, tracking: str | None = None) -> dict[str, str]:
    """Make a registered export the champion; the version of each model by its name.

    `model` is a run's folder, the id of an export, NAME/VERSION or NAME@ALIAS. `tracking` is the registry; None: where
    the run registers, and for a name the one beside `runs`. PsyrayError where it is no export or is not registered.
    """
    place = in_runs(model, runs)
    tracking = tracking or (registry_of(place.run) if place else registry_beside(runs))
    place = place or in_registry(model, tracking)
    if place.stage.name != "export":
        raise PsyrayError(f"{model} is the stage {place.stage.name} of {place.run}; only an export can be champion")
    with registry(tracking) as client:
        wanted = f"tags.`psyray.fingerprint` = '{place.stage.fingerprint}'"
        versions = {
            name: max(
                (int(v.version) for v in client.search_model_versions(f"name = '{name}' and {wanted}")), default=0
            )
            for name in MODELS
        }
        if lacking := [name for name, version in versions.items() if not version]:
            raise PsyrayError(
                f"{place.run} has not registered its {lacking[0]} at {redact(tracking)}; "
                f"`psyray run CONFIG run.path={place.run}` again does"
            )
        for name, version in versions.items():
            client.set_registered_model_alias(name, "champion", str(version))
    return {name: str(version) for name, version in versions.items()}
