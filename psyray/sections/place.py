"""Settings of where a run works: tracking, the label ledger, the cluster."""

from __future__ import annotations

from pydantic import Field

from psyray.sections.data import Section


class TrackSection(Section):
    uri: str | None = Field(
        None,
        description="MLflow, without a password; none: MLFLOW_TRACKING_URI, else SQLite beside the run folders",
    )
    experiment: str = "psyray"


class LedgerSection(Section):
    url: str | None = Field(
        None,
        description="any SQLAlchemy URL, without a password (docs/oracles.md); none: SQLite beside the run folders",
    )


class ClusterSection(Section):
    address: str | None = Field(None, description="a running Ray; none: RAY_ADDRESS, else one is started here")
    logical_cpus: int = Field(
        4, ge=3, description="for a Ray started here: slots for light tasks, not cores; each GPU adds one"
    )
    object_store_mib: int = Field(256, ge=80)
    wait_s: float = Field(60, gt=0, description="how long a stage waits for missing resources before it stops")
