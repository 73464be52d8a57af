"What the tasks of this folder read: the course's own documents, in the form that lm-evaluation-harness takes."
from itertools import islice
from random import Random

from datasets import Dataset

from llm_course.corpus import Corpus, held_out
from llm_course.grading import ask
from llm_course.tales import tales


def held_out_tales(n: int, seed: int) -> list[str]:
    "The tales that `llm-course corpus` puts into val.txt: no model that learned from its corpus.txt has seen one."
    return list(islice((tale for tale in tales(seed) if held_out(tale, 0.05)), n))


def text(input: str = "data/raw/val.txt", documents: str = "auto", errors: str = "strict", **_: object) -> dict[str, Dataset]:
    "The documents of a file, a folder or a glob, told apart as `llm-course eval --input … --documents …` does."
    return {"test": Dataset.from_dict({"text": list(Corpus(input, documents, errors))})}


def tales_text(n: int = 500, seed: int = 0, **_: object) -> dict[str, Dataset]:
    "Tales of the built-in corpus, held out for validation."
    return {"test": Dataset.from_dict({"text": held_out_tales(n, seed)})}


def questions(n: int = 500, seed: int = 0, **_: object) -> dict[str, Dataset]:
    "One question about each of these tales, always the same for a seed."
    random = Random(seed)
    return {"test": Dataset.from_list([ask(tale, random)._asdict() for tale in held_out_tales(n, seed)])}
