"""`kill -9` at random moments of a three-round run, the same command again each time: what is lost, what is paid twice?

    python benchmarks/kills.py                    # 10 kills
    python benchmarks/kills.py --kills 3 --seed 7 --path /data/kills

One run goes through undisturbed, then one of the same settings is killed --kills times, driver and Ray at once, and
resumed to its end. Half of the moments are drawn over the time of the undisturbed run, half over the calls that it
paid for, so that calls are under way when it dies. Judge and responders are an endpoint in this process that counts
what reaches it; the policy is a random two-layer model, sampled by vLLM and trained by Ray Train as any other.

What must hold, or the exit status is 1:
- every kill happened, and the run ended without more help than its command;
- every stage of both runs holds the same ids, each once;
- the ledgers hold the same questions, each answered, bought once, at the same price in calls;
- the endpoint saw the ledger's calls and none beside, but for those that were under way at a kill (the journal names
  them: sent, and no answer known): those are counted apart, since nobody can know whether they were served;
- no question was put again whose answer had come;
- the reward model and each round's policy have the same weights, bit by bit.

Why the weights can be equal: all that a policy depends on is drawn by the seed, its training goes on from a checkpoint
with the optimiser's state, and the texts are the same. The last holds on CPU only with `enable_chunked_prefill: false`
(psyray keeps the draws' seeds then; vLLM 0.29 on CPU cannot seed prompts that it prefills in chunks) and in float32:
a batch that is composed otherwise after a kill rounds otherwise, and bfloat16 rounds so coarsely that a sampled token
may change. Features are bfloat16 and do differ in their last bits with their neighbours in a batch; an acquisition
value that ties with another to three digits could go the other way. If weights differ, the largest difference is told.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from apart import PSYRAY, ROOT, folder, verdict, with_parent
from endpoint import Endpoint, digest, judge_reader, served

KEYS = {"speeches": "speech_id", "pairs": "pair_id", "labels": "pair_id", "probe": "key", "second": "speech_id"}
JUDGE, RESPONDER = "judge", "responder"
LIMIT_S = 1800.0


# ---------------------------------------------------------------- the run


def tiny_model(folder: Path) -> Path:
    """A two-layer Llama with random weights and the tokenizer of the embedded model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from psyray.models import embedded_model

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(model: Path, url: str, rounds: int = 3) -> dict[str, Any]:
    """A run of `rounds` rounds in little time; texts depend on the seed alone."""
    train = {"learning_rate": 1e-3, "batch_size": 2, "micro_batch": 2, "max_length": 384, "save_every": 3, "epochs": 2}
    endpoint = {"url": url, "concurrency": 2}
    return {
        "speeches": {"limit": 26, "test_share": 0.35, "max_chars": 300},
        "engine": {
            "max_num_seqs": 8,
            "kv_cache_gib": 1,
            "max_model_len": 512,
            "dtype": "float32",
            "kwargs": {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048},
        },
        "responses": {
            "k": 2,
            "responders": [{"name": name, "model": RESPONDER, "system": name, "endpoint": endpoint} for name in "ab"],
        },
        "judge": {"engine": "http", "model": JUDGE, **endpoint},
        "pairs": {"gap": 0.01},
        "reward": {"model": str(model), "train": train, "heads": {"count": 4}},
        "policy": {"model": str(model), "max_tokens": 12, "temperature": 1.2},
        "dpo": {"train": train},
        "loop": {"rounds": rounds, "prompts": 6, "k": 3, "budget": 4, "reward_margin": 0.0, "replay": 2},
        # A random model gets no better: the gate is held open so that the rounds follow one another.
        "evaluate": {
            "speeches": 8,
            "min_win_rate": 0.0,
            "max_length_change": 9.0,
            "max_repeat_rise": 1.0,
            "max_truncated_rise": 1.0,
            "max_perplexity_rise": 1e9,
            "max_capability_drop": 1.0,
            "probe_answers": 4,
        },
    }


def say(model: str, prompt: str) -> str:
    """A responder's reply or a judge's ratings, drawn by the prompt's hash."""
    from psyray.rubric import load_rubric

    dice = random.Random(digest(prompt))
    if model == RESPONDER:
        return " ".join(dice.choices(["you", "feel", "alone", "tell", "me", "more", "about", "it"], k=12)) + "."
    rubric = load_rubric("counselling")
    judge_reader(rubric)(prompt)  # that it is a judge's question
    return json.dumps({key: dice.randint(rubric.low, rubric.high) for key in rubric.keys})


@dataclass
class Attempt:
    """One process of the run, with the Ray that it starts."""

    home: Path
    process: subprocess.Popen[bytes]
    began: float

    @classmethod
    def start(cls, home: Path, *words: str) -> Attempt:
        """The command in a session of its own, its output in HOME/log."""
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        began = time.time()
        with (home / "log").open("ab") as log:
            command = [*PSYRAY, str(home.parent / "run.yaml"), f"run.path={home}/run", *words]
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=with_parent,
            )  # fmt: skip
        return cls(home, process, began)

    def stage(self) -> str:
        """The stage that this process is at; empty before its first."""
        state = self.home / "run/run.json"
        if not state.exists() or state.stat().st_mtime < self.began:
            return ""
        return str(json.loads(state.read_text())["stages"][-1]["name"])

    def kill(self) -> None:
        """SIGKILL to the driver and all that it started, at once."""
        tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        end(tree)
        psutil.wait_procs(tree, timeout=30)
        end(_of_session(self.process.pid))  # started while the list was made
        self.process.wait()

    def wait(self, until: Callable[[Attempt], bool] = lambda attempt: False) -> bool:
        """Whether the condition came before the end; SystemExit where the run ends badly or not at all."""
        try:
            while self.process.poll() is None:
                if until(self):
                    return True
                if time.time() - self.began > LIMIT_S:
                    sys.exit(f"no end after {LIMIT_S:.0f} s, see {self.home}/log")
                time.sleep(0.05)
        except BaseException:  # Ctrl-C does not reach a session of its own
            self.kill()
            raise
        if self.process.returncode:
            sys.exit(f"the run ended with {self.process.returncode}:\n{(self.home / 'log').read_text()[-3000:]}")
        return False


def end(processes: list[psutil.Process]) -> None:
    """SIGKILL to all of them."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:  # ended since it was listed
            continue


def _of_session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != leader and os.getsid(process.pid) == leader:
                found.append(process)
        except ProcessLookupError:  # ended since it was listed
            continue
    return found


# ---------------------------------------------------------------- the moments


@dataclass(frozen=True)
class Moment:
    """When to kill: `seconds` into a stage, or as the judge is asked for the `call`-th new question."""

    at: float  # where it lies in the undisturbed run, Unix seconds
    stage: str = ""
    seconds: float = 0.0
    call: int = 0

    def __str__(self) -> str:
        return f"at question {self.call} to the judge" if self.call else f"{self.seconds:.1f} s into {self.stage}"


def draw_moments(home: Path, came: list[float], count: int, dice: random.Random) -> list[Moment]:
    """`count` moments in the order of the undisturbed run: half over its stages' time, half over its calls."""
    from psyray.run import read_stages

    spans = [(s.name, (s.path / "manifest.json").stat().st_mtime, s.manifest["seconds"]) for s in read_stages(home)]
    moments = []
    for _ in range(count - count // 2):
        (name, end, seconds), share = dice.choices(spans, [s for _, _, s in spans])[0], dice.uniform(0.05, 0.95)
        moments.append(Moment(end - (1 - share) * seconds, name, share * seconds))
    for call in dice.sample(range(1, len(came) + 1), count // 2):
        moments.append(Moment(came[call - 1], call=call))
    return sorted(moments, key=lambda m: m.at)


def reached(moment: Moment, endpoint: Endpoint, order: Mapping[str, int]) -> Callable[[Attempt], bool]:
    """Whether a process is at the moment, or past it."""
    entered: list[float] = []

    def now(attempt: Attempt) -> bool:
        if moment.call:
            return len(endpoint.calls[JUDGE]) >= moment.call
        at = order.get(attempt.stage(), -1)
        if at == order[moment.stage] and not entered:
            entered.append(time.time())
        return at > order[moment.stage] or (bool(entered) and time.time() - entered[0] >= moment.seconds)

    return now


# ---------------------------------------------------------------- the audit


def contents(home: Path) -> dict[str, list[str]]:
    """For each stage of rows the ids that it holds."""
    from psyray.run import read_stages

    return {
        stage.name: [row[KEYS.get(stage.name.split("/")[-1], "response_id")] for row in stage.rows()]
        for stage in read_stages(home / "run")
        if stage.manifest["files"]
    }


def ledger(home: Path) -> dict[str, tuple[str, int, int, int]]:
    """For each question its status, how often it was bought, its calls, and how many charges it has."""
    with closing(sqlite3.connect(home / "labels.db")) as database:
        rows = database.execute(
            "SELECT q.question_id, q.status, q.asks, q.attempts, total(c.bought) "
            "FROM question q LEFT JOIN charge c USING (question_id) GROUP BY 1, 2, 3, 4"
        ).fetchall()
    return {key: (status, asks, attempts, int(bought)) for key, status, asks, attempts, bought in rows}


def weights(home: Path) -> dict[str, Path]:
    """The weights of the reward model and of each round's policy."""
    from psyray.run import read_stages

    trained = [s for s in read_stages(home / "run") if s.name == "reward" or s.name.endswith("/policy")]
    return {stage.name: stage.model / "model.safetensors" for stage in trained}


def difference(a: Path, b: Path) -> float:
    """The largest absolute difference of two models' weights; 0 where the files are the same."""
    if a.read_bytes() == b.read_bytes():
        return 0.0
    from safetensors.torch import load_file

    first, second = load_file(a), load_file(b)
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def audit(plain: Path, killed: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The figures of both runs beside each other, and what is wrong; `before` and `after` are the endpoint's calls."""
    from psyray.engines.journal import read_totals

    here, there = contents(killed), contents(plain)
    bought, reference = ledger(killed), ledger(plain)
    lost = sum(read_totals(f).lost for f in (killed / "run/stages").rglob("calls") if "/responses/" not in str(f))
    again = {key: n - before[JUDGE][key] for key, n in after[JUDGE].items() if n > before[JUDGE][key]}
    paid = sum(attempts for _, _, attempts, _ in bought.values())
    unequal = {name: difference(path, weights(killed)[name]) for name, path in weights(plain).items()}
    figures = {
        "ids": sum(map(len, here.values())),
        "stages with other ids": sum(here.get(name) != ids for name, ids in there.items()),
        "ids twice": sum(len(ids) - len(set(ids)) for ids in here.values()),
        "questions": len(bought),
        "questions of the undisturbed run": len(reference),
        "ledger: calls": paid,
        "endpoint: judge calls": after[JUDGE].total(),
        "endpoint: judge calls, undisturbed": before[JUDGE].total(),
        "calls under way at a kill": lost,
        "endpoint: asked again": sum(again.values()),
        "bought twice": sum(times != 1 or asks != 1 for _, asks, _, times in bought.values()),
        "largest weight difference": max(unequal.values()),
    }
    wrong = [f"{name}: other ids than undisturbed" for name, ids in there.items() if here.get(name) != ids]
    wrong += [f"{what}: {figures[what]}" for what in ("ids twice", "bought twice") if figures[what]]
    wrong += [f"{name}: weights differ by up to {most:.2g}" for name, most in unequal.items() if most]
    if bought != reference:
        wrong.append("the ledgers hold different questions, states, calls or charges")
    if any(status != "answered" for status, *_ in bought.values()):
        wrong.append("a question has no answer")
    if not paid <= after[JUDGE].total() <= paid + lost:
        wrong.append("the endpoint saw other calls than the ledger holds")
    if sum(again.values()) > lost:
        wrong.append("questions were put again whose answer was there")
    return figures, wrong


def proof(args: argparse.Namespace) -> int:
    import yaml

    dice = random.Random(args.seed)
    wrong: list[str] = []
    plain, killed = args.path / "undisturbed", args.path / "killed"
    for home in (plain, killed):
        home.mkdir(parents=True)
    with served(say, args.latency) as endpoint:
        (args.path / "run.yaml").write_text(yaml.safe_dump(settings(tiny_model(args.path / "model"), endpoint.url)))
        attempt = Attempt.start(plain)
        attempt.wait()
        seconds = time.time() - attempt.began
        before, came = endpoint.calls, [at for at, model in endpoint.came if model == JUDGE]
        print(f"undisturbed: {seconds:.0f} s, {before[JUDGE].total()} calls to the judge", flush=True)
        endpoint.reset()
        moments = draw_moments(plain / "run", came, args.kills, dice)
        order = {entry["name"]: n for n, entry in enumerate(json.loads((plain / "run/run.json").read_text())["stages"])}
        kills, began = 0, time.time()
        for moment in moments:
            attempt = Attempt.start(killed)
            if not attempt.wait(reached(moment, endpoint, order)):
                break
            stage = attempt.stage()
            attempt.kill()
            kills += 1
            print(f"kill {kills:2d}  {moment} (in {stage}, after {time.time() - attempt.began:.0f} s)", flush=True)
        Attempt.start(killed).wait()
        figures, wrong = audit(plain, killed, before, endpoint.calls)
    figures = {"kills": kills, "seconds": round(time.time() - began), "seconds, undisturbed": round(seconds)} | figures
    if kills < args.kills:
        wrong.append(f"only {kills} of {args.kills} kills happened before the run ended")
    return verdict(figures, wrong, "the same ids, labels and weights as undisturbed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that the endpoint takes for an answer")
    parser.add_argument("--path", type=Path, help="an empty folder, kept; none: a temporary one, removed at the end")
    args = parser.parse_args()
    with folder(args.path) as args.path:
        return proof(args)


if __name__ == "__main__":
    sys.exit(main())
