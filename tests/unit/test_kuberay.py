"""configs/kuberay holds to the schemas of Kubernetes and KubeRay, is closed to the outside, and runs what exists."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from psyray.cli import app
from psyray.config import load_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "kuberay"
KUBERNETES = "1.30"
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text())
IN_IMAGE = "/home/ray/psyray/"  # where the Dockerfile puts the tree
ROLE = "psyray.io/role"


def objects() -> dict[str, dict[str, Any]]:
    """All objects of the folder by kind and name."""
    found = (thing for path in sorted(FOLDER.glob("*.yaml")) for thing in yaml.safe_load_all(path.read_text()))
    return {f"{thing['kind']}/{thing['metadata']['name']}": thing for thing in found}


OBJECTS = objects()
RAY = {name: thing for name, thing in OBJECTS.items() if thing["apiVersion"] == "ray.io/v1"}
POLICIES = [thing["spec"] for thing in OBJECTS.values() if thing["kind"] == "NetworkPolicy"]


def cluster(thing: dict[str, Any]) -> dict[str, Any]:
    """The cluster in a Ray object."""
    spec = thing["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def templates(thing: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a Ray object, the head's first."""
    return [group["template"] for group in (cluster(thing)["headGroupSpec"], *cluster(thing)["workerGroupSpecs"])]


def check(thing: dict[str, Any]) -> None:
    """Raise what Kubernetes or the operator would refuse an object for."""
    if thing["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
        return
    jsonschema.validate(thing, SCHEMA | {"$ref": f"#/$defs/{thing['kind']}"})
    for template in (*templates(thing), autoscaler(thing)):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def autoscaler(thing: dict[str, Any]) -> dict[str, Any]:
    """The container that the operator makes of the autoscaler's options, in a pod template."""
    given = {key: value for key, value in cluster(thing)["autoscalerOptions"].items() if key != "idleTimeoutSeconds"}
    return {"spec": {"containers": [{"name": "autoscaler", **given}]}}


def everything(thing: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    for key, value in thing.items() if isinstance(thing, dict) else enumerate(thing):
        yield str(key), value
        if isinstance(value, dict | list):
            yield from everything(value)


@pytest.mark.parametrize("name", OBJECTS)
def test_it_holds_to_the_schema(name: str) -> None:
    check(OBJECTS[name])


def test_all_three_kinds_are_there() -> None:
    assert {thing["kind"] for thing in RAY.values()} == {"RayCluster", "RayJob", "RayService"}


@pytest.mark.parametrize("name", RAY)
def test_a_group_is_never_smaller_or_larger_than_it_may_be(name: str) -> None:
    for group in cluster(RAY[name])["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


HEAD = ["spec", "headGroupSpec", "template", "spec"]
AUTOSCALER = ["spec", "autoscalerOptions"]
WRONG_TYPE = "is not of type"


@pytest.mark.parametrize(
    ("name", "path", "key", "value", "told"),
    [
        ("RayCluster/psyray", ["spec"], "headGroupSpecs", {}, "'headGroupSpecs' was unexpected"),
        ("RayCluster/psyray", ["spec", "workerGroupSpecs", 0], "maxReplica", 2, "'maxReplica' was unexpected"),
        ("RayCluster/psyray", ["spec", "workerGroupSpecs", 0], "replicas", "2", WRONG_TYPE),
        ("RayCluster/psyray", ["spec", "headGroupSpec", "rayStartParams"], "num-gpus", 0, WRONG_TYPE),
        ("RayCluster/psyray", HEAD, "gracePeriod", 90, "'gracePeriod' was unexpected"),
        (
            "RayCluster/psyray",
            [*HEAD, "containers", 0],
            "imagePullPolice",
            "Always",
            "'imagePullPolice' was unexpected",
        ),
        ("RayCluster/psyray", HEAD, "containers", [], "[] should be non-empty"),
        ("RayCluster/psyray", ["spec"], "rayVersion", "2.51.1", "'2.51.1' does not match"),
        ("RayCluster/psyray", ["spec", "workerGroupSpecs", 0], "maxReplicas", 2**31, "greater than the maximum"),
        ("RayCluster/psyray", [*AUTOSCALER, "resources", "limits"], "memory", "1 GiB", "'1 GiB' does not match"),
        ("RayCluster/psyray", [*AUTOSCALER, "securityContext"], "privilege", True, "'privilege' was unexpected"),
        ("RayJob/psyray-run", ["spec"], "shutdownAfterJobFinishes", False, "600 is greater than the maximum of 0"),
        ("RayJob/psyray-run", ["spec"], "entryPoint", "python", "'entryPoint' was unexpected"),
        ("RayJob/psyray-run", ["spec"], "submissionMode", "HttpMode", "'HttpMode' is not one of"),
        ("RayJob/psyray-run", ["spec", "rayClusterSpec", "authOptions"], "mode", "tokens", "'tokens' is not one of"),
        ("RayService/psyray-model", ["spec"], "rayClusterSpec", {}, "'rayClusterSpec' was unexpected"),
        (
            "RayService/psyray-model",
            ["spec", "upgradeStrategy"],
            "type",
            "NewClusterWithIncrementalUpgrade",
            "is not one of",
        ),
        ("NetworkPolicy/psyray-run", ["spec"], "ingres", [], "'ingres' was unexpected"),
        ("PersistentVolumeClaim/psyray-runs", ["spec"], "accessModes", "ReadWriteMany", WRONG_TYPE),
    ],
)
def test_a_misspelt_field_or_a_wrong_value_is_refused(
    name: str, path: list[Any], key: str, value: Any, told: str
) -> None:
    thing = copy.deepcopy(OBJECTS[name])
    at: Any = thing
    for step in path:
        at = at[step]
    at[key] = value
    with pytest.raises(jsonschema.ValidationError) as refused:
        check(thing)
    assert told in refused.value.message


@pytest.mark.parametrize("name", RAY)
def test_nothing_leads_in_from_outside_and_ray_asks_for_the_token(name: str) -> None:
    spec = cluster(RAY[name])
    assert spec["authOptions"] == {"mode": "token", "secretName": "psyray-ray-token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    open_ways = {"hostPort", "hostNetwork", "nodePort", "loadBalancerIP", "externalIPs", "enableIngress", "headService"}
    assert not open_ways & {key for key, _ in everything(RAY[name])}
    ports = {port["containerPort"] for template in templates(RAY[name]) for port in ports_of(template)}
    assert ports <= {6379, 8265, 8000}  # not 10001, where Ray's client would be let in


def ports_of(template: dict[str, Any]) -> list[dict[str, Any]]:
    return [port for container in template["spec"]["containers"] for port in container.get("ports", [])]


def test_no_object_is_a_way_in_or_a_secret() -> None:
    assert {thing["kind"] for thing in OBJECTS.values()} & {"Service", "Ingress", "Gateway", "Secret"} == set()


@pytest.mark.parametrize("name", RAY)
def test_a_network_policy_covers_every_pod(name: str) -> None:
    for template in templates(RAY[name]):
        labels = template["metadata"]["labels"]
        (policy,) = [p for p in POLICIES if p["podSelector"]["matchLabels"].items() <= labels.items()]
        assert policy["policyTypes"] == ["Ingress"]
        for rule in policy["ingress"]:
            (source,) = rule["from"]
            who = source["podSelector"]["matchLabels"]
            reached = {port["port"] for port in rule.get("ports", [])} or {"all"}
            if who == {"psyray.io/may-ask": "yes"}:
                assert reached == {8000} and labels[ROLE] == "serve"
            elif "namespaceSelector" in source:
                assert who == {"app.kubernetes.io/name": "kuberay-operator"} and reached <= {8265, 8000}
            else:
                assert who == {ROLE: labels[ROLE]}


@pytest.mark.parametrize("name", RAY)
def test_pods_are_not_root_are_bounded_and_probed(name: str) -> None:
    for template in templates(RAY[name]):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["path"] in {"/api/healthz", "/api/gcs_healthz", "/-/healthz"}


@pytest.mark.parametrize("name", RAY)
def test_run_folders_lie_on_the_shared_volume(name: str) -> None:
    claim = OBJECTS["PersistentVolumeClaim/psyray-runs"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in templates(RAY[name]):
        (container,) = template["spec"]["containers"]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        source = volumes[mounts[environment["PSYRAY_HOME"]]]["persistentVolumeClaim"]
        assert source["claimName"] == claim["metadata"]["name"]


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"(sk-|hf_|AKIA)[A-Za-z0-9]{8,}|://[^/@\s]+:[^/@\s]+@", text)
    for thing in yaml.safe_load_all(text) if path.suffix == ".yaml" else []:
        for key, value in everything(thing):
            if key == "env":
                assert not [entry for entry in value if re.search("TOKEN|KEY|PASSWORD|SECRET", entry["name"])]


def test_the_image_is_one_setting_and_has_the_pinned_ray() -> None:
    import ray

    images = {c["image"] for thing in RAY.values() for t in templates(thing) for c in t["spec"]["containers"]}
    assert images == {"PSYRAY-IMAGE"}
    page = (ROOT / "docs/operator.md").read_text()
    for path in FOLDER.glob("ray*.yaml"):
        command = (
            f"sed s,PSYRAY-IMAGE,REGISTRY/psyray:0.1.0, configs/kuberay/{path.name} | kubectl apply -n psyray -f -"
        )
        assert command in path.read_text() and command in page
    assert {cluster(thing)["rayVersion"] for thing in RAY.values()} == {ray.__version__}
    dockerfile = (FOLDER / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{ray.__version__}-py311-gpu\n" in dockerfile
    for source in re.findall(r"^COPY --chown=ray:users (\S+)", dockerfile, re.MULTILINE):
        assert (ROOT / source).exists()
    assert re.findall(r"/psyray/(requirements/\S+)", dockerfile) == ["requirements/gpu.txt"]


def test_the_job_is_a_command_of_ours_with_a_configuration_that_loads() -> None:
    python, flag, module, command, *arguments = shlex.split(RAY["RayJob/psyray-run"]["spec"]["entrypoint"])
    assert (python, flag, module, command) == ("python", "-m", "psyray", "run")
    assert (ROOT / "psyray" / "__main__.py").is_file()
    here = [word.replace(IN_IMAGE, f"{ROOT}/") for word in arguments]
    parsed = typer.main.get_command(app).commands[command].make_context(command, list(here)).params  # type: ignore[attr-defined]
    config = load_config(parsed["config"], parsed["settings"])
    assert config.run.path.is_relative_to("/mnt/psyray") and config.speeches.path.startswith("/mnt/psyray/")
    gpus = max(config.reward.train.workers, config.dpo.train.workers, config.engine.replicas)
    (group,) = cluster(RAY["RayJob/psyray-run"])["workerGroupSpecs"]
    held = group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert int(held) * group["maxReplicas"] >= gpus


def test_the_service_serves_what_serve_yaml_does() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.champion import Args

    spec = RAY["RayService/psyray-model"]["spec"]
    served = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    alone = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "configs/serve.yaml").read_text()))
    names = [[(a.name, a.route_prefix, a.import_path) for a in file.applications] for file in (served, alone)]
    assert names[0] == names[1]
    (application,) = served.applications
    asked = Args.read(application.args)
    mounts = [mount["mountPath"] for t in templates(RAY["RayService/psyray-model"]) for c in t["spec"]["containers"]
              for mount in c["volumeMounts"]]  # fmt: skip
    assert mounts.count(str(asked.keys.parent)) == len(templates(RAY["RayService/psyray-model"]))
    assert asked.run == Path("runs/psychocounsel-8b")
    # vLLM's build for GPUs runs nowhere else: the policy's engine and the reward model's have one each.
    (group,) = cluster(RAY["RayService/psyray-model"])["workerGroupSpecs"]
    assert asked.device == "gpu" and group["minReplicas"] >= 1 + asked.reward_gpus == 2
    head = templates(RAY["RayService/psyray-model"])[0]
    assert (served.http_options.host, served.http_options.port) == ("0.0.0.0", 8000)
    assert 8000 in {port["containerPort"] for port in ports_of(head)}


def test_the_clusters_of_the_three_differ_only_in_what_they_are_for() -> None:
    runs, job = cluster(RAY["RayCluster/psyray"]), cluster(RAY["RayJob/psyray-run"])
    assert runs == job
    (first, *_), (other, *_) = templates(RAY["RayCluster/psyray"]), templates(RAY["RayService/psyray-model"])
    for key in ("env", "envFrom", "securityContext", "resources", "livenessProbe"):
        assert first["spec"]["containers"][0][key] == other["spec"]["containers"][0][key]
