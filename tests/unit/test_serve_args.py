"""The words of `serve run`, the champion file, what the policy's requests get, and the shared forward pass."""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from ray.serve.config import AutoscalingConfig

from psyray.errors import PsyrayError
from psyray.reward.uncertainty import Belief
from psyray.sections.data import EngineSection
from serve.access import Limits
from serve.champion import Args, Policy, Replicas, read_champion, read_engine
from serve.guard import crisis_hits
from serve.mistakes import in_one_line
from serve.policy import engine_settings, with_defaults
from serve.request import serving
from serve.reward import MAX_ITEMS, ScoreRequest, features_together, judged

SERVE_FILE = Path(__file__).parents[2] / "configs/serve.yaml"
CLIENT = {"role": "user", "content": "I keep putting off the phone call to my sister."}


def finished_run(folder: Path) -> Path:
    """A run folder with a champion whose models are empty folders that look right."""
    for name in ("policy", "reward"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    (folder / "heads.npz").write_bytes(b"")
    champion = {
        "policy": {"name": "psyray-round-2", "path": str(folder / "policy"), "round": 2, "system": "Be kind."},
        "reward": {"name": "psyray-reward", "path": str(folder / "reward"), "heads": str(folder / "heads.npz")},
        "run": str(folder),
    }
    (folder / "champion.json").write_text(json.dumps(champion))
    return folder


def test_words_are_read() -> None:
    args = Args.read({"run": "runs/demo", "reward": "false", "device": "cpu", "beside": "a=x,b=y", "replicas": "1-4"})
    assert (args.run, args.reward, args.device) == (Path("runs/demo"), False, "cpu")
    assert args.beside == {"a": "x", "b": "y"} and (args.replicas.least, args.replicas.most) == (1, 4)
    assert args.looks_every_s is None and Args.read({}).looks_every_s == 30
    assert Args.read({"run": "x", "follow_s": "5"}).looks_every_s == 5


def test_words_for_limits_are_the_ports_and_have_its_defaults() -> None:
    assert Args.read({}).limits == Limits()
    limits = Args.read({"body_bytes": "9000", "messages": "7", "tokens": "99", "in_flight": "3"}).limits
    assert (limits.body_bytes, limits.messages, limits.tokens, limits.in_flight) == (9000, 7, 99, 3)


def test_every_serve_command_in_the_docs_is_one() -> None:
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    lines = [line for page in pages for line in re.findall(r"serve run serve\.app:build([^\n`#]*)", page.read_text())]
    assert len(lines) > 5
    for line in lines:
        Args.read(dict(word.split("=", 1) for word in shlex.split(line)))


def test_settled_words_mean_the_same_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PSYRAY_HOME", raising=False)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "runs/demo").mkdir(parents=True)
    settled = Args.read({"run": "runs/demo", "beside": "a=adapter,b=org/model"}).settled()
    assert (settled.run, settled.runs) == (tmp_path / "runs/demo", tmp_path / "runs")
    assert settled.beside == {"a": str(tmp_path / "adapter"), "b": "org/model"}
    assert Args.read({}).settled().run is None


def test_the_run_of_a_job_is_found_by_the_words_of_the_serve_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PSYRAY_HOME", raising=False)
    [words] = [app["args"] for app in yaml.safe_load(SERVE_FILE.read_text())["applications"]]
    with pytest.raises(
        PsyrayError, match=rf"no run at {tmp_path}/runs/demo or {tmp_path}/home/.psyray/runs/demo; give"
    ):
        Args.read(words).settled()
    run = finished_run(tmp_path / "home/.psyray/runs/demo")  # where a job writes with PSYRAY_HOME unset
    assert Args.read(words).settled().run == run
    assert read_champion(Path("runs/demo")).policy.path == str(run / "policy")


def test_replicas_are_a_number_or_scale_between_two() -> None:
    assert Replicas(2, 2).options(8, 30, 600) == {"num_replicas": 2}
    scaling = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8}
    delays = {"upscale_delay_s": 5, "downscale_delay_s": 60}
    assert Replicas(1, 4).options(8, 5, 60) == {"autoscaling_config": scaling | delays}
    asked = Args.read({})  # as Serve does unless told otherwise
    by_default = AutoscalingConfig()
    assert (asked.up_after_s, asked.down_after_s) == (by_default.upscale_delay_s, by_default.downscale_delay_s)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"rnu": "x"}, "unknown argument 'rnu'; did you mean 'run'"),
        ({"run": "x", "rewards": "false"}, "did you mean 'reward'"),
        ({"run": "x", "qqq": "1"}, "known: run, model"),
        ({"replicas": "4-2"}, "replicas: .*number of replicas is 2, or 1-4"),
        ({"replicas": "some"}, "replicas: .*number of replicas"),
        ({"beside": "warm"}, "beside: .*NAME=FOLDER.*'warm'"),
        ({"beside": "a b=folder"}, "beside: .*'a b'"),
        ({"run": "x", "reward": "perhaps"}, "reward: .*boolean"),
        ({"run": "x", "device": "tpu"}, "device: .*'auto', 'cpu' or 'gpu'"),
    ],
)
def test_wrong_words_are_named(words: dict[str, str], message: str) -> None:
    with pytest.raises(PsyrayError, match=message):
        Args.read(words)


def test_champion_is_read_also_after_a_move(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    assert read_champion(run).policy.path == str(run / "policy")
    moved = run.rename(tmp_path / "moved")
    champion = read_champion(moved)
    assert (champion.policy.path, champion.reward.heads) == (str(moved / "policy"), moved / "heads.npz")


def test_unready_runs_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PsyrayError, match=r"no run folder at .*absent.*psyray run CONFIG"):
        read_champion(tmp_path / "absent")
    with pytest.raises(PsyrayError, match=r"not finished \(no champion.json\)"):
        read_champion(tmp_path)
    run = finished_run(tmp_path / "run")
    (run / "reward" / "config.json").unlink()
    with pytest.raises(PsyrayError, match=r"reward is no Hugging Face model folder"):
        read_champion(run)
    assert read_champion(run, reward=False).policy.round == 2
    (run / "champion.json").write_text('{"policy": ')
    with pytest.raises(PsyrayError, match="is no JSON"):
        read_champion(run)


def test_engine_settings_come_from_the_run(tmp_path: Path) -> None:
    assert read_engine(tmp_path) == EngineSection()
    (tmp_path / "config.yaml").write_text("engine: {max_model_len: 512, dtype: float32}")
    assert (read_engine(tmp_path).max_model_len, read_engine(tmp_path).dtype) == (512, "float32")


def test_cpu_settings_are_chosen_without_a_gpu(tmp_path: Path) -> None:
    on_cpu, on_gpu = (engine_settings("p", str(tmp_path), EngineSection(), gpu=gpu) for gpu in (False, True))
    assert (on_cpu["accelerator_config"]["kind"], on_gpu["accelerator_config"]["kind"]) == ("cpu", "gpu")
    assert "VLLM_CPU_KVCACHE_SPACE" in on_cpu["runtime_env"]["env_vars"]
    assert "VLLM_CPU_KVCACHE_SPACE" not in on_gpu["runtime_env"]["env_vars"]
    assert on_cpu["engine_kwargs"]["enforce_eager"] and not on_gpu["engine_kwargs"]["enforce_eager"]


def test_policy_defaults_yield_to_the_client() -> None:
    policy = Policy(name="p", path="p", round=1, system="Be kind.", temperature=0.5, top_p=0.9, max_tokens=7)
    bare = with_defaults({"messages": [CLIENT]}, policy)
    assert bare["messages"][0] == {"role": "system", "content": "Be kind."} and "stop" not in bare
    assert (bare["temperature"], bare["top_p"], bare["max_completion_tokens"]) == (0.5, 0.9, 7)
    own = {"role": "system", "content": "Answer in one word."}
    full = with_defaults({"messages": [own, CLIENT], "temperature": 0.0, "max_tokens": 3}, policy)
    assert full["messages"] == [own, CLIENT] and (full["temperature"], full["max_tokens"]) == (0.0, 3)
    assert "max_completion_tokens" not in full
    stopped = policy.model_copy(update={"stop": ["."]})
    assert with_defaults({"messages": [CLIENT]}, stopped)["stop"] == ["."]
    assert with_defaults({"messages": [CLIENT], "stop": "!"}, stopped)["stop"] == "!"


def test_only_the_clients_words_raise_the_crisis_header() -> None:
    crisis = "I want to kill myself"
    parts = [{"type": "text", "text": crisis}]
    assert crisis_hits([{"role": "user", "content": crisis}, {"role": "assistant", "content": "ok"}])
    assert crisis_hits([{"role": "user", "content": parts}])
    assert not crisis_hits([{"role": "system", "content": crisis}, CLIENT])


class TwoHeads:
    """Stands in for a reward model's: head 0 is the first feature, head 1 is twice that."""

    def belief(self, features_ND: np.ndarray) -> Belief:
        scores_NH = features_ND[:, :1] * np.array([1.0, 2.0])
        return Belief(scores_NH.mean(axis=1), scores_NH.std(axis=1))

    def ratings(self, features_ND: np.ndarray) -> list[dict[str, float]]:
        return [{"empathy": n} for n in features_ND[:, 0].tolist()]


class NoRatings(TwoHeads):
    """The same where no judge rated."""

    def ratings(self, features_ND: np.ndarray) -> None:  # type: ignore[override]
        return None


def test_a_score_is_the_heads_mean_and_its_spread_their_deviation() -> None:
    features_ND = np.array([[2.0, 9.0], [4.0, 9.0]])
    first, second = judged(TwoHeads(), features_ND)
    assert (first.score, first.spread, first.principles) == (3.0, 1.0, {"empathy": 2.0})
    assert (second.score, second.spread) == (6.0, 2.0)
    assert [s.principles for s in judged(NoRatings(), features_ND)] == [None, None]


class CountingBody:
    """Stands in for a model's body: a chat's feature is its answer's length; counts the calls."""

    def __init__(self) -> None:
        self.calls = 0

    def features(self, chats: Any) -> np.ndarray:
        self.calls += 1
        return np.array([[float(len(chat[-1]["content"]))] for chat in chats])


def test_requests_that_come_together_share_one_pass_and_keep_their_order() -> None:
    body, requests = CountingBody(), [["a", "bb"], ["cccc"], ["dd"]]
    said = [[[{"role": "assistant", "content": text}] for text in request] for request in requests]
    found = features_together(body, said)  # type: ignore[arg-type]
    assert [rows[:, 0].tolist() for rows in found] == [[1.0, 2.0], [4.0], [2.0]] and body.calls == 1


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "at least 1 item"),
        ([{"messages": [CLIENT], "response": "ok"}] * (MAX_ITEMS + 1), f"at most {MAX_ITEMS} items"),
        ([{"messages": [CLIENT], "response": "x" * 16_001}], "at most 16000 characters"),
        ([{"messages": [CLIENT], "response": ""}], "at least 1 character"),
        ([{"messages": [], "response": "ok"}], "at least 1 item"),
        (
            [{"messages": [CLIENT, {"role": "assistant", "content": "x"}], "response": "ok"}],
            "must have the role 'user'",
        ),
        ([{"messages": [{"role": "robot", "content": "x"}], "response": "ok"}], "'system', 'user' or 'assistant'"),
        ([{"messages": [CLIENT], "answer": "ok"}], "Extra inputs"),
        ([{"messages": [CLIENT], "response": "x" * 15_000}] * 200, "send fewer items"),
    ],
)
def test_bad_score_requests_are_refused(items: list[Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScoreRequest.model_validate({"items": items})


def test_serving_needs_a_ray_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(PsyrayError, match="running Ray session"), serving({}):
        pass


@pytest.mark.parametrize("application", ["app", "annotate", "compare"])
def test_a_mistake_in_the_words_of_serve_run_is_no_traceback(application: str) -> None:
    build = import_module(f"serve.{application}").build
    with pytest.raises(PsyrayError, match="unknown argument 'rnu'; did you mean 'run'") as told:
        build({"rnu": "runs/demo"})
    assert isinstance(told.value, click.ClickException)  # which the command line of Serve prints


def test_a_ray_that_is_gone_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a killed `ray start` leaves it: its address in /tmp/ray, and nobody there."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: "127.0.0.1:9")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    build = in_one_line(lambda args: "an application")
    with pytest.raises(click.ClickException, match=r"no Ray at 127\.0\.0\.1:9: .*refused; .*RAY_ADDRESS=local starts"):
        build({})
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert build({}) == "an application"
