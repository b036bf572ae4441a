"""How soon texts have their first token, and how fast a batch decodes.

    python benchmarks/first_tokens.py [--modes none,vanilla,eagle] [--lengths 10,100]

prints, for prompts of mixed length that come at once, ms until the last of them has its first token
and until the mean one has, and for batches tokens/s; medians over rounds, in which all modes take
turns. The bundled models, temperature 0, the file's own words as prompts. To compare two versions,
run it with the Python of either in turns.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from statistics import mean, median

from inferlab import SamplingParams, SpeculativePipeline, __version__
from inferlab.benchmarks.environment import describe_environment


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modes", default="none,vanilla,eagle", help="draft modes")
    parser.add_argument("--prompts", type=numbers, default=[1, 8, 32], help="that come at once")
    parser.add_argument("--lengths", type=numbers, default=[10, 100], help="least and most tokens")
    parser.add_argument("--batch", type=numbers, default=[1, 16], help="sizes that decode")
    parser.add_argument("--max-tokens", type=int, default=64, help="that a batch decodes")
    parser.add_argument("--rounds", type=int, default=7, help="that count, after one that does not")
    args = parser.parse_args()
    shortest, longest = args.lengths

    modes = args.modes.split(",")
    target = SpeculativePipeline(draft_mode="none").target
    engines = {m: SpeculativePipeline(draft_mode=m, target=target).engine for m in modes}
    words = target.tokenizer.encode(Path(__file__).read_text(encoding="utf-8") * 4)
    rng = random.Random(1)

    def prompts(count: int) -> list[list[int]]:
        lengths = [rng.randint(shortest, longest) for _ in range(count)]
        starts = [rng.randrange(len(words) - length) for length in lengths]
        return [words[s : s + n] for s, n in zip(starts, lengths, strict=True)]

    first: dict[tuple[str, int], list[tuple[float, float]]] = {}
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(1 + args.rounds):
        for count in args.prompts:
            params, texts = SamplingParams(max_tokens=4, ignore_eos=True), prompts(count)
            for mode, engine in engines.items():
                results = engine.generate([(text, params) for text in texts])
                times = [result.first_token_ms for result in results]
                first.setdefault((mode, count), []).append((max(times), mean(times)))
        for size in args.batch:
            params = SamplingParams(max_tokens=args.max_tokens, ignore_eos=True)
            texts = prompts(size)
            for mode, engine in engines.items():
                results = engine.generate([(text, params) for text in texts])
                tokens = sum(len(result.token_ids) for result in results)
                rate = tokens / max(result.latency_ms for result in results) * 1e3
                rates.setdefault((mode, size), []).append(rate)

    machine = describe_environment()
    print(f"{machine['processor']}, torch {machine['torch']}, inferlab {__version__}")
    print(f"prompts of {shortest} to {longest} tokens, medians of {args.rounds} rounds\n")
    heads = [f"first of {n}: last / mean, ms" for n in args.prompts]
    print(" | ".join(["mode", *heads, *(f"tokens/s, batch {n}" for n in args.batch)]))
    for mode in modes:
        row = [mode]
        for count in args.prompts:
            last, average = zip(*first[mode, count][1:], strict=True)
            row.append(f"{median(last):.1f} / {median(average):.1f}")
        row += [f"{median(rates[mode, size][1:]):.0f}" for size in args.batch]
        print(" | ".join(row))


if __name__ == "__main__":
    main()
