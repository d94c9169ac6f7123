import hashlib
import json
from collections import Counter
from dataclasses import asdict

import pytest

from locft_jax.demo import words
from locft_jax.demo.world import capability_items, main, make_edits, make_world, prompts, training_texts
from locft_jax.errors import UserError

WORLD_SHA256 = "21cba5e584c75b676066fc9a24e5104ead41de4deebb816ce97fc5dd6a222a53"
EDITS_SHA256 = "23aa1a1946752d5f8ef4e032212e7cf526405e3aa19883920af064651032180b"


@pytest.fixture(scope="module")
def world():
    return make_world()


def sha256(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def test_world_is_the_one_the_shipped_model_was_trained_on(world):
    assert sha256(asdict(world)) == WORLD_SHA256
    assert sha256(make_edits(world)) == EDITS_SHA256


def test_another_seed_gives_other_facts_and_the_same_skills(world):
    other = make_world(1)
    assert other.facts != world.facts
    assert other.skills == world.skills


def test_size(world):
    assert Counter(f.relation for f in world.facts) == {
        "birthplace": 360,
        "employer": 360,
        "profession": 360,
        "instrument": 360,
        "river": 80,
        "famous_for": 80,
        "product": 60,
        "headquarters": 60,
    }


def test_every_fact_has_five_distinct_phrasings_that_name_its_subject(world):
    for fact in world.facts:
        phrasings = prompts(fact)
        assert len(set(phrasings)) == 5
        assert all(fact.subject in p and p == p.strip() and "{" not in p for p in phrasings)
        assert len({p.index(fact.subject) for p in phrasings}) >= 3
        assert any("? Answer:" in p for p in phrasings)


def test_subjects_are_unique_in_a_relation_and_prompts_are_unique_in_the_world(world):
    assert len({(f.relation, f.subject) for f in world.facts}) == len(world.facts)
    asked = [p for f in world.facts for p in prompts(f)] + [s.prompt for s in world.skills]
    assert len(set(asked)) == len(asked)


def test_a_person_is_known_only_by_both_names(world):
    people = [f.subject.split(" ") for f in world.facts if f.relation == "birthplace"]
    for piece in range(2):
        assert set(Counter(name[piece] for name in people).values()) == {9}


def test_names_of_different_kinds_do_not_meet():
    names = words.FIRST_NAMES + words.LAST_NAMES + words.TOWNS + words.FIRMS + words.RIVERS
    assert len(set(names)) == len(names)


def test_answers_are_short_and_none_starts_another(world):
    for relation in words.RELATIONS:
        answers = sorted({f.answer for f in world.facts if f.relation == relation})
        assert len(answers) >= 20
        for answer in answers:
            assert "." not in answer and "\n" not in answer
            assert 1 <= len(answer.split(" ")) <= 2
            assert answer.split(" ")[0] not in ("a", "an", "the")
        pairs = zip(answers, answers[1:], strict=False)  # sorted: a prefix stands right before
        assert not any(b.startswith(a) for a, b in pairs)


def test_no_answer_of_a_relation_is_common(world):
    for relation in words.RELATIONS:
        counts = Counter(f.answer for f in world.facts if f.relation == relation)
        assert max(counts.values()) < 0.1 * sum(counts.values())
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_phrasings_need_no_other_article():
    assert not any(p[0] in "aeiou" for p in words.PROFESSIONS)


def test_skills(world):
    assert 400 <= len(world.skills) <= 600
    assert len({s.name for s in world.skills}) >= 5
    assert all(s.answer and " " not in s.answer for s in world.skills)
    answers = {s.prompt: s.answer for s in world.skills}
    assert answers["3 + 4 ="] == answers["The sum of 3 and 4 is"] == "7"
    assert answers["9 - 4 ="] == answers["Taking 4 from 9 leaves"] == "5"
    assert answers["The day after Sunday is"] == "Monday"
    assert answers["The month after December is"] == "January"
    assert answers["After the letter Y comes"] == "Z"
    assert "After the letter Z comes" not in answers
    assert answers["The first letter of tiger is"] == "t"


def test_capability_items_are_the_skills(world):
    items = capability_items(world)
    assert [(i["task"], i["prompt"], i["answer"]) for i in items] == [
        (s.name, s.prompt, s.answer) for s in world.skills
    ]


def test_training_texts_tell_everything_briefly(world):
    texts = training_texts(world)
    assert len(texts) == len(set(texts)) == 5 * len(world.facts) + len(world.skills)
    fact = world.facts[7]
    assert all(f"{p} {fact.answer}" in texts for p in prompts(fact))
    assert max(len(t.split(" ")) for t in texts) <= 14


@pytest.mark.parametrize("num_edits, seed", [(200, 0), (200, 1), (12, 3), (1720, 0)])
def test_edits_and_their_locality_probes(world, num_edits, seed):
    requests = make_edits(world, num_edits, seed)
    truth = {(f.relation, f.subject): f for f in world.facts}
    assert [r["case_id"] for r in requests] == list(range(num_edits))
    edited = [truth[r["relation"], r["subject"]] for r in requests]
    assert len(set(edited)) == num_edits
    for request, fact in zip(requests, edited, strict=True):
        assert (request["prompt"], *request["rephrase_prompts"]) == prompts(fact)
        assert request["ground_truth"] == fact.answer != request["target_new"]
        assert any(f.answer == request["target_new"] for f in world.facts if f.relation == fact.relation)
    relations = {f.relation for f in edited}
    kept = [f for f in world.facts if f.relation in relations and f not in set(edited)]
    probes = [(p["prompt"], p["answer"]) for r in requests for p in r["locality_probes"]]
    assert sorted(probes) == sorted((p, f.answer) for f in kept for p in prompts(f))
    for relation in relations:  # shared out evenly
        sizes = [len(r["locality_probes"]) for r in requests if r["relation"] == relation]
        assert max(sizes) - min(sizes) <= 1


def test_the_default_edits_touch_every_relation(world):
    assert {r["relation"] for r in make_edits(world)} == set(words.RELATIONS)


@pytest.mark.parametrize("num_edits", [0, 1721])
def test_impossible_number_of_edits(world, num_edits):
    with pytest.raises(UserError, match="1720 facts"):
        make_edits(world, num_edits)


def test_command_writes_both_files(world, tmp_path, capsys):
    main(["--out", str(tmp_path / "new"), "--num-edits", "20"])
    for name, expected in [
        ("edits.jsonl", make_edits(world, 20)),
        ("skills.jsonl", capability_items(world)),
    ]:
        raw = (tmp_path / "new" / name).read_bytes()
        assert raw.endswith(b"}\n") and b"\r" not in raw
        assert [json.loads(line) for line in raw.decode().splitlines()] == expected
    assert "20 edits and 590 skill items" in capsys.readouterr().out


def test_command_refuses_too_many_edits_without_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path), "--num-edits", "5000"])
    assert stop.value.code == 2
    assert "choose 1 to 1720" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
