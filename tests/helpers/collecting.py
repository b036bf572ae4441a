"""Results of prompts as a command collects and reports them, of a function in place of a model."""

from __future__ import annotations

import argparse

from inferlab.cli import results, terminal
from inferlab.records import RequestRecord, Speculation
from inferlab.types import SpeculationStats


def arguments(**given):
    defaults = {"prompt": None, "prompts": None, "json": True, "output": None, "no_progress": True}
    return argparse.Namespace(**{**defaults, **given})


def fake_result(text: str, **more):
    stats = SpeculationStats(steps=1, proposed=4, accepted=1, emitted=2)
    record = RequestRecord(
        source="specdec",
        model="m",
        started_at=0.0,
        latency_ms=1.0,
        speculation=Speculation(
            impl="fake",
            draft_mode="vanilla",
            draft_model=None,
            policy={},
            controller={},
            lossless=True,
            stats=stats,
        ),
    )
    return {"text": text.upper(), "num_tokens": 2, "record": record.as_json(), **more}


def shout(texts: list[str]) -> list[dict]:
    print("a library that prints")
    for text in texts:
        if text == "bad":
            raise ValueError("too long")
    return [fake_result(text) for text in texts]


def collect(prompts, generate, args, batch_size=1):
    with terminal.clean_stdout(args.json) as out:
        collected = results.run_prompts(prompts, lambda texts, _: generate(texts), args, batch_size)
        return collected, results.report(collected, args, out, lambda result: None)
