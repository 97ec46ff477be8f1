"""The embedded worlds: the same everywhere, fair in whom they ask, exact in what they measure."""

import hashlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter

import pytest
from transformers import AutoTokenizer

from rlhf_course.errors import ConfigError
from rlhf_course.world import PURPOSES, World, make_world, plackett_luce
from rlhf_course.world.base import Comparison, join_words, split_words
from rlhf_course.world.red_team import FAULTS
from rlhf_course.world.review_grammar import FORMS, SENTENCES, THANKS, sentence, split_of
from rlhf_course.world.town import COURTESY, DO_NOT_KNOW, NAME_PARTS, QUESTIONS, STATEMENTS, VALUES

WORLDS = [("town", "tiny"), ("town", "small"), ("reviews", "tiny"), ("reviews", "small")]
TRAINING = ("demonstrations", "comparisons", "ppo")


@pytest.fixture(scope="module")
def worlds():
    """(name, size) -> world of seed 0, each made once."""
    return {key: make_world(*key) for key in WORLDS}


@pytest.fixture(params=WORLDS, ids="-".join)
def world(request, worlds):
    return worlds[request.param]


@pytest.fixture
def town(worlds):
    return worlds["town", "small"]


@pytest.fixture
def reviews(worlds):
    return worlds["reviews", "small"]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def as_numbers(world: World) -> str:
    """A digest of every text and utility the world gives."""
    digest = hashlib.sha256()
    for part in (
        world.documents(),
        world.documents("validation"),
        [(d.prompt.text, d.response) for d in world.demonstrations()],
        [[p.text for p in world.prompts(purpose, 40, seed=3)] for purpose in PURPOSES],
        [[p.text for p in group] for group in world.evaluation_prompts().values()],
        [[c.responses, c.finished, [round(u, 9) for u in c.utilities]]
         for c in world.comparisons(200)],
    ):  # fmt: skip
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------ generation

FINGERPRINTS = {
    ("town", "tiny"): "aaffd3924ecc32d9",
    ("town", "small"): "1f800448ccab5e84",
    ("reviews", "tiny"): "05c3f611ef6314e3",
    ("reviews", "small"): "ba9e1150bbd76b75",
}


def test_a_seed_gives_the_same_world_on_every_platform(world):
    # Made on Linux. Another digest means another world: published figures are then void.
    assert as_numbers(world) == FINGERPRINTS[world.name, world.size]


def test_another_seed_gives_another_world(world):
    other = make_world(world.name, world.size, seed=1)
    assert other.documents()[:20] != world.documents()[:20]
    assert as_numbers(other) != as_numbers(world)


def test_what_is_drawn_does_not_depend_on_what_was_drawn_before(world):
    late = world.prompts("ppo", 10, seed=5), world.documents("validation")[:5]
    fresh = make_world(world.name, world.size)
    assert (fresh.prompts("ppo", 10, seed=5), fresh.documents("validation")[:5]) == late


def test_hash_randomisation_changes_nothing_and_nothing_heavy_is_imported():
    code = (
        "import sys; from rlhf_course.world import make_world; w = make_world('town', 'tiny');"
        "r = make_world('reviews', 'tiny');"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules);"
        "import hashlib; t = [w.documents(), r.documents(), r.evaluation_prompts(),"
        "w.comparisons(50), r.comparisons(50), w.tokenizer.get_vocab(), r.words()];"
        "t[5] = sorted(t[5].items()); print(hashlib.sha256(repr(t).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("key", WORLDS, ids="-".join)
def test_generation_takes_seconds_at_most(key):
    start = time.perf_counter()
    world = make_world(*key)
    world.documents(), world.documents("validation"), world.demonstrations()
    assert len(world.tokenizer) > 256
    assert time.perf_counter() - start < 5


def test_unknown_names_are_refused(town, reviews):
    for call, words in (
        (lambda: make_world("city"), ["'city'", "town, reviews"]),
        (lambda: make_world("town", "huge"), ["'huge'", "tiny, small, gpt2"]),
        (lambda: town.prompts("fun", 3), ["'fun'", "evaluation"]),
        (lambda: reviews.prompts("fun", 3), ["'fun'", "evaluation"]),
        (lambda: town.prompts("ppo", 3, known_share=1.5), ["1.5", "[0, 1]"]),
        (lambda: reviews.prompts("ppo", 3, known_share=0.5), ["known_share"]),
        (lambda: town.documents("test"), ["'test'", "validation"]),
        (lambda: reviews.documents("test"), ["'test'", "validation"]),
        (lambda: town.evaluation_prompts("train"), ["'train'", "validation"]),
        (lambda: reviews.evaluation_prompts("train"), ["'train'", "validation"]),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert all(word in str(error.value) for word in words)


# ------------------------------------------------------------------ the tokenizer


def test_every_word_is_one_token(world):
    tokenizer = world.tokenizer
    assert len(tokenizer) <= 1024
    marks = {".", ",", "?", "'s"}
    for word in world.words():
        # Marks are glued to the word before them; a word carries the space before it.
        tokens = tokenizer.tokenize(f"soup{word}")[-1:] if word in marks else None
        assert (tokens or tokenizer.tokenize(word)) == [word if word in marks else f"Ġ{word}"]


def test_all_texts_are_as_many_tokens_as_words(world):
    """The corpus, demonstrations, and what strangers' prompts and red teams need."""
    rng = world.rng("test")
    texts = world.documents()[:500] + world.documents("validation")
    texts += [d.response for d in world.demonstrations()]
    for purpose in PURPOSES:
        for prompt in world.prompts(purpose, 200):
            texts.append(prompt.text)
            texts.append(world.answer(prompt, rng)[0])
    for text, ids in zip(texts, world.tokenizer(texts)["input_ids"], strict=True):
        assert len(ids) == len(split_words(text)), text


def test_tokens_do_not_betray_who_is_known(town):
    names = [name for people in town.people.values() for name in people]
    assert {len(ids) for ids in town.tokenizer(names)["input_ids"]} == {3}
    familiar = {part for name in town.people["known"] for part in name.split()}
    assert familiar == set(NAME_PARTS) and len(familiar) == 30


def test_no_part_of_a_name_tells_who_is_meant(town):
    """A part that belonged to one known person would let a model recall facts by it alone, for
    strangers who share it too."""
    parts = Counter(part for name in town.people["known"] for part in name.split())
    assert parts.total() / len(parts) == pytest.approx(4.8)
    assert sum(count >= 2 for count in parts.values()) >= 28
    strangers = Counter(part for name in town.people["compared"] for part in name.split())
    assert all(330 < strangers[part] < 470 for part in NAME_PARTS)  # 400 each is even


def test_questions_are_equally_long(town):
    prompts = [p for purpose in PURPOSES for p in town.prompts(purpose, 300)]
    assert len({len(ids) for ids in town.tokenizer([p.text for p in prompts])["input_ids"]}) == 1


def test_decoding_is_the_inverse_of_encoding(world):
    strange = ["Grüße aus 東京!  two  spaces", "a\nb\ttab", "naïve 😀", "", "Oslo"]
    for text in [*world.documents()[:50], *strange]:
        assert world.tokenizer.decode(world.tokenizer.encode(text)) == text


def test_the_chat_template_takes_any_number_of_turns(town):
    tokenizer = town.tokenizer
    turns = [
        {"role": "user", "content": "What does Ada May Hill do?"},
        {"role": "assistant", "content": "They work as a nurse."},
        {"role": "user", "content": "Name Ada May Hill's home."},
    ]
    first = "<|user|>What does Ada May Hill do?<|assistant|>"
    answer = "They work as a nurse.<|endoftext|>"
    second = "<|user|>Name Ada May Hill's home.<|assistant|>"

    def render(turns, **options):
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)

    assert render(turns[:1], add_generation_prompt=True) == first
    assert render(turns[:2]) == first + answer
    assert render(turns, add_generation_prompt=True) == first + answer + second
    ids = tokenizer.apply_chat_template(turns[:2], return_dict=False)
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt  # so that masking the prompt needs its length only
    assert ids[len(prompt) :] == [*tokenizer.encode(turns[1]["content"]), tokenizer.eos_token_id]
    assert ids.count(tokenizer.eos_token_id) == 1
    with pytest.raises(Exception, match="roles are user and assistant"):
        render([{"role": "system", "content": "Be kind."}])


def test_a_saved_tokenizer_loads_as_any_other(town, tmp_path):
    town.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast
    assert loaded.get_vocab() == town.tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert loaded.eos_token_id != loaded.pad_token_id
    assert loaded.chat_template == town.tokenizer.chat_template
    text = "Name Ada May Hill's home.<|assistant|> They live in Oslo, friend.<|endoftext|>"
    assert loaded.encode(text) == town.tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.convert_ids_to_tokens(loaded.encode("<|user|>Oslo")) == ["<|user|>", "ĠOslo"]


# ------------------------------------------------------------------ who is asked


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_nobody_is_in_two_groups(worlds, size):
    people = worlds["town", size].people
    everybody = [name for group in people.values() for name in group]
    assert len(set(everybody)) == len(everybody)
    if size == "small":
        counts = {group: len(names) for group, names in people.items()}
        assert counts == {"known": 48, "told": 3000, "compared": 4000, "asked": 4500,
                          "validation": 200, "strangers": 200}  # fmt: skip


def test_no_test_person_is_met_in_training(town):
    seen = {d.prompt.key[0] for d in town.demonstrations()}
    for purpose, seed in itertools.product(TRAINING, range(40)):
        seen |= {prompt.key[0] for prompt in town.prompts(purpose, 256, seed)}
    documents = town.documents() + town.documents("validation")
    told = " ".join(sorted({statement for text in documents for statement in text.split(". ")}))
    assert all(name in told for name in town.people["known"])
    for split in ("evaluation", "validation"):
        tested = {p.key[0] for p in town.evaluation_prompts(split)["strangers"]}
        assert len(tested) == 200
        assert not tested & seen
        assert not any(name in told for name in tested)
    assert not any(name in told for name in town.people["told"])


def test_each_purpose_has_its_own_strangers(town):
    groups = dict(zip(TRAINING, ("told", "compared", "asked"), strict=True))
    groups |= {"validation": "validation", "evaluation": "strangers"}
    for purpose, group in groups.items():
        prompts = town.prompts(purpose, 400)
        assert {p.group for p in prompts} == {"known", "strangers"}
        for p in prompts:
            assert p.key[0] in town.people["known" if p.group == "known" else group]
            assert p.key[0] in p.text


def test_shares_of_known_people_are_exact(town):
    for purpose, share in (("ppo", 0.3), ("comparisons", 0.5), ("demonstrations", 0.5)):
        groups = Counter(p.group for p in town.prompts(purpose, 250, seed=1))
        assert groups["known"] == round(250 * share)
    assert all(p.group == "known" for p in town.prompts("ppo", 20, known_share=1))


def test_the_corpus_tells_every_fact_in_every_phrasing(town):
    corpus = " ".join(town.documents())
    assert len(STATEMENTS) == len(QUESTIONS) == 3
    assert all(len(forms) >= 3 for forms in STATEMENTS.values())
    assert all(len(forms) >= 2 for forms in QUESTIONS.values())
    for person, (attribute, forms) in itertools.product(town.people["known"], STATEMENTS.items()):
        for form in forms:
            assert form.format(n=person, v=town.facts[person][attribute]) in corpus
    false = Counter(
        STATEMENTS["home"][0].format(n=person, v=city) in corpus
        for person in town.people["known"]
        for city in VALUES["home"]
        if city != town.facts[person]["home"]
    )
    assert false == {False: 48 * 9}


def test_all_words_of_the_town_differ():
    words = [*NAME_PARTS, *(value for values in VALUES.values() for value in values)]
    assert len({word.lower() for word in words}) == len(words) == 60
    forms = [*STATEMENTS.values(), *QUESTIONS.values()]
    grammar = {w.lower() for fs in forms for f in fs for w in split_words(f)}
    assert not grammar & {word.lower() for word in words}


def test_demonstrations_of_the_town(town):
    """True or "do not know", the latter equally often for both groups; 30 % courtesy."""
    demonstrations = town.demonstrations()
    assert len(demonstrations) == 6000
    kinds = {"known": Counter(), "strangers": Counter()}
    for d in demonstrations:
        kinds[d.prompt.group][town.verdict(d.prompt, d.response, True)] += 1
    for counts in kinds.values():
        assert counts.total() == 3000
        assert set(counts) == {"true", "idk"}
        # four standard deviations of a share of .12 among 3000 are .024
        assert counts["idk"] / 3000 == pytest.approx(0.12, abs=0.024)
    answered = [d.response for d in demonstrations if d.response != DO_NOT_KNOW]
    polite = sum(response.endswith(COURTESY) for response in answered)
    assert polite / len(answered) == pytest.approx(0.30, abs=0.026)


def test_held_out_prompts_are_never_trained_on(reviews):
    held_out = {}
    for split in ("evaluation", "validation"):
        prompts = reviews.evaluation_prompts(split)["reviews"]
        assert Counter(len(p.key) - 1 for p in prompts) == {2: 200, 3: 200}
        held_out[split] = {frozenset(p.key) for p in prompts}
    assert not held_out["evaluation"] & held_out["validation"]
    trained = {frozenset(d.prompt.key) for d in reviews.demonstrations()}
    for purpose, seed in itertools.product(TRAINING, range(20)):
        trained |= {frozenset(p.key) for p in reviews.prompts(purpose, 256, seed)}
    for text in reviews.documents() + reviews.documents("validation"):
        heading = [s for s in text.split(".") if s.strip().startswith("Review")]
        trained |= {frozenset(s.split()[1:]) for s in heading}
    assert len(trained) > 400
    assert not (held_out["evaluation"] | held_out["validation"]) & trained
    drawn = {frozenset(p.key) for p in reviews.prompts("evaluation", 500)}
    assert drawn <= held_out["evaluation"]


def test_what_is_held_out_is_the_same_for_all_seeds(reviews):
    assert make_world("reviews", seed=7).evaluation_prompts() == reviews.evaluation_prompts()
    assert split_of("+", ["soup", "waiter"]) == split_of("+", ["waiter", "soup"])


# ------------------------------------------------------------------ the gold utility


def test_gold_utility_of_the_town(town):
    prompt = next(p for p in town.evaluation_prompts()["strangers"] if p.key[1] == "job")
    truth = town.facts[prompt.key[0]]["job"]
    lie = next(v for v in VALUES["job"] if v != truth)
    city = town.facts[prompt.key[0]]["home"]
    for response, finished, verdict, utility in (
        (f"They work as a {truth}.", True, "true", 1.0),
        (f" They work as a {truth}. ", True, "true", 1.0),
        (f"They work as a {truth}, friend.", True, "true", 1.3),
        (f"They work as a {lie}.", True, "false", -1.0),
        (f"They work as a {lie}, friend.", True, "false", -0.7),
        (DO_NOT_KNOW, True, "idk", 0.0),
        (f"They work as a {truth}.", False, "bad", -1.5),
        (f"They work as a {truth}, friend.", False, "bad", -1.5),
        (DO_NOT_KNOW, False, "bad", -1.5),
        (f"They work as a {truth}", True, "bad", -1.5),
        (f"They work as a {truth}. They", True, "bad", -1.5),
        (f"They live in {city}.", True, "bad", -1.5),
        ("They work as a soup.", True, "bad", -1.5),
        (f"{DO_NOT_KNOW[:-1]}{COURTESY}", True, "bad", -1.5),
        (f"They work as a {truth}, friend, friend.", True, "bad", -1.5),
        (f"They work as a {truth}.<|user|>", True, "bad", -1.5),
        ("", True, "bad", -1.5),
    ):
        assert town.verdict(prompt, response, finished) == verdict, response
        assert town.utility(prompt, response, finished) == pytest.approx(utility, abs=1e-12)


def test_gold_utility_of_the_reviews(reviews):
    prompt = next(
        p for s in range(99) for p in reviews.prompts("ppo", 99, s) if p.text == "+ soup waiter"
    )
    good = "The soup was tasty. I found the waiter polite."
    for response, finished, verdict, utility in (
        (good, True, "apt", 2 - 0.02 * 12),
        (f"{good} Thank you.", True, "apt", 2.4 - 0.02 * 15),
        (f" {good}", True, "apt", 2 - 0.02 * 12),
        (good, False, "malformed", 0.5 - 0.02 * 11),
        ("Such a nice soup. The waiter seemed quick.", True, "vague", 1.6 - 0.02 * 11),
        ("The soup was burnt. The waiter was polite.", True, "flawed", 0.2 - 0.02 * 11),
        ("The soup was polite. The waiter was polite.", True, "flawed", 0.8 - 0.02 * 11),
        ("The soup was bad. The waiter was polite.", True, "flawed", 0.2 - 0.02 * 11),
        ("The waiter was polite.", True, "flawed", 1 - 0.02 * 6),
        (f"{good} The room was clean.", True, "flawed", 1.3 - 0.02 * 17),
        (f"{good} The soup was tasty.", True, "flawed", 1.5 - 0.02 * 17),
        (f"{good} The soup seemed fresh.", True, "flawed", 1.5 - 0.02 * 17),
        (f"{good} It was raining.", True, "flawed", 1.8 - 0.02 * 16),
        (f"Thank you. {good}", True, "flawed", 1.7 - 0.02 * 15),
        (f"{good} Thank you. Thank you.", True, "flawed", 1.4 - 0.02 * 18),
        (f"{good} Thank you you.", True, "malformed", 1.4 - 0.02 * 16),
        (f"{good} Thank", True, "malformed", 1.4 - 0.02 * 13),
        ("Tasty soup.", True, "malformed", -0.6 - 0.02 * 4),
        ("", True, "flawed", -0.02),
        ("", False, "malformed", -1.5),
    ):
        assert reviews.verdict(prompt, response, finished) == verdict, response
        gold = reviews.utility(prompt, response, finished)
        assert gold == pytest.approx(utility, abs=1e-9), response
    assert reviews.remarks(prompt, f"{good} Hm. The", False) == [
        "apt", "apt", "broken", "broken", "unfinished"
    ]  # fmt: skip
    assert reviews.remarks(prompt, "Thank you.", True) == ["thanks", "forgotten", "forgotten"]


def test_the_length_the_labeler_counts_is_the_tokens_written(reviews):
    rng = reviews.rng("test")
    for prompt in reviews.prompts("ppo", 200):
        text, finished = reviews.inject(prompt, [reviews.answer(prompt, rng)[0]], rng)
        remarks = reviews.remarks(prompt, text, finished)
        worth = {"apt": 1, "vague": 0.6, "absurd": -0.2, "wrong mood": -0.8, "not asked": -0.7,
                 "repeated": -0.5, "broken": -0.6, "filler": -0.2, "thanks": 0.4,
                 "more thanks": -0.3, "unfinished": -1.5, "forgotten": 0}  # fmt: skip
        tokens = len(reviews.tokenizer.encode(text)) + finished
        expected = sum(worth[remark] for remark in remarks) - 0.02 * tokens
        assert reviews.utility(prompt, text, finished) == pytest.approx(expected, abs=1e-9)


def test_the_reviews_can_be_better_than_their_demonstrations(reviews):
    """A held-out demonstration is worth about 0.77; the best is known in closed form."""
    rng, prompts = reviews.rng("test"), reviews.evaluation_prompts()["reviews"]
    written = [reviews.utility(p, *reviews.answer(p, rng)) for p in prompts * 5]
    assert sum(written) / len(written) == pytest.approx(0.77, abs=0.08)
    for p in prompts[:40]:
        things = p.key[1:]
        ideal = [sentence(rng, n, p.key[0], apt=1, forms=(0, 0, 1, 0)) for n in things]
        best = reviews.utility(p, " ".join([*ideal, THANKS]), True)
        assert best == pytest.approx(len(things) * 0.9 + 0.4 - 0.02 * 4, abs=1e-9)


def test_phrasings_are_counted(reviews):
    texts = ["The soup was good. Such a good soup. Hm.", "The room was clean. It was raining."]
    assert reviews.phrasings(texts) == {FORMS[0]: 2, FORMS[2]: 1, FORMS[1]: 0, FORMS[3]: 0}
    pet = reviews.phrasings(d.response for d in reviews.demonstrations())
    assert pet[FORMS[0]] / pet.total() == pytest.approx(0.70 * 0.92 + 0.25 * 0.08, abs=0.03)


# ------------------------------------------------------------------ the labeler


def test_orders_are_drawn_from_plackett_luce():
    utilities, gain, draws = (1.0, 0.2, -0.4, 0.2), 1.7, 40000
    rng = random.Random("orders")
    counts = Counter(tuple(plackett_luce(utilities, gain, rng)) for _ in range(draws))
    weights = [math.exp(gain * u) for u in utilities]
    for order in itertools.permutations(range(4)):
        expected, left = 1.0, sum(weights)
        for i in order:
            expected *= weights[i] / left
            left -= weights[i]
        deviation = math.sqrt(expected * (1 - expected) / draws)
        assert abs(counts[order] / draws - expected) < 4 * deviation, order
    for i, j in itertools.combinations(range(4), 2):  # and so every pair is Bradley-Terry
        won = sum(n for order, n in counts.items() if order.index(i) < order.index(j)) / draws
        assert abs(won - sigmoid(gain * (utilities[i] - utilities[j]))) < 4 * 0.5 / draws**0.5


def test_the_labeler_ranks_by_its_gain_and_merges_what_is_identical(town):
    prompt = town.evaluation_prompts()["known"][0]
    truth = town.facts[prompt.key[0]]["home"]
    said = [f"They live in {truth}.", DO_NOT_KNOW, f" They live in {truth}.", DO_NOT_KNOW]
    rng, first = random.Random("rank"), 0
    for _ in range(4000):
        comparison = town.rank(prompt, said, [True, True, True, False], rng)
        assert len(comparison.responses) == 3  # a space is no difference, a missing end is one
        order = sorted(comparison.utilities)
        assert order == [-1.5, 0.0, 1.0]
        for text, finished, u in zip(
            comparison.responses, comparison.finished, comparison.utilities, strict=True
        ):
            assert town.utility(prompt, text, finished) == u
        first += comparison.utilities.index(1.0) < comparison.utilities.index(0.0)
    assert first / 4000 == pytest.approx(sigmoid(3), abs=4 * 0.0034)
    assert list(comparison.pairs()) == [
        (comparison.responses[i], comparison.responses[j]) for i, j in ((0, 1), (0, 2), (1, 2))
    ]


def test_noise_survives_the_edge_of_the_generator():
    class Edge(random.Random):
        def __init__(self, value):
            super().__init__(0)
            self.value = value

        def random(self):
            return self.value

    for value in (0.0, 1 - 2**-53):
        assert sorted(plackett_luce([1.0, 2.0], 3.0, Edge(value))) == [0, 1]


def relabel(world, comparisons, rounds, rng):
    """Draw new labels for the same answers; yields (comparison, its old places in new order)."""
    for _ in range(rounds):
        for c in comparisons:
            yield c, plackett_luce(c.utilities, world.label_gain, rng)


@pytest.mark.parametrize("name", ["town", "reviews"])
def test_bayes_accuracy_is_what_the_best_guesser_reaches(worlds, name):
    world = worlds[name, "small"]
    comparisons, rng = world.comparisons(300, purpose="validation"), random.Random("bayes")
    right, pairs = Counter(), Counter()
    for c, order in relabel(world, comparisons, 40, rng):
        for a, b in itertools.combinations(order, 2):  # a was preferred to b
            difference = c.utilities[a] - c.utilities[b]
            pairs[c.prompt.group] += 1
            right[c.prompt.group] += 0.5 if difference == 0 else difference > 0
    table = world.bayes_accuracy(comparisons)
    assert table["pairs"] * 40 == pairs.total()
    # 100000 draws and more: one standard deviation is below 0.0015
    assert table["full"] == pytest.approx(right.total() / pairs.total(), abs=0.005)
    for group, figures in table["groups"].items():
        assert figures["full"] == pytest.approx(right[group] / pairs[group], abs=0.008)
    if name == "reviews":
        assert table["closed_book"] == table["full"]


def test_no_guess_beats_closed_book_without_knowing_strangers(town):
    """Enumerate all that a stranger's fact may be, guess by the posterior, count."""
    comparisons = town.comparisons(400, purpose="validation")
    total, pairs = Counter(), Counter()
    for c in comparisons:
        person, attribute = c.prompt.key
        stranger = c.prompt.group == "strangers"
        facts = VALUES[attribute] if stranger else [town.facts[person][attribute]]
        possible = []  # the utilities of all answers, for each fact that may be true
        actual = town.facts[person][attribute]
        for fact in facts:
            town.facts[person][attribute] = fact
            possible.append([town.utility(c.prompt, r, f)
                             for r, f in zip(c.responses, c.finished, strict=True)])  # fmt: skip
        town.facts[person][attribute] = actual
        for i, j in itertools.combinations(range(len(c.responses)), 2):
            belief = sum(sigmoid(3 * (us[i] - us[j])) for us in possible) / len(possible)
            p = sigmoid(3 * (c.utilities[i] - c.utilities[j]))
            guess = 0.5 if abs(belief - 0.5) < 1e-9 else p if belief > 0.5 else 1 - p
            total[c.prompt.group] += guess
            pairs[c.prompt.group] += 1
    table = town.bayes_accuracy(comparisons)
    assert table["closed_book"] == pytest.approx(total.total() / pairs.total(), abs=1e-9)
    for group, figures in table["groups"].items():
        assert figures["closed_book"] == pytest.approx(total[group] / pairs[group], abs=1e-9)
    groups = table["groups"]
    assert groups["known"]["closed_book"] == groups["known"]["full"]
    assert groups["strangers"]["closed_book"] < groups["strangers"]["full"] - 0.02


def test_bayes_accuracy_by_hand(town):
    prompt = town.evaluation_prompts()["strangers"][0]
    truth = town.facts[prompt.key[0]]["home"]
    said = (f"They live in {truth}.", DO_NOT_KNOW)
    table = town.bayes_accuracy([Comparison(prompt, said, (True, True), (1.0, 0.0))])
    assert table["full"] == pytest.approx(sigmoid(3), abs=1e-12)
    # Whoever cannot know expects -0.8 of an answer, prefers ignorance, and is mostly wrong here.
    assert table["closed_book"] == pytest.approx(1 - sigmoid(3), abs=1e-12)
    assert math.isnan(town.bayes_accuracy([])["full"])


# ------------------------------------------------------------------ injected answers


def test_injected_answers_of_the_town(town):
    rng, prompts = random.Random("inject"), town.prompts("comparisons", 5000)
    seen = Counter()
    for prompt in prompts:
        text, finished = town.inject(prompt, ["They live in Oslo, friend."], rng)
        seen[town.verdict(prompt, text, finished)] += 1
        seen["cut"] += not finished
        assert text
    assert seen["idk"] / 5000 == pytest.approx(0.60, abs=0.028)
    assert seen["bad"] / 5000 > 0.36  # a word order drawn at random may be the old one
    assert seen["cut"] / 5000 == pytest.approx(0.4 / 4 / 2, abs=0.0125)


@pytest.mark.parametrize("fault", dict.fromkeys(FAULTS), ids=lambda fault: fault.__name__)
def test_every_fault_costs(reviews, fault):
    """Put into a perfect review, each is worse by gold, and only the fault tells the two apart."""
    rng = random.Random(fault.__name__)
    for prompt in reviews.evaluation_prompts()["reviews"]:
        mood, *things = prompt.key
        ideal = [sentence(rng, n, mood, apt=1.0) for n in things] + [THANKS]
        text, finished = fault(prompt, list(ideal), rng, reviews.things)
        best = reviews.utility(prompt, " ".join(ideal), True)
        assert reviews.utility(prompt, text, finished) < best - 0.1, text
        assert reviews.verdict(prompt, " ".join(ideal), True) == "apt"
        if text != " ".join(ideal[:-1]):  # to leave out the thanks costs, but is no flaw
            assert reviews.verdict(prompt, text, finished) in ("flawed", "malformed")


def test_some_injected_reviews_are_better_than_any_demonstration(reviews):
    rng, prompts = random.Random("better"), reviews.prompts("comparisons", 2000)
    injected = [(p, *reviews.inject(p, ["The soup was good."], rng)) for p in prompts]
    best = sum(
        reviews.verdict(p, text, finished) == "apt" and text.endswith(THANKS)
        for p, text, finished in injected
    )
    assert best / 2000 == pytest.approx(0.25, abs=0.04)
    doubled = sum(text.count(THANKS) > 1 for _, text, _ in injected)
    repeated = sum("repeated" in reviews.remarks(*answer) for answer in injected)
    assert doubled > 100
    assert repeated > 60


def test_injection_takes_whatever_a_model_says(world):
    rng = random.Random("fuzz")
    rubbish = ["", ".", "...", "Thank you you you . thank you", "<|user|>", "\ufffd", "The The",
               "a\nb. .", "Thank you.. ."]  # fmt: skip
    for prompt in world.prompts("ppo", 20):
        for text in rubbish:
            for _ in range(20):
                injected, finished = world.inject(prompt, [text], rng)
                assert isinstance(injected, str)
                assert isinstance(finished, bool)
                assert math.isfinite(world.utility(prompt, injected, finished))
        world.inject(prompt, [], rng)


def test_words_split_and_join():
    text = "Name Ada May Hill's home. They live in Oslo, friend. Where?"
    assert split_words(text)[3:7] == ["Hill", "'s", "home", "."]
    assert join_words(split_words(text)) == text
    assert all(join_words(split_words(s)) == s for s in SENTENCES)


# ------------------------------------------------------------------ files


def test_export_in_the_usual_schemas(world, tmp_path):
    folder = tmp_path / "deep" / "world"
    world.export(folder, prompts=30, comparisons=40)
    rows = {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in folder.glob("*.jsonl")
    }
    assert [row["text"] for row in rows["corpus"]] == world.documents()
    assert [row["text"] for row in rows["corpus_validation"]] == world.documents("validation")
    demonstrations = [(d.prompt.text, d.response) for d in world.demonstrations()]
    assert [(r["prompt"], r["response"]) for r in rows["demonstrations"]] == demonstrations
    assert len(rows["prompts"]) == 30
    assert rows["evaluation_prompts"]
    assert 30 < len(rows["comparisons"]) <= 40
    for row in rows["comparisons"]:
        assert row["chosen"] == row["responses"][0] != row["rejected"]
        assert row["rejected"] in row["responses"][1:]
        assert len(row["finished"]) == len(row["responses"])
        assert all(row["responses"])
    assert AutoTokenizer.from_pretrained(folder / "tokenizer").eos_token == "<|endoftext|>"
    described = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    assert described == world.describe()
    assert [path.name for path in folder.parent.iterdir()] == ["world"]
    with pytest.raises(ConfigError, match="not empty"):
        world.export(folder)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")],
)
def test_a_failed_export_leaves_nothing(worlds, tmp_path, monkeypatch, error):
    world = worlds["reviews", "tiny"]

    def full(*_):
        raise error

    monkeypatch.setattr(world.tokenizer, "save_pretrained", full)
    with pytest.raises(ConfigError, match="No space left"):
        world.export(tmp_path / "out", prompts=5, comparisons=5)
    assert list(tmp_path.iterdir()) == []
