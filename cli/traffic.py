"""`ratchet traffic`: what share of an assistant's requests goes where."""

from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cli.assistants import Assistant
from cli.client import Client, Json
from cli.errors import CliError
from cli.output import AsJson, emit, table, when

Percent = Annotated[
    float | None, typer.Option(help="Share of users (canary) or requests (shadow).", show_default=False)
]


def traffic(
    assistant: Assistant,
    canary: Annotated[
        str | None, typer.Option(metavar="ALIAS", help="Answer a share of the users by this alias.")
    ] = None,
    shadow: Annotated[
        str | None, typer.Option(metavar="ALIAS", help="Ask this alias too, and only compare its replies.")
    ] = None,
    percent: Percent = None,
    off: Annotated[bool, typer.Option("--off", help="Everything to the champion again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show or change how requests are shared out between champion, canary and shadow.

    A change of one side leaves the other as it is; limits of a canary (HTTP API) are kept.
    """
    chosen = [option for option in (canary, shadow, off or None) if option is not None]
    if len(chosen) > 1:
        raise CliError("choose one of --canary, --shadow and --off")
    if (percent is not None) != (canary is not None or shadow is not None):
        raise CliError("--percent belongs to --canary or --shadow, and they need it")
    path = f"/v1/assistants/{assistant}/traffic"
    with Client.from_environment() as client:
        if off:
            found = client.delete(path)
        else:
            found = client.get(path)
            if chosen:
                found = client.put(path, _changed(found, canary, shadow, percent), revision=found["revision"])
    emit(found, as_json, lambda: _shown(found))


def _changed(plan: Json, canary: str | None, shadow: str | None, percent: float | None) -> Json:
    """The plan with one side on `percent`; what was said of it before is kept."""
    side, alias = ("canary", canary) if canary is not None else ("shadow", shadow)
    wanted = {name: plan[name] for name in ("canary", "shadow") if plan[name] is not None}
    return wanted | {side: {**(plan[side] or {}), "alias": alias, "percent": percent}}


def _shown(plan: Json) -> Group:
    canary, shadow = plan["canary"], plan["shadow"]
    share = canary["percent"] if canary else 0
    lines = [f"champion {100 - share:g}% of users"]
    if canary:
        lines.append(f"canary   {share:g}% of users: {canary['alias']}, {plan['canary_version']}")
    if shadow:
        lines.append(
            f"shadow   of {shadow['percent']:g}% of requests: {shadow['alias']}, {plan['shadow_version']}"
        )
    last = plan["last_rollback"]
    if last:
        lines.append(f"rolled back {when(plan['rolled_back_at'])}: {last['reason']}")
    if plan["cooldown_until"]:
        lines.append(f"no canary until {when(plan['cooldown_until'])}")
    parts: list[Text | Table] = [Text("\n".join(lines))]
    if plan["figures"]:
        parts.append(_figures(plan["figures"]))
    return Group(*parts)


def _figures(figures: list[Json]) -> Table:
    columns = [
        "",
        "version",
        "requests",
        "errors",
        "first byte p50",
        "p95",
        "dropped",
        "identical",
        "ROUGE-L",
    ]
    rows = [
        (
            one["role"],
            one["version"],
            str(one["requests"]),
            _share(one["error_rate"]),
            _seconds(one["latency_p50"]),
            _seconds(one["latency_p95"]),
            str(one["dropped"]) if one["role"] == "shadow" else "",
            _share(one["identical"]),
            "-" if one["rouge_l"] is None else f"{one['rouge_l']:.2f}",
        )
        for one in figures
    ]
    return table(columns, rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"
