"""Settings: overrides, defaults, and errors that name the mend."""

import pytest

from psyray.addresses import holds_secret
from psyray.config import load_config
from psyray.errors import PsyrayError


def message(*words: str) -> str:
    with pytest.raises(PsyrayError) as caught:
        load_config(None, list(words))
    return str(caught.value)


def test_words_on_the_command_line_go_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("loop: {rounds: 3, k: 2}\n")
    config = load_config(file, ["loop.rounds=1", "speeches.path=a.csv", "judge.budget="])
    assert (config.loop.rounds, config.loop.k, config.speeches.path, config.judge.budget) == (1, 2, "a.csv", None)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("loop.rouns=1", "did you mean 'rounds'"),
        ("lop.rounds=1", "did you mean 'loop'"),
        ("loop.learning_rate=1", "unknown key 'loop.learning_rate'"),
        ("loop.beta=1", "dpo.beta"),
        ("reward.train.lerning_rate=1", "did you mean 'learning_rate'"),
        ("loop.acquisition=drst", "one of random, max_min, uncertainty, infomax"),
        ("loop.rounds=two", "loop.rounds"),
        ("speeches.test_share=1", "speeches.test_share"),
        ("judge.engine=http", "judge.url"),
        ("judge.url=127.0.0.1:8000/v1", "judge.url: write the whole address, for example http://"),
        ("judge.max_cost=5", "price_per_million_tokens"),
        ("judge.price_per_million_tokens=[1, -1]", "price_per_million_tokens"),
        ("dpo.train.batch_size=6", "no multiple"),
        ("reward.train={lora: {rank: 4}, freeze_layers: 2}", "freeze_layers and lora exclude each other"),
        ("reward.train.lora.rnk=4", "did you mean 'rank'"),
        ("dpo.train.dev.patence=2", "did you mean 'patience'"),
        ("reward.train.dev.share=1", "reward.train.dev.share"),
        ("reward.adapters.count=1", "one adapter disagrees with nobody"),
        ("reward.adapters.count=3", "reward.heads.count 10 is no multiple of reward.adapters.count 3"),
        ("reward.adapters.train.lora=", "reward.adapters.train.lora"),
        (
            "reward={adapters: {count: 2}, train: {max_length: 256}}",
            "max_length 512 must be reward.train.max_length 256",
        ),
        ("dpo.train.lora.targets=[lm_head]", "lm_head"),
        ("dpo.loss_type=[sigmod, sft]", "did you mean 'sigmoid'"),
        ("dpo.label_smoothing=0.1", "label_smoothing does nothing without one of"),
        ("dpo.loss_type=[exo_pair, sft]", "needs label_smoothing"),
        ("dpo={f_divergence: js_divergence, loss_type: [apo_zero], loss_weights: [1]}", "f_divergence js_divergence"),
        ("dpo={weighting: true, loss_type: [aot], loss_weights: [1]}", "weighting is by pair"),
        ("dpo={weighting: true, train: {micro_batch: 2}}", "sft is one number for all pairs"),
        ("dpo.f_alpha=0.3", "f_alpha does nothing with f_divergence reverse_kl"),
        ("dpo={ld_alpha: 0.5, loss_type: [sft], loss_weights: [1]}", "ld_alpha does nothing for sft alone"),
        ("dpo.loss_weights=[1.0, -0.1]", "numbers from 0"),
        ("dpo.loss_weights=[0, 0]", "numbers from 0"),
        ("loop.replay_balance=true", "replay_balance does nothing without older pairs"),
        ("evaluate.speeches=5", "on 5 speeches no round could pass, 6 are the least"),
        ("loop.rounds", "key=value"),
        ("run.path.deep=1", "run.path"),
    ],
)
def test_a_wrong_setting_is_one_error_that_names_it(word, expected):
    assert expected in message(word)


@pytest.mark.parametrize("job", ["dpo.train", "reward.train", "reward.adapters.train"])
def test_a_training_job_keeps_its_defaults_where_one_key_is_set(job):
    def section(words):
        found = load_config(None, words)
        for name in job.split("."):
            found = getattr(found, name)
        return found.model_dump()

    assert section([f"{job}.epochs=3"]) == section([]) | {"epochs": 3.0}


def test_a_missing_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(PsyrayError, match=r"no configuration file at .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("loop: [1\n")
    with pytest.raises(PsyrayError, match=r"broken\.yaml is not valid YAML"):
        load_config(broken)


def test_a_responder_with_an_unknown_key_names_the_place():
    assert "responses.responders.0.temprature" in message("responses.responders=[{name: a, temprature: 1}]")


SERVED = "{name: a, model: m, endpoint: {url: URL}}"
HTTP = "{engine: http, model: m, url: URL}"


@pytest.mark.parametrize(
    ("word", "named", "mend"),
    [
        (f"judge={HTTP}", "judge.url", "PSYRAY_JUDGE_API_KEY"),
        (f"topics={HTTP}", "topics.url", "PSYRAY_JUDGE_API_KEY"),
        (f"evaluate.second={HTTP}", "evaluate.second.url", "PSYRAY_JUDGE_API_KEY"),
        (f"panel.judges=[{HTTP}, {HTTP.replace('URL', 'http://h/v1')}]", "panel.judges.0.url", "PSYRAY_JUDGE_API_KEY"),
        (f"responses.responders=[{SERVED}]", "responses.responders.0.endpoint.url", "PSYRAY_API_KEY"),
        ("track.uri=URL", "track.uri", "MLFLOW_TRACKING_PASSWORD"),
    ],
)
@pytest.mark.parametrize("url", ["https://me:hunter2@host/v1", "https://host/v1?api-key=hunter2"])
def test_a_secret_in_an_address_is_refused_with_the_mend_and_not_repeated(word, named, mend, url):
    said = message(word.replace("URL", f'"{url}"') if "{" in word else word.replace("URL", url))
    assert said.startswith(f"{named} holds") and mend in said and "hunter2" not in said


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("https://sk-123@host/v1", True),
        ("http://me:p@ss@host/v1", True),
        ("me:hun#ter2@host/v1", True),
        ("postgresql+psycopg://me:hun/ter2@host/mlflow", True),
        ("postgresql://me@host/mlflow?sslpassword=hunter2", True),
        ("https://host/v1?api-version=1&subscription-key=x", True),
        ("https://host/v1?accessToken=x", True),
        ("https://host/v1?sv=1&sig=x", True),
        ("postgresql://me@host/mlflow?sslkey=client.pem", False),
        ("https://host:8443/v1?api-version=2024-06-01", False),
        ("http://[::1]:8000/v1", False),
        ("sqlite:////home/me@work:1/mlflow.db", False),
        ("./me@work/mlruns", False),
        ("databricks://profile", False),
    ],
)
def test_what_counts_as_a_secret_in_an_address(url, secret):
    assert holds_secret(url) is secret


def test_an_error_about_a_section_repeats_no_password_in_it():
    assert "hunter2" not in message('judge={engine: http, url: "http://me:hunter2@host/v1"}')
