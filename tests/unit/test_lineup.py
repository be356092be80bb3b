"""Who is served under which name, on which engines, and what a change leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from psyray.errors import PsyrayError
from psyray.origin import called, note_origin
from psyray.sections.data import EngineSection
from serve.champion import Args, Champion, Policy, Reward
from serve.lineup import BASE, Lineup, beside, lineup, of_rounds


def model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return folder


def adapter(folder: Path, base: Path, rank: int = 8) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "base_model_name_or_path": str(base)}))
    return folder


def champion(home: Path, number: int = 1, policy: Path | None = None) -> Champion:
    return Champion(
        policy=Policy(
            name=f"psyray-round-{number}",
            path=str(policy or model(home / f"policy-{number}")),
            round=number,
            system="Be kind.",
        ),
        reward=Reward(name="psyray-reward", path=str(model(home / "reward"))),
        run=home,
        id=f"export{number}",
        reward_id="scoring",
    )


def found(home: Path, who: Champion, engine: EngineSection | None = None, **words: Any) -> Lineup:
    asked = Args.read({"runs": str(home), **words}).settled()
    return lineup(asked, who, engine or EngineSection(), "psyray", gpu=False)


def test_the_champion_answers_to_its_name_to_its_title_and_to_none(tmp_path: Path) -> None:
    seen = found(tmp_path, champion(tmp_path))
    (served,) = seen.models
    assert seen.called(None) == seen.called("champion") == seen.called("psyray-round-1") == served
    assert seen.called("psyray-round-2") is None and served.called == BASE and served.export == "export1"
    assert seen.reward is not None and (seen.reward.export, len(seen.parts)) == ("scoring", 2)
    assert {part.app.rpartition(".")[0] for part in seen.parts} == {"psyray.policy", "psyray.reward"}
    assert found(tmp_path, champion(tmp_path), reward="false").reward is None


def test_adapters_wear_one_engine_and_other_models_have_their_own(tmp_path: Path) -> None:
    who = champion(tmp_path)
    warm, brief = (adapter(tmp_path / name, Path(who.policy.path), rank) for name, rank in (("warm", 4), ("brief", 16)))
    other = model(tmp_path / "other")
    seen = found(tmp_path, who, beside=f"warm={warm},other={other},brief={brief}")
    assert [served.name for served in seen.models] == ["psyray-round-1", "warm", "other", "brief"]
    assert [served.called for served in seen.models] == [BASE, "warm", BASE, "brief"]
    apps = [served.app for served in seen.models]
    assert apps[0] == apps[1] == apps[3] != apps[2]
    part = next(part for part in seen.parts if part.app == apps[0])
    assert part.adapters == (("warm", str(warm)), ("brief", str(brief)))
    # On CPU one slot more than adapters: psyray/engines/vllm.py says why.
    assert part.llm and part.llm["engine_kwargs"]["max_loras"] == 3 and part.llm["engine_kwargs"]["max_lora_rank"] == 16
    assert all(served.policy.system == "Be kind." for served in seen.models)


def test_a_new_champion_leaves_what_both_need_alone(tmp_path: Path) -> None:
    first, second = champion(tmp_path), champion(tmp_path, 2)
    words = {"beside": f"warm={adapter(tmp_path / 'warm', Path(first.policy.path))}"}
    before, after = (found(tmp_path, who, **words) for who in (first, second))
    kept = {part.app for part in before.parts} & {part.app for part in after.parts}
    assert len(before.parts) == 2 and len(after.parts) == 3 and kept == {part.app for part in before.parts}
    assert before.models[0].app != after.models[0].app and before != after
    assert found(tmp_path, first, **words) == before


def test_other_settings_or_other_files_are_another_engine(tmp_path: Path) -> None:
    who = champion(tmp_path)
    apps = {found(tmp_path, who).models[0].app, found(tmp_path, who, EngineSection(max_model_len=512)).models[0].app}
    apps.add(found(tmp_path, who, replicas="1-3").models[0].app)
    (Path(who.policy.path) / "config.json").write_text('{"changed": 1}')
    apps.add(found(tmp_path, who).models[0].app)
    assert len(apps) == 4


def test_replicas_and_the_time_for_last_answers_reach_serve(tmp_path: Path) -> None:
    words = {"replicas": "1-4", "ongoing": "8", "reward_replicas": "2", "timeout_s": "120", "up_after_s": "5"}
    engine, reward = found(tmp_path, champion(tmp_path), **words).parts
    options = (engine.llm or {})["deployment_config"]
    scaling = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8}
    scaling |= {"upscale_delay_s": 5, "downscale_delay_s": 600}
    assert options["autoscaling_config"] == scaling and options["graceful_shutdown_timeout_s"] == 120
    assert (reward.options or {})["num_replicas"] == 2 and (reward.options or {})["graceful_shutdown_timeout_s"] == 120


@pytest.mark.parametrize("name", ["champion", "psyray-round-1"])
def test_a_name_means_one_policy(tmp_path: Path, name: str) -> None:
    with pytest.raises(PsyrayError, match=f"two policies would answer to the name '{name}'"):
        found(tmp_path, champion(tmp_path), beside=f"{name}={model(tmp_path / 'other')}")


def made_rounds(home: Path) -> Champion:
    stages = []
    for number in (1, 2, 3):
        folder = home / f"stages/round-{number}/policy/f{number}"
        model(folder / "model")
        made = {"stage": f"round-{number}/policy", "fingerprint": f"f{number}", "stats": {}}
        (folder / "manifest.json").write_text(json.dumps(made))
        stages.append({"name": f"round-{number}/policy", "fingerprint": f"f{number}"})
    (home / "run.json").write_text(json.dumps({"stages": stages}))
    (home / "config.yaml").write_text(f"policy: {{model: {model(home / 'start')}}}")
    return champion(home, 2, home / "stages/round-2/policy/f2/model")


def test_rounds_are_found_in_the_run(tmp_path: Path) -> None:
    who = made_rounds(tmp_path)
    rounds = {policy.name: (policy.path, export) for policy, export in of_rounds("all", who)}
    assert rounds == {
        "psyray-round-0": (str(tmp_path / "start"), "start"),
        "psyray-round-1": (str(tmp_path / "stages/round-1/policy/f1/model"), "f1"),
        "psyray-round-3": (str(tmp_path / "stages/round-3/policy/f3/model"), "f3"),
    }
    assert [policy.round for policy, _ in of_rounds("3,1,2", who)] == [3, 1] and list(of_rounds("", who)) == []
    for wrong in ("7", "x", "1,,2"):
        with pytest.raises(PsyrayError, match=r"has no round .*there are 0, 1, 2, 3, or say all"):
            list(of_rounds(wrong, who))
    seen = found(tmp_path, who, rounds="1", beside=f"late={tmp_path / 'stages/round-3/policy/f3/model'}")
    assert [(s.name, s.export) for s in seen.models] == [
        ("psyray-round-2", "export2"),
        ("psyray-round-1", "f1"),
        ("late", "f3"),
    ]


def test_what_stands_beside_says_where_it_came_from_or_what_it_is_called(tmp_path: Path) -> None:
    who = made_rounds(tmp_path)
    base = tmp_path / "stages/round-3/policy/f3/model"
    inside, outside = adapter(base.parent / "adapter", base), adapter(tmp_path / "adapters/late", base)
    note_origin(inside, outside)
    plain = adapter(tmp_path / "adapters/own-é", base)
    words = f"inside={inside},outside={outside},plain={plain}"
    ids = {policy.name: export for policy, export in beside(Args.read({"beside": words}).settled().beside, who)}
    assert ids == {"inside": "f3", "outside": "f3", "plain": "own-?"}
    assert called("org/model", Path("org/model")) == "org/model"
