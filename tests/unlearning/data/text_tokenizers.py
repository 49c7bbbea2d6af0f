"""Tokenizers made on the spot: byte-level BPE, with and without BOS and templates; a slow one."""

from __future__ import annotations

from typing import Any

CORPUS = [
    "Question: Who wrote the book about the lighthouse?",
    "Answer: The book about the lighthouse was written by Mira Oldenburg.",
    "Question: Where was the painter born?\nAnswer: The painter was born in Lisbon.",
    "Question: Which instrument does he play?\nAnswer: He plays the cello, every evening.",
    "You are a helpful assistant. user system assistant",
] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Trims, brings its own BOS, refuses system turns and turns out of order.
LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
#: Puts an empty thought before the last answer only, so that no shorter chat is a prefix.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
#: Has no token that ends a turn, and repeats the word that stands before every answer.
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
#: Ends the last turn only; behind the others comes the token that begins the next.
OPEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if loop.last %}<|im_end|>{% endif %}{% endfor %}"
)
DATED = (
    "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
)
SHOUTING = "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}"


def bpe_tokenizer(*, template: str | None = None, bos: bool = False, vocabulary: int = 400) -> Any:
    """Return a fast byte-level BPE tokenizer; with ``bos`` it puts ``<s>`` before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        inner.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
                ),
            ]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def merging_tokenizer() -> Any:
    """Return a fast BPE tokenizer without word borders, that merges ``:`` and ``P`` into one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("Capital: Paris?</s>"))
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    vocabulary |= {":P": len(vocabulary), "</s>": len(vocabulary) + 1}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "P")]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def slow_tokenizer() -> Any:
    """Return a tokenizer in plain Python: one token per letter, but ``:P`` is one."""
    from transformers import PreTrainedTokenizer

    class LetterTokenizer(PreTrainedTokenizer):
        def __init__(self, **options: Any) -> None:
            self.letters = [*map(chr, range(32, 127)), "\n", ":P"]
            super().__init__(eos_token="</s>", **options)

        @property
        def vocab_size(self) -> int:
            return len(self.letters)

        def get_vocab(self) -> dict[str, int]:
            return {letter: place for place, letter in enumerate(self.letters)}

        def _tokenize(self, text: str, **options: Any) -> list[str]:
            parts, place = [], 0
            while place < len(text):
                size = 2 if text.startswith(":P", place) else 1
                parts.append(text[place : place + size])
                place += size
            return parts

        def _convert_token_to_id(self, token: str) -> int:
            return self.letters.index(token) if token in self.letters else 0

        def _convert_id_to_token(self, index: int) -> str:
            return self.letters[index]

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens)

    return LetterTokenizer()
