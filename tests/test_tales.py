"The tales: every draw is read back with exactly its probability, and what is wrong is refused."

import math
import re
import shutil
from collections import Counter
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.corpus import held_out
from llm_course.files import UserError
from llm_course.grammar import Grammar, read_table, split_weight
from llm_course.tales import (
    STORIES,
    check_tale,
    draw_tale,
    load_stories,
    sample_tales,
    tale_choices,
    tale_entropy,
    tale_grammar,
    tale_log_prob,
    tales,
)

TOLD = load_stories()


def first_words(table):
    return [split_weight(row[""])[1] for row in read_table(TOLD.words[table])]


HE, SHE = set(first_words("he name")), set(first_words("she name"))
PRONOUNS = {
    kind: row["he"] for kind, row in zip(first_words("kind"), read_table(TOLD.words["kind"]))
}


@pytest.fixture(scope="module")
def some():
    return sample_tales(seed=11, n=2000)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**60))
def test_every_draw_is_read_with_its_probability(seed):
    "The checker computes the very float that the writer computed."
    text, log_prob = draw_tale(Random(seed))
    verdict = check_tale(text)
    assert (
        verdict.valid
        and verdict.log_prob == log_prob == tale_log_prob(text)
        and verdict.position == len(text)
    )


def test_same_seed_same_tales():
    assert (
        sample_tales(3, 5) == sample_tales(3, 5) == list(islice(tales(3), 5)) != sample_tales(4, 5)
    )


def test_continuations_sum_to_one_and_are_told_apart(some):
    "At every draw the probabilities sum to 1, and no option is the beginning of another."
    for text in some[:300]:
        for choice in tale_choices(text):
            assert math.isclose(sum(choice.options.values()), 1, abs_tol=1e-12)
            assert (
                choice.options[choice.text] == choice.probability
                and text[choice.start : choice.end] == choice.text
            )
            options = sorted(choice.options)
            assert all(options) and not any(b.startswith(a) for a, b in zip(options, options[1:]))


def test_choices_make_the_probability(some):
    for text in some[:100]:
        assert math.isclose(
            math.fsum(math.log(c.probability) for c in tale_choices(text)),
            tale_log_prob(text),
            rel_tol=1e-12,
        )


def test_a_small_grammar_is_a_distribution():
    "All texts of a grammar with weights, memory and exclusion have probabilities that sum to 1 and match their frequencies."
    grammar = Grammar(
        "[2*{A pet}|The {pet}] saw {a pet2}[3*.|, and the {pet2} ran.]", {"pet": "3*cat, owl, dog"}
    )
    with pytest.raises(ValueError):  # an option must begin with text
        grammar.read("The cat saw an owl.")
    grammar = Grammar(
        "So [2*a {pet}|the {pet}] saw {a pet2}[3*.|, and the {pet2} ran.]",
        {"pet": "3*cat, owl, dog"},
    )
    random = Random(0)
    counts = Counter(grammar.write(random)[0] for _ in range(40_000))
    probabilities = {text: math.exp(grammar.read(text).log_prob) for text in counts}
    assert len(counts) == 2 * 3 * 2 * 2 and math.isclose(sum(probabilities.values()), 1)
    assert all(
        abs(counts[t] / 40_000 - p) < 5 * math.sqrt(p / 40_000) for t, p in probabilities.items()
    )
    assert not any("cat saw a cat" in text for text in counts)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1999), st.randoms(use_true_random=False))
def test_one_word_changed(number, random):
    "A tale with one word changed is refused near that word, or read as another tale with its own probability."
    text = next(tales(number))
    words = list(re.finditer(r"[A-Za-z]+", text))
    word = random.choice(words)
    other = random.choice([w for w in words if w[0] != word[0]])[0]
    changed = text[: word.start()] + other + text[word.end() :]
    verdict = check_tale(changed)
    if verdict.valid:
        assert verdict.log_prob > -math.inf and "".join(rewrite(changed)) == changed
    else:
        assert verdict.log_prob == -math.inf and verdict.message
        assert word.start() <= verdict.position <= len(changed)


def rewrite(text):
    "A tale told again by a visitor that takes the options which were read in it."

    class Again:
        def __init__(self):
            self.words, self.used, self.told, self.choices = {}, set(), [], iter(tale_choices(text))

        def add_text(self, text):
            self.told.append(text)

        def choose(self, options, key=""):
            wanted = next(self.choices).text
            return next(option for option in options if option.start(self.words, key) == wanted)

    visitor = Again()
    tale_grammar().expand(tale_grammar().nodes, visitor)
    return visitor.told


def test_a_later_mention_must_agree(some):
    "Swap one mention of the hero's or friend's name for another name of the list: every such text is refused."
    for text in some[:100]:
        names = [n for n in re.findall(r"[A-Z][a-z]+", text) if n in HE | SHE]
        hero = names[0]
        for m in list(re.finditer(rf"\b{hero}\b", text))[1:]:
            other = next(n for n in sorted(HE | SHE) if n not in names)
            verdict = check_tale(text[: m.start()] + other + text[m.end() :])
            assert not verdict.valid and m.start() <= verdict.position <= m.start() + len(other)


def test_beginnings_and_continuations_are_refused(some):
    "No tale is the beginning of another: its end is certain."
    for text in some[:50]:
        for cut in range(0, len(text), 37):
            verdict = check_tale(text[:cut])
            assert not verdict.valid and verdict.position == cut
        longer = check_tale(text + " And then?")
        assert not longer.valid and longer.position == len(text)


@pytest.mark.parametrize(
    "text", ["", "Once upon a time", "Once upon a midnight dreary", "\n", "🐻", "x" * 100_000]
)
def test_what_is_no_tale(text):
    verdict = check_tale(text)
    assert (
        not verdict.valid
        and verdict.log_prob == -math.inf
        and 0 <= verdict.position <= len(text)
        and "\n" not in verdict.message
    )


# What follows looks at the texts alone, and knows nothing of the grammar but its lists of words.


def test_form(some):
    for text in some:
        assert (
            text.startswith("Once upon a time, ")
            and "\n" not in text
            and text.isascii()
            and text == text.strip()
        )
        assert not re.search(r"  |[{}\[\]|<>*]| [.,!?]|\.\.|,,", text), text
        assert 5 <= len(re.findall(r'[.!?]"?(?= [A-Z"]|$)', text)) <= 20
        assert text.count('"') % 2 == 0
        assert re.search(r'[.!?]"?$', text)


def test_articles(some):
    "an before a vowel that is heard, a before all else; but `useless` and `unicorn`."
    for text in some:
        for article, word in re.findall(r"\b([Aa]n?) ([a-z][\w-]*)", text):
            vowel = re.match(r"[aeiou]|honest", word) and not re.match(r"unicorn|useless", word)
            assert (article.lower() == "an") == bool(vowel), (article, word)


def test_sentences_begin_large(some):
    assert not [
        text for text in some if re.search(r'[.!?]"? [a-z]', re.sub(r'[!?.]" [a-z]+', "", text))
    ]


def test_only_two_are_named(some):
    "Only the hero's and the friend's names occur, each with the pronoun of the kind that it was introduced with."
    for text in some:
        introduced = re.findall(r"(\w+) named (\w+)", text)
        assert len(introduced) == 2, text
        assert {n for n in re.findall(r"[A-Z][a-z]+", text) if n in HE | SHE} == {
            name for _, name in introduced
        }
        for kind, name in introduced:
            assert name in (HE if PRONOUNS[kind] == "he" else SHE)
        assert introduced[0][1] != introduced[1][1]


def test_pronouns(some):
    "Where everybody in a tale is of one sex, no pronoun of the other occurs."
    seen = 0
    for text in some:
        kinds = [PRONOUNS[kind] for kind, _ in re.findall(r"(\w+) named (\w+)", text)]
        parent = re.search(r"(mother|father|aunt|uncle|sister|brother)", text)[1]
        kinds.append("she" if parent in ("mother", "aunt", "sister") else "he")
        other = {"he": {"she", "her", "herself"}, "she": {"he", "him", "his", "himself"}}
        if len(set(kinds)) == 1:
            seen += 1
            assert not other[kinds[0]] & set(re.findall(r"[a-z]+", text.lower())), text
    assert seen > 100


def test_places_and_things_stay(some):
    "One house, one place, one parent, one season in every tale."
    parents = first_words("parent")
    places = first_words("place")
    for text in some:
        assert len(set(re.findall(rf"(?:his|her) ({'|'.join(parents)})", text))) == 1
        assert (
            len(
                {
                    p
                    for p in places
                    if re.search(rf"(?:to|in|on|at|reached) the (?:\w+ )?{p}\b", text)
                }
            )
            <= 1
        ), text
        assert len(set(re.findall(r"\b(spring|summer|autumn|winter)\b", text))) == 1


def test_vocabulary_and_shapes(some):
    words = Counter(word for text in some for word in re.findall(r"[a-z'-]+", text.lower()))
    assert len(words) > 700 and len(TOLD.shapes) >= 8
    forks = [
        c
        for text in some[:600]
        for c in tale_choices(text)
        if any("could not find" in option for option in c.options)
    ]
    told = Counter(list(c.options).index(c.text) for c in forks)
    assert len(forks) == 600 and len(told) == len(TOLD.shapes) and min(told.values()) > 20


def test_held_out_tales_are_not_trained_on(some):
    val = {text for text in some if held_out(text, 0.05)}
    train = [text for text in some if not held_out(text, 0.05)]
    assert val and not val & set(train)


def test_entropy():
    "The estimate agrees with another seed's and with the mean over all its tales, within its own standard error."
    one, two = tale_entropy(n=1500, seed=1), tale_entropy(n=1500, seed=2)
    assert 0.1 < one.bits_per_byte < 1 and 0 < one.standard_error < 0.01 * one.bits_per_byte
    assert abs(one.bits_per_byte - two.bits_per_byte) < 5 * math.hypot(
        one.standard_error, two.standard_error
    )
    random = Random(1)
    drawn = [draw_tale(random) for _ in range(1500)]
    assert math.isclose(
        one.bits_per_byte,
        -sum(p for _, p in drawn) / math.log(2) / sum(len(t.encode()) for t, _ in drawn),
    )


def test_every_word_and_passage_is_used():
    "No table or passage is left over, and every shape has its friend, its morals and its end."
    text = " ".join(TOLD.passages.values()) + " ".join(TOLD.shapes.values())
    used = {
        m.lower().removeprefix("a ").split(".")[0].rstrip("0123456789")
        for m in re.findall(r"\{([^}]*)\}", text)
    }
    used |= {f"moral_of_{name}" for name in TOLD.shapes} | {"he name", "she name"}
    assert not [table for table in TOLD.words if table not in used]
    assert not [name for name in TOLD.passages if f"<{name}>" not in text and name != "opening"]
    for shape in TOLD.shapes.values():
        assert "<lesson> <ending>" in shape and ("<a_friend>" in shape or "named {friend}" in shape)


@pytest.mark.slow
def test_a_hundred_thousand_tales():
    "No repeats, and every one read with exactly the probability that it was drawn with."
    random, seen = Random(2024), set()
    for _ in range(100_000):
        text, log_prob = draw_tale(random)
        verdict = check_tale(text)
        assert verdict.valid and verdict.log_prob == log_prob
        seen.add(hash(text))
    assert len(seen) == 100_000


def test_writing_speed():
    "Two megabytes in a second of one core's work; the best of three."
    from time import process_time

    def speed(seed):
        start = process_time()
        return sum(map(len, sample_tales(seed, 1000))) / (process_time() - start)

    assert max(speed(seed) for seed in range(3)) > 2e6


@pytest.mark.parametrize("template", ["a [b", "a b]", "a|b", "{a", "a}", "]a[", "[a|b"])
def test_a_broken_template_is_refused(template):
    with pytest.raises(ValueError, match="alone"):
        Grammar(template, {})


def test_a_mistyped_table_is_named():
    with pytest.raises(ValueError, match="Did you mean 'pet'"):
        Grammar("a {pett}", {"pet": "cat"}).write(Random(0))


# The words and stories are text files that anybody may change

FAULTS = {  # file, what is replaced in it, by what, the line where that stands, and what is said
    "an unknown table": (
        "shapes/01_lost.txt",
        "{colour} {thing}.",
        "{color} {thing}.",
        "{color}",
        "has no table 'color'. Did you mean 'colour'?",
    ),
    "an unknown column": (
        "passages.txt",
        "{Season.sky}",
        "{Season.skyy}",
        "{Season.skyy}",
        "has no column 'skyy'. Did you mean 'sky'?",
    ),
    "an unknown passage": (
        "shapes/02_share.txt",
        "<hooray>",
        "<hoorey>",
        "<hoorey>",
        "no passage <hoorey>. Did you mean 'hooray'?",
    ),
    "an open bracket": (
        "passages.txt",
        "there lived] ",
        "there lived ",
        "there lived {",
        "the '[' is not closed",
    ),
    "a bracket too many": (
        "shapes/04_build.txt",
        "{number4} times",
        "{number4} times]",
        "times]",
        "the ']' stands alone",
    ),
    "a bar outside": (
        "shapes/12_seed.txt",
        "Every day",
        "Every day|week",
        "Every day|week",
        "the '|' stands alone",
    ),
    "an open brace": (
        "shapes/05_race.txt",
        "{bird} counted",
        "{bird counted",
        "{bird counted",
        "stands alone",
    ),
    "odd braces": (
        "shapes/05_race.txt",
        "{bird} counted",
        "{the bird} counted",
        "{the bird}",
        "should look like {thing}",
    ),
    "an open passage": (
        "shapes/05_race.txt",
        "<then> there",
        "<then there",
        "<then there",
        "the '<' stands alone",
    ),
    "a doubled name": (
        "words.txt",
        "\nhe name:",
        "\nshe name:",
        "she name:\n    Tom",
        "'she name' stands there twice, first in line 8",
    ),
    "a doubled name in two files": (
        "shapes/05_race.txt",
        "chin:",
        "surname:",
        "surname:",
        "there is a table 'surname' already",
    ),
    "text without a name": (
        "passages.txt",
        "opening:\n",
        "",
        "    Once upon",
        "belongs to no name",
    ),
    "a name without a colon": (
        "words.txt",
        "place:\n",
        "place\n",
        "place\n",
        "neither a name with a colon",
    ),
    "an empty section": (
        "passages.txt",
        "found:\n",
        "found:\n\nmore:\n",
        "found:",
        "nothing stands under 'found'",
    ),
    "a row with a column too many": (
        "words.txt",
        "mother      | she",
        "mother | she | her",
        "mother | she | her",
        "a row has 3 columns",
    ),
    "a word twice": (
        "words.txt",
        "curious, shy",
        "curious, shy, curious",
        "shy, curious",
        "begin alike",
    ),
    "a word that begins another": (
        "words.txt",
        "kite, ball",
        "kite, balloon, ball",
        "balloon, ball",
        "'balloon' and 'ball' begin alike",
    ),
    "a missing word": (
        "words.txt",
        "kite, ball",
        "kite,, ball",
        "kite,, ball",
        "a word is missing",
    ),
    "a weight of nothing": ("words.txt", "4*boy", "0*boy", "0*boy", "'boy' has the weight 0"),
    "a bracket in a word": (
        "words.txt",
        "kite, ball",
        "kite, ball [red]",
        "kite, ball [",
        "'[' cannot stand in a word",
    ),
    "options alike": (
        "passages.txt",
        "[found|saw|",
        "[found|saw|sawed|",
        "[found|saw|",
        "two options of one choice begin with 'saw'",
    ),
    "a circle": (
        "passages.txt",
        "found|saw|",
        "found|<cried>|<found>|",
        "found|<cried>",
        "the passage <found> stands in itself",
    ),
    "no morals": (
        "shapes/03_noise.txt",
        "moral:",
        "morals:",
        "story:\n",
        "needs a section 'moral'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_story_file_is_named_with_its_line(tmp_path, fault):
    "One sentence with the file and the very line, whatever somebody has broken in it."
    name, old, new, place, says = FAULTS[fault]
    folder = shutil.copytree(STORIES, tmp_path / "stories")
    text = (folder / name).read_text(encoding="utf-8")
    broken = text.replace(old, new, 1)
    assert broken != text
    (folder / name).write_text(broken, encoding="utf-8")
    line = broken[: broken.index(place)].count("\n") + 1 + (fault == "no morals")
    with pytest.raises(UserError) as error:
        load_stories(folder)
    assert str(error.value).startswith(f"{folder / name}, line {line}: ") and says in str(
        error.value
    )


@pytest.mark.parametrize(
    "name, says",
    [
        ("words.txt", "words.txt cannot be read"),
        ("shapes/01_lost.txt", None),
        ("shapes", "cannot be read"),
    ],
)
def test_a_story_file_that_is_missing(tmp_path, name, says):
    "What is missing is named; a shape that is not there is not told."
    folder = shutil.copytree(STORIES, tmp_path / "stories")
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    if says is None:
        assert (
            "lost" not in load_stories(folder).shapes
            and len(load_stories(folder).shapes) == len(TOLD.shapes) - 1
        )
    else:
        with pytest.raises(UserError, match=says):
            load_stories(folder)


def test_a_word_and_a_shape_that_somebody_adds(tmp_path):
    "An editor of Windows may have written the file; the last shape is the one with the last name."
    folder = shutil.copytree(STORIES, tmp_path / "stories")
    words = (
        (folder / "words.txt")
        .read_text(encoding="utf-8")
        .replace("kite, ball", "kite, zeppelin, ball")
    )
    (folder / "words.txt").write_text(words, encoding="utf-8-sig", newline="\r\n")
    (folder / "shapes" / "99_quick.txt").write_text(
        "story:\n  {hero} met <a_friend>. <lesson> <ending>\nmoral:\n  so it goes\n"
    )
    stories = load_stories(folder)
    assert "zeppelin" in [row[""] for row in read_table(stories.words["thing"])]
    assert list(stories.shapes)[-1] == "quick" and "{moral_of_quick}" in stories.lesson("quick")
