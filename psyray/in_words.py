"""Numbers as people read them, and what a stage's result comes down to in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

DASH = "–"  # noqa: RUF001  what is not known, here and in the report


def number(value: Any, digits: int = 2, unit: str = "") -> str:
    """A number for people; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return DASH
    return f"{value:,}{unit}" if isinstance(value, int) else f"{value:,.{digits}f}{unit}"


def share(value: Any) -> str:
    """A share as a percentage; a dash where there is none."""
    return number(100.0 * value, 1, " %") if isinstance(value, int | float) else DASH


def people(count: int) -> str:
    """`1 person`, or how many people."""
    return f"{count} {'person' if count == 1 else 'people'}"


def change(value: Any) -> str:
    """A relative change as a percentage with its sign; a dash where there is none."""
    return f"{100 * value:+.1f} %" if isinstance(value, int | float) and value == value else DASH


def duration(seconds: Any) -> str:
    """Seconds as `12 s`, `3 min 20 s` or `2 h 05 min`."""
    if not isinstance(seconds, int | float):
        return DASH
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _counts(stats: Mapping[str, Any], *keys: str) -> str:
    return ", ".join(f"{number(stats.get(key))} {key.replace('_', '-')}" for key in keys)


def _last_loss(stats: Mapping[str, Any]) -> str:
    losses = [step["loss"] for step in stats.get("steps") or [] if "loss" in step]
    return f"loss {number(losses[0], 3)} → {number(losses[-1], 3)}" if losses else f"loss {DASH}"


def _trained(stats: Mapping[str, Any]) -> str:
    return _last_loss(stats) + _kept(stats.get("dev"))


def _kept(dev: Mapping[str, Any] | None) -> str:
    """Which step a job kept, where it looked at dev; empty where it did not."""
    if not dev:
        return ""
    figures = f"dev loss {number(dev['loss'], 3)}, accuracy {share(dev['accuracy'])}"
    early = f"; ended before step {number(dev['planned'])}: {dev['stopped']}" if dev["taken"] < dev["planned"] else ""
    return f" (kept step {number(dev['kept'])} of {number(dev['taken'])}, {figures}{early})"


def _adapters(stats: Mapping[str, Any]) -> str:
    names = [f"adapter-{at}" for at in range(stats.get("adapters") or 0)]
    steps = {name: [entry[name] for entry in stats["steps"] if name in entry] for name in names}
    dev = stats.get("dev") or {}
    return f"{len(names)} adapters, " + "; ".join(_trained({"steps": steps[n], "dev": dev.get(n)}) for n in names)


def _heads(stats: Mapping[str, Any]) -> str:
    metrics = stats.get("metrics") or {}
    return f"accuracy {share(metrics.get('accuracy'))} (length alone {share(metrics.get('length_accuracy'))})"


def _by_topic(stats: Mapping[str, Any]) -> str:
    rates = {name: part["accuracy"] for name, part in ((stats.get("strata") or {}).get("topic") or {}).items()}
    if not rates:
        return "no topics"
    least, most = (pick(rates, key=lambda name: rates[name]) for pick in (min, max))
    return f"accuracy {share(rates[least])} ({least}) to {share(rates[most])} ({most})"


def gate_note(stats: Mapping[str, Any]) -> str:
    """One line on a gate: the verdict, the win rate, raw and at equal length, the length change."""
    verdict = {True: "passed", False: "failed"}.get(stats.get("passed", None), "start")
    rate = win_rates(stats)
    reasons = "; ".join(stats.get("reasons") or [])
    return f"{verdict}: {rate}, length {change(stats.get('length_change'))}" + (f" ({reasons})" if reasons else "")


def probe_note(stats: Mapping[str, Any]) -> str:
    """One line on what a policy kept: perplexity, questions, distance to the start."""
    return (
        f"perplexity {number(stats.get('perplexity'), 1)} ({change(stats.get('perplexity_rise'))}), "
        f"questions {share(stats.get('accuracy'))} (start {share(stats.get('start_accuracy'))}), "
        f"KL {number(stats.get('kl'), 3)} nats a token"
    )


def second_note(stats: Mapping[str, Any]) -> str:
    """One line on the second judge's win rate."""
    return f"{win_rates(stats)} by {stats.get('judge') or DASH}"


def win_rates(stats: Mapping[str, Any]) -> str:
    """A win rate and what is left of it at equal length, with their intervals."""
    controlled = "length_controlled"
    return (
        f"win rate {share(stats.get('win_rate'))} [{share(stats.get('low'))}, {share(stats.get('high'))}], at equal "
        f"length {share(stats.get(controlled))} [{share(stats.get(f'{controlled}_low'))}, "
        f"{share(stats.get(f'{controlled}_high'))}]"
    )


def labels_note(stats: Mapping[str, Any]) -> str:
    """One line on a round's labels, and on how far people agreed where they gave them."""
    note = _counts(stats, "bought", "reused", "reward_labelled", "ties", "invalid")
    among = stats.get("experts") or {}
    if among.get("compared"):
        note += f"; {among['people']} experts agree {share(among['agree'])} (alpha {number(among['alpha'])})"
    return note


KEY_NUMBERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "speeches": lambda s: _counts(s, "train", "test"),
    "responses": lambda s: f"{_counts(s, 'ok', 'failed')}, {number(s.get('mean_words'), 0)} words",
    "samples": lambda s: f"{_counts(s, 'ok', 'failed')}, {number(s.get('mean_words'), 0)} words",
    "judgements": lambda s: f"mean {number(s.get('mean_score'))}, invalid {share(s.get('invalid_share'))}",
    "pairs": lambda s: _counts(s, "train", "test"),
    "reward": _trained,
    "reward-adapters": _adapters,
    "policy": lambda s: f"{_trained(s)}, {_counts(s, 'pairs')}",
    "reward-heads": _heads,
    "heads": _heads,
    "reward-topics": _by_topic,
    "labels": labels_note,
    "gate": gate_note,
    "probe": probe_note,
    "second": second_note,
    "export": lambda s: f"champion: round {number(s.get('champion_round'))}",
}


def key_numbers(name: str, stats: Mapping[str, Any]) -> str:
    """What a stage's result comes down to, in one line; empty for a stage of another kind."""
    if name == "round-0/gate":
        return f"start policy: mean score {number(stats.get('mean_score'))}"
    describe = KEY_NUMBERS.get(name.rpartition("/")[2])
    return describe(stats) if describe else ""
