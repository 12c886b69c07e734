"""The figures of a run as a page."""

from collections.abc import Iterable, Mapping
from typing import Any


def page(found: Mapping[str, Any]) -> str:
    """A page in Markdown; parts that were not run are left out."""
    where = found["machine"]
    lines = [
        "# Three replicas behind HAProxy",
        "",
        "Written by `python -m bench.fleet`, which says what is done.",
        "",
        f"{where['date']}, {where['cpus']} CPU cores, {where['platform']}; beside it ran {where['beside']} "
        f"(load average at the start {', '.join(map(str, where['load_average']))}).",
        "",
    ]
    for name, title, said in (
        ("changes", "Changes of running generations", CHANGES),
        ("killed", "kill -9 of a replica under load", KILLED),
        ("restarted", "A rolling restart under load", RESTARTED),
    ):
        if name in found:
            lines += [f"## {title}", "", *_table(found[name], said), ""]
    for failure in ("open", "closed"):
        if f"limits_{failure}" in found:
            lines += [f"## Limits, `--limits-store-failure {failure}`", "", *_limits(found[f"limits_{failure}"]), ""]
    if "goodput" in found:
        lines += ["## Goodput", "", *_goodput(found["goodput"], where), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


CHANGES = {
    "requests": "steered requests, as streams",
    "at_once": "at once",
    "by_replica": "served by",
    "endings": "endings",
    "patched": "PATCHed while they ran",
    "patch_answers": "answers to the PATCHes",
    "patched_and_steered_by_it": "texts whose receipt has the new push",
    "deleted": "DELETEd while they ran",
    "delete_answers": "answers to the DELETEs",
    "deleted_and_ended_so": "streams that ended with `deleted`",
    "changes_forwarded": "changes that arrived at another replica and were forwarded",
    "changes_at_the_right_replica": "changes that reached the replica that ran the generation, by its log",
    "changes_with_one_trace": "changes whose every log line has the caller's trace id",
    "unsteered": "texts without their push",
    "lost": "requests without an ending",
    "ended_twice": "requests that ended twice",
    "served_by_no_or_two_replicas": "requests that no replica, or more than one, served, by the logs",
}
KILLED = {
    "requests": "requests",
    "at_once": "at once",
    "running_at_the_kill": "running at the kill",
    "running_on_the_victim": "of these on the victim, or not yet answered by any",
    "ended_in_an_error": "that ended in an error",
    "errors_of_other_replicas": "errors of other replicas",
    "errors_of_requests_sent_after_it": "errors of requests sent after the signal",
    "served": "served",
    "served_twice": "served twice, by the logs",
    "failed_and_served_elsewhere": "that failed for the caller and were served all the same",
}
RESTARTED = {
    "requests": "requests",
    "at_once": "at once",
    "endings": "endings",
    "by_replica": "served by",
    "lost": "that were not served",
    "exit_codes": "exit codes of the replicas",
}


def _table(values: Mapping[str, Any], said: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {text} | {_told(values[name])} |" for name, text in said.items())]


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {count}" for name, count in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _limits(values: Mapping[str, Any]) -> list[str]:
    rows: Iterable[tuple[str, str]] = (
        ("store_there", "60 a minute, the store there"),
        ("at_once", "4 at once, 12 sent"),
        ("store_killed", "60 a minute, the store just killed"),
        ("store_killed_without_limits", "a key without limits, the store away"),
        ("store_back", "60 a minute, another key, the store back"),
    )
    lines = ["| | requests | answers | seconds |", "|---|---|---|---|"]
    for name, text in rows:
        one = values[name]
        told = _told(one.get("answers") or one["endings"])
        lines.append(f"| {text} | {one['requests']} | {told} | {_told(one.get('seconds', '-'))} |")
    return [
        *lines,
        "",
        f"Meanwhile `steerserve_limits_store_up` was {_told(values['said_in_metrics'])}. The three logs have "
        f"{values['said_in_log']} lines of the store going and coming. All three said that it was back within "
        f"{values['back_within_seconds']} s of its start.",
    ]


def _goodput(values: Mapping[str, Any], where: Mapping[str, Any]) -> list[str]:
    lines = ["| round | one replica | three replicas |", "|---|---|---|"]
    for turn, (one, three) in enumerate(zip(values["one"], values["three"], strict=True), 1):
        lines.append(f"| {turn} | {_rate(one)} | {_rate(three)} |")
    return [
        f"{values['callers']} callers, each asking again once it is answered, {values['seconds']:g} s each: answers "
        f"that took at most {values['in_time_seconds']:g} s, a second, and their median time.",
        "",
        *lines,
        "",
        f"Every replica has one thread of torch, and {where['cpus']} cores are there for three of them, the proxy, "
        "Redis, the callers and what else ran. So this can show that the fleet's parts cost little, and up to twice "
        "the goodput of one. It cannot show how goodput grows where each replica has a machine of its own.",
    ]


def _rate(one: Mapping[str, float | None]) -> str:
    middle = one["median_seconds"]
    return f"{one['good_per_second']:g}/s, {'-' if middle is None else f'{middle:g} s'}"
