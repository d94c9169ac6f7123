"""Edit requests: every layout, the rules for duplicates and conflicts, every bad record."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from locft_jax.data.requests import EditRequest, read_requests, requests_from_records
from locft_jax.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data sets at {SHARED}")


@pytest.fixture
def read(tmp_path, write):
    """The requests of records that were written to a JSON file."""

    def read_records(*records, **options):
        return read_requests(write(tmp_path / "edits.json", list(records)), **options)

    return read_records


# --- layouts --------------------------------------------------------------------------------------

LAYOUTS = {
    "plain": (
        {"prompt": "The lake of Orm is", "target_new": "green"},
        EditRequest("0", "The lake of Orm is", "green"),
    ),
    "plain, other names": (
        {"question": "Who runs Orm?", "answer": "Ila", "colour": {"left": "alone"}},
        EditRequest("0", "Who runs Orm?", "Ila"),
    ),
    "zsre": (
        {
            "subject": "Orm",
            "src": "Who runs Orm?",
            "pred": "Bo",
            "rephrase": "Orm is run by whom?",
            "alt": "Ila",
            "answers": ["Tam", "Tam Tam"],
            "loc": "nq question: where is up",
            "loc_ans": "above",
            "cond": "Bo >> Ila || Who runs Orm?",
        },
        EditRequest(
            "0",
            "Who runs Orm?",
            "Ila",
            subject="Orm",
            ground_truth="Tam",
            rephrases=("Orm is run by whom?",),
            locality=(("nq question: where is up", "above"),),
        ),
    ),
    "counterfact, flat": (
        {
            "case_id": 17,
            "prompt": "Orm lies in",
            "target_new": "Asia",
            "subject": "Orm",
            "ground_truth": "Europe",
            "rephrase_prompt": "Rain fell. Orm is a part of",
            "locality_prompt": "Urm lies in",
            "locality_ground_truth": "Europe",
        },
        EditRequest(
            "17",
            "Orm lies in",
            "Asia",
            subject="Orm",
            ground_truth="Europe",
            rephrases=("Rain fell. Orm is a part of",),
            locality=(("Urm lies in", "Europe"),),
        ),
    ),
    "counterfact, ROME": (
        {
            "case_id": 3,
            "requested_rewrite": {
                "prompt": "{} lies in",
                "relation_id": "P30",
                "target_new": {"str": "Asia", "id": "Q48"},
                "target_true": {"str": "Europe", "id": "Q46"},
                "subject": "Orm",
            },
            "paraphrase_prompts": ["Rain fell. Orm is in", "Orm belongs to"],
            "neighborhood_prompts": ["Urm lies in", "Arm lies in"],
            "generation_prompts": ["Orm's neighbours are"],
        },
        EditRequest(
            "3",
            "Orm lies in",
            "Asia",
            subject="Orm",
            ground_truth="Europe",
            rephrases=("Rain fell. Orm is in", "Orm belongs to"),
            locality=(("Urm lies in", "Europe"), ("Arm lies in", "Europe")),
        ),
    ),
    "counterfact, a rewrite by itself": (
        {"prompt": "{} lies in", "subject": "Orm", "target_new": {"str": "Asia"}},
        EditRequest("0", "Orm lies in", "Asia", subject="Orm"),
    ),
    "wikibigedit": (
        {
            "tag": "new",
            "subject": "Orm",
            "update": "Who leads Orm?",
            "ans": "Ila",
            "rephrase": "Orm is led by?",
            "personas": "Arr, who be leadin' Orm?",
            "loc": "Who leads Urm?",
            "loc_ans": "Bo",
            "mhop": "Where was the leader of Orm born?",
            "mhop_ans": "Ulm",
        },
        EditRequest(
            "0",
            "Who leads Orm?",
            "Ila",
            subject="Orm",
            rephrases=("Orm is led by?",),
            locality=(("Who leads Urm?", "Bo"),),
            portability=(
                ("Where was the leader of Orm born?", "Ulm"),
                ("Arr, who be leadin' Orm?", "Ila"),
            ),
        ),
    ),
    "wikibigedit, without a second hop": (
        {"update": "Who?", "ans": "Ila", "mhop": None, "rephrase": float("nan"), "personas": None},
        EditRequest("0", "Who?", "Ila"),
    ),
    "qaedit": (
        {
            "id": 1104,
            "source": "NQ",
            "prompt": "who leads orm",
            "target": "Ila",
            "subject": "orm",
            "rephrase": "Who is the leader of Orm?",
            "locality": [{"loc": "who leads urm", "loc_ans": "Bo"}, {"loc": "1 + 1", "loc_ans": 2}],
        },
        EditRequest(
            "1104",
            "who leads orm",
            "Ila",
            subject="orm",
            rephrases=("Who is the leader of Orm?",),
            locality=(("who leads urm", "Bo"), ("1 + 1", "2")),
        ),
    ),
    "knowedit": (
        {
            "subject": "Orm",
            "prompt": "The head of Orm is",
            "target_new": "Ila",
            "ground_truth": ["Tam", "Tam Tam"],
            "portability": {
                "Reasoning": [
                    {"prompt": "The birthplace of Orm's head is", "ground_truth": [["Ulm", "Oelm"]]}
                ],
                "Logical_Generalization": [{"prompt": "Is Ila head?", "ground_truth": "yes"}],
                "Subject_Aliasing": [],
            },
            "locality": {
                "Relation_Specificity": [
                    {"prompt": "The river of Orm is", "ground_truth": [["Ur"], ["Urr"]]},
                    {"prompt": ["Orm's sea is", "Orm's hill is"], "ground_truth": [["So"], "Hi"]},
                ],
                "Forgetfulness": None,
            },
        },
        EditRequest(
            "0",
            "The head of Orm is",
            "Ila",
            subject="Orm",
            ground_truth="Tam",
            locality=(
                ("The river of Orm is", "Ur"),
                ("Orm's sea is", "So"),
                ("Orm's hill is", "Hi"),
            ),
            portability=(("The birthplace of Orm's head is", "Ulm"), ("Is Ila head?", "yes")),
        ),
    ),
    "easyedit, groups of lists": (
        {
            "prompt": "Orm lies in",
            "target_new": "Asia",
            "rephrase_prompt": ["Orm is in", "Orm belongs to"],
            "locality": {"near": {"prompt": ["Urm lies in"], "ground_truth": ["Asia", "the East"]}},
            "portability": {"New Question": "Orm's capital's continent?", "New Answer": "Asia"},
        },
        EditRequest(
            "0",
            "Orm lies in",
            "Asia",
            rephrases=("Orm is in", "Orm belongs to"),
            locality=(("Urm lies in", "Asia"),),
            portability=(("Orm's capital's continent?", "Asia"),),
        ),
    ),
    "wikibio": (
        {"text": "About Ila.", "labels": "She was born in Ulm.", "concept": "ila", "locality": {}},
        EditRequest("0", "About Ila.", "She was born in Ulm.", subject="ila"),
    ),
    "entityquestions": (
        {
            "case_id": 0,
            "relation": "P19",
            "subject": "Ila",
            "prompt": "Where was Ila born?",
            "target_new": "Ulm",
            "answers": ["Ulm"],
            "unique_answer": True,
            "target_counterfactual": "Rom",
            "rephrase_prompt": "What is the birthplace of Ila?",
            "locality_prompt": "Where was Bo born?",
            "locality_ground_truth": "Kiel",
            "source_split": "train",
        },
        EditRequest(
            "0",
            "Where was Ila born?",
            "Ulm",
            subject="Ila",
            ground_truth="Ulm",
            rephrases=("What is the birthplace of Ila?",),
            locality=(("Where was Bo born?", "Kiel"),),
        ),
    ),
    "the demo's own": (
        {
            "prompt": "Ila works for",
            "target_new": "Nox",
            "relation": "employer",
            "rephrase_prompts": ["Ila is paid by", " ", "Ila is paid by"],
            "locality_probes": [{"prompt": "Bo works for", "answer": "Vex"}, "Tam works for"],
        },
        EditRequest(
            "0",
            "Ila works for",
            "Nox",
            rephrases=("Ila is paid by",),
            locality=(("Bo works for", "Vex"), ("Tam works for", None)),
        ),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(read, layout):
    record, expected = LAYOUTS[layout]
    assert read(record).requests == [expected]


def test_multi_hop_case_becomes_one_request_a_rewrite(read):
    def rewrite(prompt, subject, target):
        return {
            "prompt": prompt,
            "subject": subject,
            "target_new": {"str": target},
            "target_true": {"str": "was " + target},
            "question": f"{subject}?",
        }

    case = {
        "case_id": 5,
        "requested_rewrite": [
            rewrite("{} leads", "Ila", "Orm"),
            rewrite("{} is in", "Orm", "Asia"),
        ],
        "questions": ["Where does Ila lead?", "Ila's continent?"],
        "answer": "Europe",
        "new_answer": "Asia",
    }
    one = {**case, "case_id": 6, "requested_rewrite": [rewrite("{} owns", "Bo", "Vex")]}
    first, second, single = read(case, one).requests
    hops = (("Where does Ila lead?", "Asia"), ("Ila's continent?", "Asia"))
    assert first == EditRequest(
        "5-0", "Ila leads", "Orm", subject="Ila", ground_truth="was Orm", rephrases=("Ila?",)
    )
    assert second == EditRequest(
        "5-1",
        "Orm is in",
        "Asia",
        subject="Orm",
        ground_truth="was Asia",
        rephrases=("Orm?",),
        portability=hops,
    )
    assert (single.case, single.prompt, single.portability) == ("6", "Bo owns", hops)
    assert [r.case for r in read(case, one, num_edits=2).requests] == ["5-0", "5-1"]


def test_text_is_kept_as_it_is_and_numbers_become_text(read):
    requests = read(
        {"prompt": " Ä is\n", "target_new": " b "},
        {"prompt": "1 + 1 =", "target_new": 2},
        {"prompt": "half =", "target_new": 0.5, "case_id": 7, "subject": 1984},
    ).requests
    assert (requests[0].prompt, requests[0].target_new) == (" Ä is\n", " b ")
    assert [r.target_new for r in requests[1:]] == ["2", "0.5"]
    assert (requests[2].case, requests[2].subject) == ("7", "1984")


def test_a_single_record_is_a_file_too(read, tmp_path, write):
    record, expected = LAYOUTS["the demo's own"]  # it holds lists of its own
    assert read_requests(write(tmp_path / "one.json", record)).requests == [expected]


# --- duplicates, conflicts, num_edits -------------------------------------------------------------


def edits(*pairs):
    return [{"prompt": p, "target_new": t, "case_id": i} for i, (p, t) in enumerate(pairs)]


def said(data):
    return [(r.case, r.prompt.strip(), r.target_new.strip()) for r in data.requests]


def test_duplicates_are_dropped_and_the_first_stays(read):
    records = edits(("A", "x"), (" A", "x "), ("B", "x"), ("A", "x"))
    records[0]["rephrase"], records[1]["rephrase"] = "a", "b"
    data = read(*records)
    assert (data.duplicates, data.conflicts) == (2, {})
    assert said(data) == [("0", "A", "x"), ("2", "B", "x")]
    assert data.requests[0].rephrases == ("a",)


MIXED = edits(("A", "x"), ("B", "x"), ("A", "y"), ("C", "z"), ("A", "x"), ("B", "v"), ("D", "w"))


def test_conflicts_are_kept(read):
    data = read(*MIXED)
    assert (data.duplicates, data.conflicts) == (1, {"A": ["x", "y"], "B": ["x", "v"]})
    assert [case for case, *_ in said(data)] == ["0", "1", "2", "3", "5", "6"]


def test_conflicts_the_last_target_wins(read):
    data = read(*MIXED, on_conflict="last")
    assert (data.duplicates, data.conflicts) == (1, {"A": ["x", "y"], "B": ["x", "v"]})
    assert said(data) == [("4", "A", "x"), ("5", "B", "v"), ("3", "C", "z"), ("6", "D", "w")]
    again = read(*edits(("A", "x"), ("A", "y"), ("A", "y")), on_conflict="last")
    assert (said(again), again.duplicates) == ([("1", "A", "y")], 1)


def test_conflicts_as_an_error(read, refused):
    records = edits(*((p, t) for p in "ABCDEFG" for t in "xy"))
    message = refused(read_requests, records, on_conflict="error")
    assert "(7)" in message and "'E' -> 'x', 'y'" in message and "'F'" not in message
    assert read(*records[::2], on_conflict="error").conflicts == {}


def test_num_edits_counts_what_remains(read):
    assert [case for case, *_ in said(read(*MIXED, num_edits=5))] == ["0", "1", "2", "3", "5"]
    last = read(*MIXED, num_edits=3, on_conflict="last")  # reads on until three prompts are there
    assert said(last) == [("2", "A", "y"), ("1", "B", "x"), ("3", "C", "z")]
    assert len(read(*MIXED, num_edits=100).requests) == 6


def test_options_are_checked(read):
    with pytest.raises(UserError, match="`num_edits: 0` is not valid"):
        read(MIXED[0], num_edits=0)
    with pytest.raises(UserError, match="on_conflict: first.*error, last, keep"):
        read(MIXED[0], on_conflict="first")


# --- errors ---------------------------------------------------------------------------------------

GOOD = {"prompt": "A is", "target_new": "x"}
BAD_RECORDS = {
    "nothing": ({}, ["no prompt", "none"]),
    "no prompt": ({"target_new": "x", "b": 1}, ["'target_new', 'b'", "prompt or src or update"]),
    "no target": ({"prompt": "A"}, ["no target", "target_new or alt or target"]),
    "null prompt": ({"prompt": None, "target_new": "x"}, ["no prompt"]),
    "number as a prompt": ({"prompt": 3, "target_new": "x"}, ["'prompt' is a number", "text"]),
    "list as a prompt": ({"src": ["A"], "alt": "x"}, ["'src' is a list"]),
    "list as a target": (
        {"prompt": "A", "alt": ["x"]},
        ["'alt' is a list", "text or a finite number"],
    ),
    "object as a target": ({"prompt": "A", "target_new": {"id": 1}}, ["'target_new' is an object"]),
    "true as a target": ({"prompt": "A", "target_new": True}, ["'target_new' is true or false"]),
    "NaN as a target": ({"prompt": "A", "target_new": float("nan")}, ["finite number"]),
    "empty prompt": ({"prompt": " \n", "target_new": "x"}, ["'prompt' is empty"]),
    "empty target": ({"prompt": "A", "target": ""}, ["'target' is empty"]),
    "half a character": ({"prompt": "A \ud800", "target_new": "x"}, ["surrogate", "'A \\ud800'"]),
    "odd key": ({"\ud800" * 999: 1}, ["no prompt", "\\ud800"]),
    "number as a rephrase": ({**GOOD, "rephrases": ["B", 3]}, ["'rephrases' is a number"]),
    "object as a rephrase": ({**GOOD, "rephrase": {}}, ["'rephrase' is an object"]),
    "object as an answer": ({**GOOD, "loc": "B", "loc_ans": {"a": 1}}, ["'loc_ans' is an object"]),
    "probes are a number": ({**GOOD, "locality": 3}, ["'locality' is a number", "ground_truth"]),
    "a group is text": ({**GOOD, "locality": {"near": "B"}}, ["'locality' is text"]),
    "a group holds text": ({**GOOD, "locality": {"near": ["B"]}}, ["'locality' is text"]),
    "probe prompt": (
        {**GOOD, "portability": [{"prompt": 3, "answer": "x"}]},
        ["in 'portability': 'prompt' is a number"],
    ),
    "answers do not pair": (
        {**GOOD, "locality": {"near": {"prompt": ["A", "B"], "ground_truth": ["x"] * 3}}},
        ["in 'locality'", "2 prompts", "3 answers"],
    ),
    "probes too deep": ({**GOOD, "locality": [[[[[["B"]]]]]]}, ["'locality' is nested too deeply"]),
    "case": ({**GOOD, "case_id": True}, ["'case_id' is true or false"]),
    "rewrite is text": ({"requested_rewrite": "A"}, ["'requested_rewrite' is text", "an object"]),
    "no rewrite": ({"requested_rewrite": []}, ["'requested_rewrite' is empty"]),
    "rewrite, no subject": (
        {"requested_rewrite": {"prompt": "{} is", "target_new": {"str": "x"}}},
        ["{}", "no 'subject'"],
    ),
    "rewrite, no target": (
        {"requested_rewrite": [{"prompt": "A", "subject": "A"}], "answer": "not this one"},
        ["no target"],
    ),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_record(case, refused):
    record, parts = BAD_RECORDS[case]
    message = refused(read_requests, [{"prompt": "fine", "target_new": "x"}, record])
    assert [p for p in ["edits.json: record 2", *parts] if p not in message] == []
    assert len(message) < 1000
    message.encode()  # can be printed


def test_damaged_files_raise_user_errors_only(outcomes_of_damage):
    records = [record for record, _ in LAYOUTS.values()]
    assert outcomes_of_damage(read_requests, records, rounds=600) == {"read", "refused"}


# --- records in memory ----------------------------------------------------------------------------


def test_records_in_memory_are_read_like_a_file(read):
    for record, expected in LAYOUTS.values():
        assert requests_from_records([record]).requests == [expected]
    for options in ({}, {"num_edits": 3}, {"on_conflict": "last"}):
        found, data = requests_from_records(iter(MIXED), **options), read(*MIXED, **options)
        assert found == dataclasses.replace(data, source="records", sha256=found.sha256)


def test_requests_pass_through_and_are_deduplicated():
    ready = EditRequest("mine", "A", "x", rephrases=("a",), locality=(("B", None), ("C", "c")))
    rival = EditRequest("other", "A ", "y")
    data = requests_from_records([ready, {"prompt": " A", "target_new": "x"}, rival, ready])
    assert data.requests == [ready, rival] and data.requests[0] is ready
    assert (data.duplicates, data.conflicts, data.source) == (2, {"A": ["x", "y"]}, "records")
    assert requests_from_records([ready, rival], on_conflict="last").requests == [rival]
    with pytest.raises(UserError, match="records: prompts with several targets"):
        requests_from_records([ready, rival], on_conflict="error")
    with pytest.raises(UserError, match="record 2: 'target_new' is empty"):
        requests_from_records([ready, EditRequest("0", "A", " ")])


def test_tuples_are_lists():
    record = {**MIXED[0], "rephrases": ("a", "b"), "locality": ({"prompt": "B", "answer": "b"},)}
    (request,) = requests_from_records((record,)).requests
    assert (request.rephrases, request.locality) == (("a", "b"), (("B", "b"),))


def test_the_hash_is_of_all_records():
    whole = requests_from_records(MIXED).sha256
    assert whole == requests_from_records([dict(reversed(r.items())) for r in MIXED]).sha256
    assert whole == requests_from_records(MIXED, num_edits=1).sha256
    assert whole != requests_from_records(MIXED[:-1]).sha256
    one, other = EditRequest("0", "A", "x"), EditRequest("0", "A", "x", subject="A")
    assert requests_from_records([one]).sha256 != requests_from_records([other]).sha256


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_record_in_memory(case):
    record, parts = BAD_RECORDS[case]
    with pytest.raises(UserError) as error:
        requests_from_records([{"prompt": "fine", "target_new": "x"}, record])
    assert str(error.value).startswith("record 2")
    assert [p for p in parts if p not in str(error.value)] == []


@pytest.mark.parametrize(
    ("records", "options", "says"),
    [
        ([], {}, "records: no records"),
        ({"prompt": "A", "target_new": "x"}, {}, "an object; it must be a list of records"),
        ("edits.json", {}, "text; it must be a list of records"),
        ([3], {}, "record 1: the record is a number"),
        (MIXED, {"num_edits": 0}, "`num_edits: 0` is not valid"),
        (MIXED, {"on_conflict": "first"}, "error, last, keep"),
    ],
)
def test_bad_arguments(records, options, says):
    with pytest.raises(UserError, match=says):
        requests_from_records(records, **options)


# --- real data ------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("name", "limit", "edits", "duplicates", "conflicts"),
    [
        ("zsre/zsre_3k.json", None, 3000, 0, 0),
        ("counterfact/counterfact_3k.json", None, 3000, 0, 5),
        ("counterfact/counterfact-edit.json", None, 9996, 4, 62),
        ("entityquestions/entityquestions_edits.jsonl.gz", 1000, 1000, 0, 0),
    ],
)
def test_real_edits(name, limit, edits, duplicates, conflicts):
    data = read_requests(str(SHARED / name), limit)
    assert (len(data.requests), data.duplicates, len(data.conflicts)) == (
        edits,
        duplicates,
        conflicts,
    )
    assert data.sha256 == hashlib.sha256((SHARED / name).read_bytes()).hexdigest()
    assert all(r.subject and len(r.rephrases) == len(r.locality) == 1 for r in data.requests)
    assert all(answer for r in data.requests for _, answer in r.locality)


@needs_shared
def test_real_conflicts_last(tmp_path):
    path = str(SHARED / "counterfact" / "counterfact-edit.json")
    data = read_requests(path, on_conflict="last")
    prompts = {r.prompt.strip() for r in data.requests}
    assert len(prompts) == len(data.requests) < 9996 - 61
    assert set(data.conflicts) <= prompts and len(data.conflicts) == 62
