"""The files that ship for clusters hold to the schemas of those who read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from psyray.config import load_config
from psyray.data.generate import draw_row, start_of
from psyray.needs import missing
from psyray.pipeline import check_settings
from psyray.placement import places

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("size", ["3b", "8b"])
def test_the_papers_recipe(size: str) -> None:
    config = load_config(CONFIGS / f"psychocounsel-{size}.yaml")
    reward, dpo, loop = config.reward.train, config.dpo.train, config.loop
    assert config.policy.model == config.reward.model and size in config.policy.model.lower()
    assert (reward.epochs, reward.batch_size, reward.learning_rate, reward.max_length) == (2, 128, 9e-6, 2048)
    assert (config.dpo.beta, dpo.batch_size, dpo.learning_rate) == (0.1, 64, 5e-7)
    assert (loop.prompts, loop.k, loop.acquisition) == (6400, 8, "max_min")
    assert loop.rounds * loop.prompts * dpo.epochs / dpo.batch_size == 1600
    assert (config.pairs.gap, config.pairs.gap_on) == (1.0, "mean")
    assert len({responder.model for responder in config.responses.responders}) >= 8


@pytest.mark.parametrize("size", ["3b", "8b"])
def test_another_judge_grades_than_the_one_that_labels(size: str) -> None:
    config = load_config(CONFIGS / f"psychocounsel-{size}.yaml")
    check_settings(config)
    second = config.evaluate.second
    assert second and second.engine != config.judge.engine and not config.evaluate.second_decides
    assert second.model in {responder.model for responder in config.responses.responders} - {config.policy.model}


def test_recipes_differ_only_in_size() -> None:
    small, large = (load_config(CONFIGS / f"psychocounsel-{size}.yaml") for size in ("3b", "8b"))
    for section in ("speeches", "engine", "responses", "judge", "pairs", "loop", "evaluate", "cluster"):
        assert getattr(small, section) == getattr(large, section)


@pytest.mark.parametrize("gpus", [1, 8])
def test_adapters_of_an_8b_model_find_room_on_the_gpus_of_one_machine(gpus: int) -> None:
    words = [f"{name}={gpus}" for name in ("engine.replicas", "reward.train.workers", "dpo.train.workers")]
    config = load_config(CONFIGS / "llama-8b-lora.yaml", words)
    check_settings(config)
    machine = [{"CPU": config.cluster.logical_cpus + gpus, "GPU": gpus}]
    for place in places(config, gpu=True):
        assert not missing(place.bundles, machine), place
    judges = {config.judge.model, config.evaluate.second and config.evaluate.second.model}
    assert len(judges) == 2 and config.policy.model not in judges


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_configs_hold_no_key(path: Path) -> None:
    assert not re.search(r"(sk-|hf_|AKIA)[A-Za-z0-9]{8,}", path.read_text())


def test_serve_file_fits_rays_schema_and_stays_on_loopback() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.champion import Args

    schema = ServeDeploySchema.model_validate(read(CONFIGS / "serve.yaml"))
    (application,) = schema.applications
    assert (schema.http_options.host, application.import_path) == ("127.0.0.1", "serve.app:build")
    assert Args.read(application.args).run == Path("runs/demo")
    # The words that stand there commented out are ones too.
    offered = re.findall(r"^ +# ([a-z_]+): (\S+)", (CONFIGS / "serve.yaml").read_text(), re.MULTILINE)
    Args.read({name: yaml.safe_load(value) for name, value in offered})
    assert len(offered) > 8


def test_what_the_serve_file_offers_beside_fits_too() -> None:
    """The pages stand there as comments, for they need keys."""
    from ray.serve.schema import ServeDeploySchema

    from serve.annotate import Args as Annotation
    from serve.compare import Args

    text = (CONFIGS / "serve.yaml").read_text()
    head, found, rest = text.partition("  # - name: compare")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(head + (found + rest).replace("  # ", "  ")))
    _, compare, annotate = schema.applications
    assert (annotate.route_prefix, annotate.import_path) == ("/annotate", "serve.annotate:build")
    assert Annotation.read(annotate.args).run == Args.read(compare.args).run
    assert (compare.route_prefix, compare.import_path) == ("/compare", "serve.compare:build")
    assert Args.read(compare.args).url == f"http://{schema.http_options.host}:{schema.http_options.port}"


def test_cluster_file_fits_rays_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read(ROOT / "cluster.yaml")))


def test_cluster_nodes_make_sense() -> None:
    import ray

    cluster = read(ROOT / "cluster.yaml")
    types = cluster["available_node_types"]
    head = types.pop(cluster["head_node_type"])
    assert head["resources"]["GPU"] == 0 and head["max_workers"] == 0
    for worker in types.values():
        assert (
            worker["resources"]["GPU"] > 0 and worker["min_workers"] <= worker["max_workers"] <= cluster["max_workers"]
        )
    assert sum(worker["min_workers"] for worker in types.values()) <= cluster["max_workers"]
    images = (cluster["docker"]["image"], cluster["docker"]["head_image"])
    assert all(image.startswith(f"rayproject/ray:{ray.__version__}-py311-") for image in images)


def test_cluster_asks_for_the_token_and_keeps_the_dashboard_on_loopback() -> None:
    cluster = read(ROOT / "cluster.yaml")
    assert "-e RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in cluster["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert any(command.startswith("ray start") for command in commands)


def test_the_pool_in_the_docs_is_a_valid_configuration(tmp_path):
    page = (ROOT / "docs/responders.md").read_text()
    (tmp_path / "pool.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    pool = {r.name: r for r in load_config(tmp_path / "pool.yaml").responses.responders}
    assert pool["remote"].endpoint and pool["remote"].endpoint.max_cost == 40 and pool["adapted"].adapter
    speech = {"speech_id": "s", "messages": [{"role": "user", "content": "x"}], "split": "train"}
    assert len({start_of(draw_row(speech, r, "", 0)) for r in pool.values()}) == 3
