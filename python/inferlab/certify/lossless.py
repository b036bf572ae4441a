"""`inferlab certify lossless`: is what comes out what plain decoding would have given?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from inferlab.benchmarks.comparison import first_difference
from inferlab.benchmarks.environment import describe_environment
from inferlab.certify import exact, trees
from inferlab.certify.facts import config_of, describe_model, parse_sampler, sampler_text
from inferlab.certify.outputs import Check, LosslessCertificate, Model, failed, passed
from inferlab.certify.sampled import BATCH, DECODED, likeliest, sampled
from inferlab.certify.statistics import CONFIDENCE, FALSE_ALARM
from inferlab.certify.verifiers import Verifier, kernel_verifier
from inferlab.config import SpecdecConfig
from inferlab.draft_modes import tree_misfit
from inferlab.models import TargetModel, loading
from inferlab.records import record_of, total_stats
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.specdec.policies import Policy, make_policy

SAMPLES = 2000
MAX_TOKENS = 48
SAMPLERS = ("greedy", "temperature=0.8")
OWN_TREE = "its own"


class Settings(TypedDict):
    """What a certificate of losslessness is made of; `--check` makes it again.

    Attributes:
        config: of models, policy and K, as keys of SpecdecConfig.
        draft_modes, trees, samplers, batches, quantizations: every combination that there is is
            decoded. Trees are "its own", "chain" or widths by depth; samplers as `parse_sampler`
            reads them.
        prompts: continued by the replays; the first one by the samples.
        samples: seeds for each sampled distribution; 0: none is sampled.
        seed: of the replays; the samples have those from it on.
    """

    config: dict[str, Any]
    draft_modes: list[str]
    trees: list[str]
    samplers: list[str]
    batches: list[int]
    quantizations: list[str]
    prompts: list[str]
    max_tokens: int
    samples: int
    seed: int


def certify_lossless(
    settings: Settings,
    *,
    policy: Policy | None = None,
    verifier: Verifier | None = None,
    on_check: Callable[[Check], None] | None = None,
) -> LosslessCertificate:
    """Enumerates small cases, then decodes real ones with and without drafts.

    Args:
        policy: in place of the configuration's: the engine runs it.
        verifier: in place of the policy's kernel, for the small cases.
        on_check: called with each check as it is made.

    Raises:
        ValueError: models that cannot be loaded, prompts that cannot be decoded.
    """
    settings = TypeAdapter(Settings).validate_python(settings)
    checks: list[Check] = []

    def add(found: Sequence[Check]) -> None:
        for check in found:
            checks.append(check)
            if on_check is not None:
                on_check(check)

    config = config_of(settings)
    rule = policy or make_policy(config.policy, tau=config.tau, k=config.agree_k, p=config.p)
    level = FALSE_ALARM / num_tests(settings)
    device = loading.choose_device(config.requested_device, config.device_priority)
    fake = config.implementation == "fake"
    verify = verifier or kernel_verifier(rule, "cpu" if fake else device)
    add(exact.enumerated(rule, verify))
    add(exact.traps(rule, verify))
    add(trees.sampled_trees(rule, verify, level))
    models: dict[tuple[str, str], Model] = {}
    for quantization in settings["quantizations"]:
        for check in _decoded(settings, config, rule, quantization, level, models):
            add([check])
    wrong = [check for check in checks if not check["passed"]]
    environment: Any = describe_environment()
    return {
        "kind": "lossless",
        "certified": rule.lossless and not wrong,
        "summary": _summary(rule, checks),
        "policy": rule.describe(),
        "false_alarm": FALSE_ALARM,
        "confidence": CONFIDENCE,
        "environment": environment,
        "models": list(models.values()),
        "settings": dict(settings),
        "checks": checks,
    }


def num_tests(settings: Settings) -> int:
    """Statistical tests of a certificate, among which its chance of a false alarm is shared out
    (Bonferroni)."""
    sampled_too = len(settings["draft_modes"]) * len(settings["trees"])
    sampled_too *= len(settings["quantizations"]) if settings["samples"] else 0
    hot = sum(parse_sampler(text)["temperature"] > 0 for text in settings["samplers"])
    return len(trees.TREES) + 1 + hot * sampled_too


def _decoded(
    settings: Settings,
    config: SpecdecConfig,
    policy: Policy,
    quantization: str,
    level: float,
    models: dict[tuple[str, str], Model],
) -> Any:
    """Yields the checks of real decoding, with one format of the target's weights."""
    common = config.model_copy(
        update={"quantization": quantization, "ignore_generation_config": True}
    )
    plain = SpeculativePipeline(
        config=common.model_copy(
            update={"draft_mode": "none", "tree": None, "policy": "longest_prefix", "max_batch": 1}
        )
    )
    _remember(models, plain.target)
    limit = plain.target.context_length
    decoded = max(settings["max_tokens"], DECODED if settings["samples"] else 0)
    room = None if limit is None else max(limit - decoded, 1)
    # Prompts keep their last tokens where the context is too short for all.
    ids = [
        plain.encode(text)[-room if room is not None else None :] for text in settings["prompts"]
    ]
    expected = {}
    laws = {}
    for text in settings["samplers"]:
        sampler = parse_sampler(text)
        asked = {"max_tokens": settings["max_tokens"], "seed": settings["seed"], **sampler}
        expected[text] = [result["token_ids"] for result in plain.generate(ids, **asked)]
        if settings["samples"] and sampler["temperature"] > 0:
            laws[text] = likeliest(plain.target, ids[0], sampler)
    for mode, tree in itertools.product(settings["draft_modes"], settings["trees"]):
        shape = _shape(tree)
        if tree_misfit(mode, shape):
            continue
        draft: TargetModel | None = None
        for batch in settings["batches"]:
            pipeline = _pipeline(common, policy, mode, shape, batch, plain.target, draft)
            draft = pipeline.draft_model
            if draft is not None:
                _remember(models, draft)
            for text in settings["samplers"]:
                sampler = parse_sampler(text)
                name = _name(mode, tree, text, batch, quantization)
                if policy.is_match or (policy.lossless and sampler["temperature"] == 0):
                    yield _replayed(name, pipeline, ids, expected[text], settings, sampler)
        if not laws:
            continue
        many = _pipeline(
            common.model_copy(update={"share_prefixes": True}),
            policy, mode, shape, BATCH, plain.target, draft,
        )  # fmt: skip
        for text, law in laws.items():
            seeds = range(settings["seed"], settings["seed"] + settings["samples"])
            name = _name(mode, tree, text, BATCH, quantization)
            yield sampled(name, many, ids[0], law, parse_sampler(text), seeds, level)


def _pipeline(
    config: SpecdecConfig,
    policy: Policy,
    mode: str,
    shape: str | tuple[int, ...] | None,
    batch: int,
    target: TargetModel,
    draft: TargetModel | None,
) -> SpeculativePipeline:
    """One that drafts as much as it can in every step, whether it pays or not."""
    update: dict[str, Any] = {
        "draft_mode": mode, "tree": shape, "max_batch": batch, "controller": "fixed",
        "policy": policy.name,
    }  # fmt: skip
    if isinstance(shape, tuple):
        update["max_draft"] = None
    return SpeculativePipeline(
        config=config.model_copy(update=update), policy=policy, target=target, draft=draft
    )


def _replayed(
    name: str,
    pipeline: SpeculativePipeline,
    ids: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    settings: Settings,
    sampler: dict[str, Any],
) -> Check:
    """The same seed with drafts: the same tokens?"""
    results = pipeline.generate(
        [list(prompt) for prompt in ids],
        max_tokens=settings["max_tokens"],
        seed=settings["seed"],
        **sampler,
    )
    stats = total_stats(record_of(result) for result in results)
    tokens = sum(map(len, expected))
    wrong = [
        (index, difference[0])
        for index, (result, plain) in enumerate(zip(results, expected, strict=True))
        if (difference := first_difference(result["token_ids"], plain)) is not None
    ]
    text = f"{len(ids)} prompts, {tokens} tokens, {stats.accepted} drafts accepted"
    check = passed("replay", name, text)
    if wrong:
        index, position = wrong[0]
        check = failed(
            "replay",
            name,
            f"{len(wrong)} of {len(ids)} prompts differ from plain decoding, first prompt {index} "
            f"at new token {position}",
        )
    check["compared"] = len(ids)
    check["accepted_length"] = stats.mean_accepted_length
    return check


def _remember(models: dict[tuple[str, str], Model], model: TargetModel) -> None:
    described = describe_model(model)
    models[described["name"], described["format"]] = described


def _shape(tree: str) -> str | tuple[int, ...] | None:
    if tree == OWN_TREE:
        return None
    return tuple(map(int, tree.split(","))) if tree[0].isdigit() else tree


def _name(mode: str, tree: str, sampler: str, batch: int, quantization: str) -> str:
    parts = [mode, f"tree {tree}", sampler_text(parse_sampler(sampler)), f"batch {batch}"]
    return ", ".join([*parts, *([] if quantization == "none" else [quantization])])


def _summary(policy: Policy, checks: Sequence[Check]) -> str:
    wrong = [check for check in checks if not check["passed"]]
    if wrong:
        first = wrong[0]
        return (
            f"not certified: {len(wrong)} of {len(checks)} checks failed, the first: "
            f"{first['name']}: {first['detail']}"
        )
    if policy.lossless:
        return f"certified: {len(checks)} checks passed"
    measured = [check for check in checks if "distance" in check]
    worst = max(measured, key=lambda check: check["distance"]["tv"])
    of = worst["distance"]
    low, high = of["tv_interval"]
    return (
        f"not certified: {policy.name} is lossy, by a total variation of up to {of['tv']:.3f} "
        f"({low:.3f} to {high:.3f}): {worst['name']}"
    )
