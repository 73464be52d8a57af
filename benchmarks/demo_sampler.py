"""How the demo should write: 200 stories with one sampler after another, how many are right, and how many words they know.

    python benchmarks/demo_sampler.py artifacts/demo/checkpoints/latest [another ...]

Each row is the mean over the checkpoints. Words that are different, in 200 stories, say whether a sampler is right only because it always
tells the same: the last row is 200 of the tales themselves. Results, with the machine and the versions, go to
benchmarks/demo_sampler.json; the table is printed."""

import argparse
import re
import statistics
import sys

from common import write_results

from llm_course.demo import STORIES, own_stories

SAMPLER = ("temperature", "min_p", "repetition_penalty")
ROWS = [  # of these three
    (1.0, 0.5, 1.0),
    (1.0, 0.5, 1.05),
    (1.0, 0.5, 1.1),
    (1.0, 0.5, 1.2),
    (1.0, 0.0, 1.1),
    (1.0, 0.2, 1.1),
    (1.0, 0.7, 1.1),
    (0.6, 0.2, 1.2),
]


def found(stories: list[str]) -> dict[str, float]:
    """The share of stories that are right, and how many different words they have."""
    from llm_course.grading import grade

    return {
        "right": grade(stories).valid,
        "words": len({word for story in stories for word in re.findall(r"\w+", story)}),
    }


def measure(checkpoints: list[str]) -> list[dict]:
    """Every sampler with every checkpoint, and the tales."""
    from llm_course.checkpoint import load_checkpoint
    from llm_course.tales import sample_tales

    loaded = [load_checkpoint(path, "cpu") for path in checkpoints]
    results = []
    for row in ROWS:
        sampler = dict(zip(SAMPLER, row))
        results.append({**sampler, "each": [found(own_stories(one, **sampler)) for one in loaded]})
        print(results[-1], file=sys.stderr, flush=True)
    return [*results, {"tales": True, "each": [found(sample_tales(seed=1_000_003, n=STORIES))]}]


def table(results: list[dict]) -> str:
    """The results as a table in Markdown: a row for each sampler."""
    lines = [
        f"| temperature | min-p | repetition penalty | of {STORIES} stories, right | different words |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in results:
        right, words = (
            statistics.mean(one[name] for one in row["each"]) for name in ("right", "words")
        )
        names = ["the tales", "", ""] if "tales" in row else [f"{row[name]:g}" for name in SAMPLER]
        lines.append("| " + " | ".join([*names, f"{right:.1%}", f"{words:,.0f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", help="folders that the demo has trained")
    results = measure(parser.parse_args().checkpoints)
    write_results(__file__, results)
    print(table(results))


if __name__ == "__main__":
    main()
