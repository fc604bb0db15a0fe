"""Options: the flags that `tranche simulate` and `tranche plan` share, and what they make."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from services.scheduler.core.presets import PRESETS, USUAL_POLICY, UnknownPreset, preset_named
from services.scheduler.core.settings import (
    Constants,
    UnknownConstant,
    known_names,
    with_overrides,
)
from shared.profiles import BadProfile, CostProfile, UnknownProfile, load_profile
from sim.runs import Load
from sim.text import OUTPUT_TOKENS_MAX, PROMPT_TOKENS_MAX
from sim.workload import Workload, WorkloadError, make_workload

ALL = "all"
LOAD_KINDS = ("rate", "rate-scale", "clients")


def _one(kind: type[int] | type[float], flag: str, text: str) -> float:
    if "," in text:
        again = " ".join(f"{flag} {part.strip()}" for part in text.split(",") if part.strip())
        raise typer.BadParameter(f"{text!r} is no single number; repeat the flag: {again}")
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise typer.BadParameter(f"{text!r} is no {what}") from None


def rate_number(text: str) -> float:
    """Of `--rate`. Raises typer.BadParameter, as do the other two."""
    return _one(float, "--rate", text)


def scale_number(text: str) -> float:
    """Of `--rate-scale`."""
    return _one(float, "--rate-scale", text)


def clients_number(text: str) -> int:
    """Of `--clients`."""
    return int(_one(int, "--clients", text))


Trace = Annotated[
    str,
    typer.Option(
        help="Trace or length table (.csv, .parquet); a synthetic set (dist-1, dist-2, dist-3, "
        "uniform:32-4096x2048-4096, lognormal:500/1.2x200/0.8); or a mixture such as "
        "'alice=chat.csv*3+bob=dist-1*1'."
    ),
]
Profile = Annotated[str, typer.Option(help="Cost profile: a name in deploy/costs or a file.")]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="Preset, or one with other answers such as vllm+offloading=sal-a+binding=late "
        "(docs/policies.md); repeatable; 'all': every preset. Without: tranche.",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Most requests.")]
PromptCap = Annotated[int | None, typer.Option(help="Cuts longer prompts.")]
OutputCap = Annotated[int | None, typer.Option(help="Cuts longer outputs.")]
Rates = Annotated[
    list[float] | None,
    typer.Option(
        "--rate",
        metavar="<float>",
        parser=rate_number,
        help="Random arrivals a second. Repeatable: --rate 8 --rate 10.",
    ),
]
RateScales = Annotated[
    list[float] | None,
    typer.Option(
        "--rate-scale",
        metavar="<float>",
        parser=scale_number,
        help="Speed-up of the trace's own arrivals. Repeatable.",
    ),
]
Clients = Annotated[
    list[int] | None,
    typer.Option(
        "--clients",
        metavar="<int>",
        parser=clients_number,
        help="Closed loop with so many clients. Repeatable.",
    ),
]
OneRate = Annotated[
    list[float] | None,
    typer.Option(
        "--rate", metavar="<float>", parser=rate_number, help="Random arrivals a second. Only one."
    ),
]
OneRateScale = Annotated[
    list[float] | None,
    typer.Option(
        "--rate-scale", metavar="<float>", parser=scale_number, help="Speed-up of the trace. One."
    ),
]
OneClients = Annotated[
    list[int] | None,
    typer.Option(
        "--clients", metavar="<int>", parser=clients_number, help="Closed loop with so many."
    ),
]
Burst = Annotated[
    float | None,
    typer.Option(
        help="With --rate: gamma gaps with this coefficient of variation; above 1 come bursts."
    ),
]
Tenants = Annotated[
    str | None, typer.Option(help="Divide requests among tenants: 3, or by shares 8:1:1.")
]
Shuffle = Annotated[bool, typer.Option(help="Take the rows of tables in random order.")]
Slo = Annotated[str, typer.Option(help="Objectives in seconds: ttft=10,gap=1.5,tpot=0.2,e2e=60.")]
KvTokens = Annotated[
    int | None, typer.Option(min=1, help="KV tokens a worker; default: the profile's.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="max_tokens that every request carries: all that a scheduler may know of its length; "
        "default: the longest output of the workload.",
    ),
]
SliceTokens = Annotated[int | None, typer.Option(min=1, help="Same as --set slice_tokens=S.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any constant of the policy. Repeatable."),
]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Repeatable; default 0.")]
Jobs = Annotated[int, typer.Option(min=0, help="Runs at once; 0: one for each core.")]


@dataclass(frozen=True, slots=True)
class WorkloadChoice:
    """Everything that a workload is made from but load and seed."""

    source: str
    limit: int | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    burst: float | None = None
    tenants: str | None = None
    shuffle: bool = False

    def made(self, load: Load, seed: int) -> tuple[Workload, Load]:
        """The workload, and the load with the rate that it offers. Raises WorkloadError."""
        workload = make_workload(
            self.source,
            limit=self.limit,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=self.max_output_tokens,
            rate=load.value if load.kind == "rate" else None,
            rate_scale=load.value if load.kind == "rate-scale" else None,
            clients=int(load.value) if load.kind == "clients" else None,
            burst=self.burst,
            tenants=self.tenants,
            shuffle=self.shuffle,
            seed=seed,
        )
        _check_lengths(workload)
        return workload, replace(load, offered_rps=workload.offered_rps)


def _check_lengths(workload: Workload) -> None:
    for name, most in (("output", OUTPUT_TOKENS_MAX), ("prompt", PROMPT_TOKENS_MAX)):
        longest = max(getattr(item, f"{name}_tokens") for item in workload.items)
        if longest > most:
            raise WorkloadError(
                f"{workload.name}: {name} of {longest:,} tokens; cut it with "
                f"--max-{name}-tokens, at most {most:,}"
            )


def loads(
    rates: Sequence[float] | None, scales: Sequence[float] | None, clients: Sequence[int] | None
) -> list[Load]:
    """The loads that the flags name; the recorded arrivals if they name none. Raises
    WorkloadError if they name more than one kind."""
    given = [
        (kind, values)
        for kind, values in zip(LOAD_KINDS, (rates, scales, clients), strict=True)
        if values
    ]
    if len(given) > 1:
        raise WorkloadError("give one of --rate, --rate-scale and --clients")
    if not given:
        return [Load()]
    kind, values = given[0]
    return [Load(kind, float(value)) for value in dict.fromkeys(values)]  # type: ignore[arg-type]


def policies(names: Sequence[str] | None) -> list[str]:
    """The presets named, each once; without a name the usual one. Raises typer.BadParameter,
    naming what there is."""
    chosen = [part for name in names or (USUAL_POLICY,) for part in _expanded(name)]
    try:
        return list(dict.fromkeys(preset_named(name).name for name in chosen))
    except UnknownPreset as error:
        raise typer.BadParameter(str(error), param_hint="--policy") from error


def constants(
    pairs: Iterable[str], slice_tokens: int | None
) -> dict[str, int | float | bool | str]:
    """What `--set` and `--slice-tokens` change, with its types. Raises typer.BadParameter."""
    texts = dict(_pairs(pairs))
    if slice_tokens is not None:
        texts["slice_tokens"] = str(slice_tokens)
    try:
        changed = with_overrides(Constants(), texts)
    except UnknownConstant as error:
        raise typer.BadParameter(str(error), param_hint="--set") from error
    if changed.slice_tokens < 1:
        raise typer.BadParameter("slice_tokens must be at least 1", param_hint="--set")
    return {name: getattr(changed, name) for name in known_names() if name in texts}


def profile_of(name: str) -> CostProfile:
    """By name or file. Raises typer.BadParameter, naming what there is."""
    try:
        return load_profile(name)
    except (UnknownProfile, BadProfile, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--profile") from error


def check_writable(*paths: Path | None) -> None:
    """Before an hour of simulation, not after it. Raises typer.BadParameter."""
    for path in paths:
        if path is not None and (path.is_dir() or not _creatable(path)):
            raise typer.BadParameter(f"{path}: cannot be written")


def _creatable(path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path if path.exists() else path.parent, os.W_OK)


def _expanded(name: str) -> list[str]:
    if name == ALL:
        return list(PRESETS)
    return [part.strip() for part in name.split(",") if part.strip()]


def _pairs(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
        yield name.strip(), value.strip()
