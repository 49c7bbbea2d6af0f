"""Rows to tokens: which tokens are scored, special tokens, templates, truncation, pieces."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tokenizers import (
    BARE,
    CHATML,
    DATED,
    LLAMA_LIKE,
    OPEN,
    SHOUTING,
    THINKING,
    bpe_tokenizer,
    merging_tokenizer,
    slow_tokenizer,
)

from orthomerge.errors import DataError, ProblemsError, RecipeError, UnknownNameError
from orthomerge.unlearning.data import (
    IGNORED,
    Message,
    Row,
    TokenisedSet,
    fingerprint,
    preview,
    tokenise,
)
from orthomerge.unlearning.data.templates import render

tokenizer_of = cache(bpe_tokenizer)
QUESTION = Row("qa", prompt="Who wrote it?", answer="Mira wrote it.", where="f:1")
CHAT = Row(
    "chat",
    messages=(
        Message("user", "a b"),
        Message("assistant", "assistant"),
        Message("user", "and é?"),
        Message("assistant", "yes"),
    ),
    where="f:2",
)
LONG = Row("text", text="The painter was born in Lisbon. " * 20, where="f:3")


def runs(row: Row, tokenizer: Any, **options: Any) -> list[tuple[str, bool]]:
    set_ = tokenise([row], tokenizer, **{"max_length": 512, **options})
    return list(preview(set_, tokenizer)[0].runs)


def ids_of(set_: TokenisedSet, index: int = 0) -> list[int]:
    return list(set_[index]["input_ids"])


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize(
    ("template", "bos", "row", "expected"),
    [
        (None, False, QUESTION, ["-Question: Who wrote it?\nAnswer:", "+ Mira wrote it.</s>"]),
        (None, True, QUESTION, ["-<s>Question: Who wrote it?\nAnswer:", "+ Mira wrote it.</s>"]),
        (
            None,
            True,
            Row("completion", prompt="Go ", answer="on."),
            ["-<s>Go ", "+on.</s>"],
        ),
        (None, False, Row("completion", prompt="", answer="on we go"), ["+on we go</s>"]),
        (None, True, Row("text", text="Some words. "), ["-<s>", "+Some words. "]),
        (
            None,
            False,
            CHAT,
            [
                "-Question: a b\nAnswer:",
                "+ assistant",
                "-\nQuestion: and é?\nAnswer:",
                "+ yes</s>",
            ],
        ),
        (
            CHATML,
            True,  # the template has no BOS, so the row has none
            QUESTION,
            [
                "-<|im_start|>user\nWho wrote it?<|im_end|>\n<|im_start|>assistant\n",
                "+Mira wrote it.<|im_end|>",
            ],
        ),
        (
            CHATML,
            False,
            CHAT,
            [
                "-<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n",
                "+assistant<|im_end|>",
                "-\n<|im_start|>user\nand é?<|im_end|>\n<|im_start|>assistant\n",
                "+yes<|im_end|>",
            ],
        ),
        (
            THINKING,
            False,
            CHAT,
            [
                "-<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n",
                "+assistant<|im_end|>",
                "-\n<|im_start|>user\nand é?<|im_end|>\n<|im_start|>assistant\n"
                "<think>\n\n</think>\n\n",
                "+yes<|im_end|>",
            ],
        ),
        (
            LLAMA_LIKE,
            True,
            CHAT,
            [
                "-<s>[INST] a b [/INST]",
                "+ assistant </s>",
                "-[INST] and é? [/INST] ",
                "+yes </s>",
            ],
        ),
        (
            BARE,
            False,
            CHAT,
            ["-user: a b\nassistant:", "+ assistant", "-\nuser: and é?\nassistant: ", "+yes</s>"],
        ),
        (
            OPEN,
            False,
            CHAT,
            [
                "-<|im_start|>user\na b<|im_start|>assistant\n",
                "+assistant",
                "-<|im_start|>user\nand é?<|im_start|>assistant\n",
                "+yes<|im_end|>",
            ],
        ),
        (None, True, Row("completion", prompt="<s>Go ", answer="on."), ["-<s>Go ", "+on.</s>"]),
        (CHATML, True, LONG, ["-<s>", "+" + "The painter was born in Lisbon. " * 20]),
        (CHATML, True, Row("completion", prompt="Go ", answer="on."), ["-<s>Go ", "+on.</s>"]),
    ],
)
def test_scored_is_the_answer_and_what_ends_it(template, bos, row, expected) -> None:
    tokenizer = tokenizer_of(template=template, bos=bos)
    found = runs(row, tokenizer)
    assert ["+" * scored + "-" * (not scored) + text for text, scored in found] == expected


def test_template_can_be_chosen() -> None:
    tokenizer = tokenizer_of(template=CHATML)
    assert runs(QUESTION, tokenizer, template="plain")[0][0].startswith("Question:")
    completion = Row("completion", prompt="Go", answer="on")
    assert runs(completion, tokenizer, template="chat")[-1] == ("on<|im_end|>", True)
    with pytest.raises(RecipeError, match="no chat template"):
        tokenise([QUESTION], tokenizer_of(), max_length=64, template="chat")
    with pytest.raises(UnknownNameError, match="'plain'"):
        tokenise([QUESTION], tokenizer, max_length=64, template="plane")  # type: ignore[arg-type]


@pytest.mark.parametrize("template", [CHATML, LLAMA_LIKE, THINKING])
def test_templated_tokens_are_those_of_the_tokenizer_itself(template) -> None:
    tokenizer = tokenizer_of(template=template, bos=True)
    messages = [{"role": m.role, "content": m.content} for m in CHAT.messages or ()]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    ids = ids_of(tokenise([CHAT], tokenizer, max_length=512))
    assert ids == whole[: len(ids)]
    assert len(whole) - len(ids) <= 1  # a line break behind the last answer
    assert ids.count(tokenizer.bos_token_id) == (template == LLAMA_LIKE)


def test_what_is_generated_from_is_the_generation_prompt() -> None:
    tokenizer = tokenizer_of(template=CHATML)
    messages = [{"role": m.role, "content": m.content} for m in CHAT.messages or ()]
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert tokenise([CHAT], tokenizer, max_length=512).prompt_ids(0) == prompt


def test_the_mask_of_generation_blocks_is_found_without_them() -> None:
    """With ``{% generation %}`` transformers itself says which tokens are the assistant's."""
    text = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    tokenizer = tokenizer_of(template=text)
    messages = [{"role": m.role, "content": m.content} for m in CHAT.messages or ()]
    theirs = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    labels = tokenise([CHAT], tokenizer, max_length=512)[0]["labels"]
    assert [int(label != IGNORED) for label in labels] == theirs[: len(labels)]
    assert 1 not in theirs[len(labels) :]


@pytest.mark.parametrize("answer", ["yes", " yes", "yes ", " \nyes\n ", "yes yes "])
def test_a_template_may_trim_answers(answer) -> None:
    row = Row("qa", prompt="And?", answer=answer)
    rendered = render(row, tokenizer_of(template=LLAMA_LIKE, bos=True))
    assert [rendered.text[slice(*span)] for span in rendered.answers] == [answer.strip()]
    assert rendered.text == f"<s>[INST] And? [/INST] {answer.strip()} </s>"


def test_a_turn_without_weight_is_not_scored() -> None:
    messages = tuple(
        Message(m.role, m.content, scored=m.content != "assistant") for m in CHAT.messages or ()
    )
    found = runs(Row("chat", messages=messages), tokenizer_of(template=CHATML))
    assert [text for text, scored in found if scored] == ["yes<|im_end|>"]


def test_a_last_turn_that_is_not_scored_is_left_out() -> None:
    messages = (*(CHAT.messages or ()), Message("user", "Thank you."))
    found = runs(Row("chat", messages=messages), tokenizer_of(template=CHATML))
    assert found[-1] == ("yes<|im_end|>", True)


def test_the_date_does_not_get_into_the_rows() -> None:
    text = runs(QUESTION, tokenizer_of(template=DATED))[0][0]
    assert text.startswith("26 Jul 2024")


def test_templates_that_refuse_or_rewrite_say_which_row() -> None:
    system = Row("chat", messages=(Message("system", "x"), *(CHAT.messages or ())), where="f:7")
    first = Row("chat", messages=(CHAT.messages or ())[1:], where="f:8")
    with pytest.raises(ProblemsError) as caught:
        tokenise([system, QUESTION, first], tokenizer_of(template=LLAMA_LIKE), max_length=512)
    texts = [str(problem) for problem in caught.value.problems]
    assert texts[0].startswith("f:7: the chat template refuses")
    assert "no system turns" in texts[0]
    assert "turns must alternate" in texts[1]
    with pytest.raises(DataError, match="f:1: the chat template rewrites"):
        tokenise([QUESTION], tokenizer_of(template=SHOUTING), max_length=512)


# ------------------------------------------------------------------ borders


def test_a_token_over_the_border_is_scored() -> None:
    tokenizer = merging_tokenizer()
    row = Row("completion", prompt="Capital:", answer="Paris?")
    set_ = tokenise([row], tokenizer, max_length=64)
    tokens = preview(set_, tokenizer)[0].tokens
    assert [token for token, scored in tokens if scored] == [":P", "a", "r", "i", "s", "?", "</s>"]


def test_a_slow_tokenizer_refuses_a_token_over_the_border() -> None:
    tokenizer = slow_tokenizer()
    assert not tokenizer.is_fast
    rows = [
        Row("completion", prompt="Capital:", answer="Paris?", where="f:1"),
        Row("completion", prompt="Capital: ", answer="Paris?", where="f:2"),
    ]
    with pytest.raises(DataError, match="f:1: the tokenizer merges"):
        tokenise(rows, tokenizer, max_length=64)
    tokens = preview(tokenise(rows[1:], tokenizer, max_length=64), tokenizer)[0].tokens
    assert [token for token, scored in tokens if scored] == [*"Paris?", "</s>"]


def test_a_slow_tokenizer_masks_templated_chats_the_same() -> None:
    tokenizer = slow_tokenizer()
    tokenizer.chat_template = BARE
    set_ = tokenise([CHAT], tokenizer, max_length=512)
    tokens = preview(set_, tokenizer)[0].tokens
    assert [token for token, scored in tokens if scored] == [*"assistant", *"yes", "</s>"]


words = st.text(
    st.one_of(st.sampled_from(" \nabcQAé€😀:.<|"), st.characters(codec="utf-8")),
    min_size=1,
    max_size=12,
).filter(lambda text: bool(text.strip()))  # fmt: skip


@given(prompt=words, answer=words, bos=st.booleans())
@settings(max_examples=150)
def test_prompt_and_answer_keep_their_characters(prompt, answer, bos) -> None:
    """Unscored and scored tokens together are the text; the answer's are all scored."""
    tokenizer = tokenizer_of(bos=bos)
    row = Row("completion", prompt=prompt, answer=answer)
    item = tokenise([row], tokenizer, max_length=512)[0]
    ids, labels = item["input_ids"], item["labels"]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    unscored = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]
    scored = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert ids == unscored + scored, "the prompt comes first"
    assert unscored[:1] == [tokenizer.bos_token_id] if bos else tokenizer.bos_token_id not in ids
    assert scored[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[bos:-1]) == prompt + answer
    behind = tokenizer.decode(scored[:-1])
    assert behind.endswith(answer) or (answer.startswith(" ") and behind.endswith(answer[1:]))
    assert (prompt + answer).endswith(behind)


@given(contents=st.lists(words, min_size=2, max_size=6))
@settings(max_examples=60)
def test_any_chat_is_masked_turn_by_turn(contents) -> None:
    tokenizer = tokenizer_of(template=CHATML)
    contents = contents[: len(contents) // 2 * 2]
    turns = tuple(
        Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)
    )
    found = runs(Row("chat", messages=turns), tokenizer)
    assert [text for text, scored in found if scored] == [
        f"{turn.content}<|im_end|>" for turn in turns if turn.role == "assistant"
    ]


def test_eos_is_not_doubled() -> None:
    found = runs(Row("completion", prompt="Go ", answer="on.</s>"), tokenizer_of())
    assert found[-1] == ("on.</s>", True)


# ------------------------------------------------------------------ lengths


def test_truncated_rows_are_reported() -> None:
    tokenizer = tokenizer_of(bos=True)
    whole = tokenise([QUESTION, CHAT], tokenizer, max_length=512)
    lengths = [len(whole[i]["input_ids"]) for i in range(2)]
    assert whole.truncated == ()
    assert whole.longest == max(lengths)
    cut = tokenise([QUESTION, CHAT], tokenizer, max_length=lengths[1] - 2)
    assert [(t.index, t.where, t.length, t.lost) for t in cut.truncated] == [
        (1, "f:2", lengths[1], 2)
    ]
    assert ids_of(cut, 1) == ids_of(whole, 1)[:-2]
    assert cut.scored_tokens == whole.scored_tokens - 2
    shorter = tokenise([CHAT], tokenizer, max_length=lengths[1] - 9)
    last = whole[1]["labels"][-9:]
    assert shorter.truncated[0].lost == sum(label != IGNORED for label in last) < 9
    assert [row.is_truncated for row in preview(cut, tokenizer)] == [False, True]


def test_an_answer_that_is_cut_off_completely_is_refused() -> None:
    tokenizer = tokenizer_of()
    whole = tokenise([QUESTION], tokenizer, max_length=512)
    first = len(whole.prompt_ids(0))
    assert tokenise([QUESTION], tokenizer, max_length=first + 1).scored_tokens == 1
    with pytest.raises(DataError, match=f"f:1: .*cut off.* of {len(whole[0]['labels'])} .*Raise"):
        tokenise([QUESTION], tokenizer, max_length=first)
    with pytest.raises(ProblemsError, match="2 problems"):
        tokenise([QUESTION, QUESTION], tokenizer, max_length=first)


def test_the_first_token_is_never_predicted() -> None:
    for bos in (False, True):
        set_ = tokenise([LONG], tokenizer_of(bos=bos), max_length=512)
        assert set_.scored_tokens == len(ids_of(set_)) - 1


def test_a_row_of_which_nothing_is_predicted_is_refused() -> None:
    with pytest.raises(DataError, match="nothing of it"):
        tokenise([Row("text", text="a")], tokenizer_of(), max_length=8)
    assert (
        tokenise([Row("text", text="a")], tokenizer_of(bos=True), max_length=8).scored_tokens == 1
    )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("max_length", [5, 7, 16, 37, 1000])
def test_long_texts_lose_nothing(bos, max_length) -> None:
    tokenizer = tokenizer_of(bos=bos)
    head = [tokenizer.bos_token_id] if bos else []
    set_ = tokenise([QUESTION_SHORT, LONG], tokenizer, max_length=max_length)
    pieces = [ids_of(set_, i) for i in range(1, len(set_))]
    assert set_.truncated == ()
    assert set_.rows == (QUESTION_SHORT, *[LONG] * len(pieces))
    assert all(piece[: len(head)] == head for piece in pieces)
    text = tokenizer(LONG.text, add_special_tokens=False)["input_ids"]
    assert [token for piece in pieces for token in piece[len(head) :]] == text
    sizes = [len(piece) for piece in pieces]
    assert max(sizes) <= max_length
    assert max(sizes) - min(sizes) <= 1
    assert len(pieces) == -(-len(text) // (max_length - len(head)))
    assert [set_[i]["row"] for i in range(len(set_))] == list(range(len(set_)))


QUESTION_SHORT = Row("completion", prompt="a", answer="b")


def test_long_texts_can_be_cut() -> None:
    set_ = tokenise([LONG], tokenizer_of(), max_length=16, long_text="cut")
    assert len(set_) == 1
    assert len(ids_of(set_)) == 16
    assert set_.truncated[0].lost == set_.truncated[0].length - 16


@pytest.mark.parametrize("max_length", [3, 0, 16.0, True])
def test_lengths_without_room_are_refused(max_length) -> None:
    with pytest.raises(RecipeError, match="max_length"):
        tokenise([QUESTION], tokenizer_of(), max_length=max_length)


def test_room_is_counted_behind_bos() -> None:
    with pytest.raises(RecipeError, match=">= 5"):
        tokenise([LONG], tokenizer_of(bos=True), max_length=4)


def test_empty_sets_and_unsound_rows_are_refused() -> None:
    with pytest.raises(DataError, match="the forget set is empty"):
        tokenise([], tokenizer_of(), max_length=64, name="forget")
    bad = Row("qa", prompt="x", answer=" ", where="f:9")
    with pytest.raises(ProblemsError, match="f:9: its answer is empty"):
        tokenise([bad, QUESTION, bad], tokenizer_of(), max_length=64)
    with pytest.raises(UnknownNameError, match="'cut'"):
        tokenise([QUESTION], tokenizer_of(), max_length=64, long_text="cutt")  # type: ignore[arg-type]


# ------------------------------------------------------------------ what a set says of itself


def test_texts_and_names() -> None:
    set_ = tokenise([QUESTION], tokenizer_of(), max_length=64, name="forget")
    assert set_.texts() == ["Question: Who wrote it?\nAnswer: Mira wrote it."]
    assert set_.name == "forget"
    assert set_[-1] == set_[0]
    with pytest.raises(IndexError):
        set_[1]


def test_preview_reads_characters_of_several_tokens() -> None:
    row = Row("completion", prompt="é", answer="€")
    (shown,) = preview(tokenise([row], tokenizer_of(), max_length=64), tokenizer_of())
    assert shown.runs == (("é", False), ("€</s>", True))
    assert shown.scored == len(shown.tokens) - 2 >= 3


def test_preview_shows_as_many_as_asked() -> None:
    set_ = tokenise([QUESTION, CHAT, LONG], tokenizer_of(), max_length=512)
    assert [row.where for row in preview(set_, tokenizer_of(), count=2)] == ["f:1", "f:2"]
    assert len(preview(set_, tokenizer_of(), count=9)) == 3


def test_fingerprint_is_of_the_content() -> None:
    def digest(*rows: Row, **options: Any) -> str:
        return fingerprint(tokenise(rows, tokenizer_of(), **{"max_length": 64, **options}))

    start = "Question: Who wrote it?\nAnswer:"
    original = digest(QUESTION, CHAT)
    assert original == digest(replace(QUESTION, where="g:4", id="x"), CHAT, name="other")
    others = [
        digest(CHAT, QUESTION),
        digest(QUESTION),
        digest(replace(QUESTION, answer="Mira wrote it!"), CHAT),
        digest(replace(QUESTION, weight=2.0), CHAT),
        digest(QUESTION, CHAT, max_length=24),
        # the same ids, another mask
        digest(Row("completion", prompt=f"{start} Mira", answer=" wrote it."), CHAT),
    ]
    assert len({original, *others}) == 7
    assert original == "blake3:" + original[7:]
    assert len(original) == 71
